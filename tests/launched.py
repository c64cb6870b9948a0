"""Several processes on the CPU, by PyTorch's launcher: `accelerate launch --cpu --num_processes 2` starts one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATIENCE = 1200  # seconds for any process that a test starts: against hanging alone, ten times what the slowest takes


def on_two(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m` and a module, in two processes that know of each other; it must succeed."""
    return on_several(2, *arguments)


def on_several(count: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Likewise, in any number of processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={count}",
        *map(str, arguments),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done
