"""How many threads compute on the CPU, settled before PyTorch is loaded; what is set in the environment stays as it is.

How they wait for each other follows the load, later: `ldm.runtime.waiting`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

from ldm.launch import processes_here
from ldm.limits import cores, quota

THREADS = "OMP_NUM_THREADS"
POLICY = "OMP_WAIT_POLICY"  # active or passive: of all OpenMP runtimes
SPINS = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # how long a thread spins: GNU's runtime, and LLVM's and Intel's


def settle(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the number of threads where not all cores may be used.

    Nothing happens if PyTorch is loaded, because OpenMP reads the environment only once.
    """
    if "torch" in sys.modules:
        return
    limit, siblings = quota(), processes_here(environment)
    if THREADS not in environment and (limit < cores() or siblings > 1):
        environment[THREADS] = str(max(min(cores(), limit) // siblings, 1))
