"""No test reaches the network; models are tiny and made here."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers

logging.getLogger("xformers").setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Random inputs are the same in every run."""
    torch.manual_seed(0)
