"""The names by which models are found: on the Hub, and of the file that makes a folder a model."""

from __future__ import annotations

import re

INDEX = "model_index.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILE = re.compile(rf"({HUB_ID.pattern})/(.+)")  # a file within a repository
