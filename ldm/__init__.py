"""Latent diffusion: Stable Diffusion 1.x, 2.x and SDXL, for generation, training and reading.

Importing this package is fast: torch is imported when a name below is first used. Before that, it is settled how many
threads compute (`ldm.threads`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ldm.errors import LdmError
from ldm.threads import settle

if TYPE_CHECKING:
    from ldm.latent_diffusion import LatentDiffusion

__version__ = "0.1.0"
__all__ = ["LatentDiffusion", "LdmError", "__version__"]


settle()


def __getattr__(name: str) -> Any:
    if name == "LatentDiffusion":
        from ldm.latent_diffusion import LatentDiffusion

        return LatentDiffusion
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
