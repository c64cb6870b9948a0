"""How many threads compute on the CPU, and how they wait for each other: settled before PyTorch is loaded.

OpenMP's threads spin while they wait, for a fifth of a second and longer by default. Where other processes want the
cores too, a spinning thread keeps from its core the very thread that it waits for. Here threads spin for microseconds
and then sleep. What the user has set in the environment stays as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

from ldm.limits import cores, quota

THREADS = "OMP_NUM_THREADS"
POLICY = "OMP_WAIT_POLICY"  # active or passive: of all OpenMP runtimes
SPINS = {  # how long a thread spins, by runtime
    "GOMP_SPINCOUNT": "1000",  # GNU's (PyTorch for Linux): rounds, some microseconds
    "KMP_BLOCKTIME": "1",  # LLVM's and Intel's (PyTorch for macOS, MKL): milliseconds
}


def settle(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the waiting policy and, where not all cores may be used, the number of threads.

    Nothing happens if PyTorch is loaded, because OpenMP reads the environment only once.
    """
    if "torch" in sys.modules:
        return
    if not {POLICY, *SPINS} & environment.keys():
        environment.update(SPINS)
    limit, siblings = quota(), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    if THREADS not in environment and (limit < cores() or siblings > 1):
        environment[THREADS] = str(max(min(cores(), limit) // siblings, 1))


def waiting(environment: MutableMapping[str, str] = os.environ) -> str:
    """The waiting policy in words, for reports."""
    found = [f"{name}={environment[name]}" for name in (POLICY, *SPINS) if name in environment]
    return ", ".join(found) or "OpenMP's own"
