"""`ldm selftest`: checks that training works on this machine; prints a line for each check."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from pathlib import Path

from ldm.errors import LdmError
from ldm.launch import rank
from ldm.training.config import PRECISIONS


def check_training(folder: str, precision: str) -> None:
    """Run and print all checks; the trained networks are removed if all pass."""
    logging.basicConfig(format="ldm: %(message)s", level=logging.ERROR, stream=sys.stderr)
    first, path, began = rank() == 0, Path(folder), time.monotonic()
    if precision not in PRECISIONS:
        raise LdmError(f"--precision {precision!r}: choose {', '.join(PRECISIONS)}")
    if first and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise LdmError(f"--folder {path} exists already; name one that does not")
    import torch  # only now

    from ldm.runtime.waiting import threads_in_words
    from ldm.training.precision import precision_on, run_device
    from ldm.training.selftest import selftest

    def say(check: str, problem: str | None) -> None:
        print(f"{'FAILED' if problem else 'ok':8}{check}{f': {problem}' if problem else ''}", flush=True)

    if first:
        print(f"{run_device().type}, {threads_in_words(torch.get_num_threads())}", flush=True)
    well = selftest(path, precision_on(run_device(), precision), say)
    if first and well:
        shutil.rmtree(path, ignore_errors=True)
        print(f"all is well, after {time.monotonic() - began:.0f} s")
    if not well:
        raise LdmError(f"training does not work as it should here; the trained networks are in {path}")
