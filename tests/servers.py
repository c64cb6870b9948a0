"""Limits of servers in tests: so small that little is needed to exceed them."""

from __future__ import annotations

from ldm.server.limits import Limits

LIMITS = Limits(body=200_000, upload=10_000, pixels=96 * 96, steps=500, images=4, characters=300, queue=8)
