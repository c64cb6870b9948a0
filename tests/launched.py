"""Programs in processes of their own on the CPU: alone, or several that know of each other.

They are forked from a process that has imported what commands need, which takes seconds each time; `by_launcher` starts
two as a user does.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest.mock import patch

from torch.distributed import TCPStore

ROOT = Path(__file__).parent.parent
PATIENCE = 1200  # seconds for any process that a test starts: against hanging alone, ten times what the slowest takes
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
FIRST = os.environ | ONE_THREAD  # the environment of the process that others are forked from
IMPORTED = [
    "ldm.bench.processes", "ldm.cli.convert", "ldm.cli.evaluate", "ldm.cli.main", "ldm.cli.making",
    "ldm.cli.selftest", "ldm.cli.train", "ldm.training.loop", "ldm.sampling.solvers", "diffusers",
    "pandas", "transformers.models.clip.modeling_clip",
]  # fmt: skip


def warm() -> ForkServerContext:
    """A way to start processes that have imported what commands need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with patch.dict(os.environ, FIRST | {"PYTHONPATH": os.pathsep.join(sys.path)}, clear=True):
        forkserver.ensure_running()
    return context


class Program:
    """A Python program in a forked process, with one thread; used as a `subprocess.Popen` of text."""

    def __init__(
        self,
        *arguments: str | Path,
        cwd: Path | None = None,
        said: tempfile.TemporaryDirectory[str] | None = None,
        **environment: str,
    ) -> None:
        """Start a script, or `-m` and a module, with its arguments; what it prints goes to files in a folder."""
        self.said = said or tempfile.TemporaryDirectory()
        given = (list(map(str, arguments)), os.environ | ONE_THREAD | environment, cwd or Path.cwd(), self.said.name)
        self.process = warm().Process(target=_become, args=given)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.process.pid is not None and self.returncode is None:
            os.kill(self.process.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Wait for the end; returns what was printed on stdout and stderr."""
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"a process has not ended after {timeout} s")
        return printed(self.said)


def _become(arguments: list[str], environment: Mapping[str, str], cwd: Path, said: str) -> None:
    """Run a program in this process."""
    gc.freeze()  # as in tests/conftest.py
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(said, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    default, *_ = multiprocessing.get_all_start_methods()
    multiprocessing.set_start_method(default, force=True)  # of the processes that it starts itself
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def printed(said: tempfile.TemporaryDirectory[str]) -> tuple[str, str]:
    """What was printed on stdout and stderr; of a process that was killed before it had begun, nothing."""
    out, err = (Path(said.name, name) for name in ("stdout", "stderr"))
    return out.read_text() if out.exists() else "", err.read_text() if err.exists() else ""


def killed(work: Callable[[], object]) -> None:
    """Do something in a fork of this process, which is killed meanwhile."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def aged(left: Path) -> Path:
    """What a killed process left, older than anything that may still be written."""
    for path in (*left.rglob("*"), left):
        os.utime(path, (1, 1))
    return left


def on_two(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script, or `-m` and a module, in two processes that know of each other; it must succeed."""
    done = on_several([arguments] * 2)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def on_several(
    programs: Sequence[Sequence[str | Path]], folders: Sequence[Path | None] = (None, None)
) -> subprocess.CompletedProcess[str]:
    """Run programs in processes that know of each other, each in its folder; if one fails, the others are ended."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world = {  # what PyTorch's launcher says
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(len(programs)),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    said = tempfile.TemporaryDirectory()
    ranks = [
        Program(*arguments, cwd=cwd, said=said, **world, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, (arguments, cwd) in enumerate(zip(programs, folders, strict=False))
    ]
    left = {rank.process.sentinel: rank for rank in ranks}
    while left and not any(rank.returncode for rank in ranks):
        ended = wait(list(left), PATIENCE)
        assert ended, "processes hang"
        left = {sentinel: rank for sentinel, rank in left.items() if sentinel not in ended}
    for rank in ranks:
        rank.kill()
        rank.process.join()
    code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return subprocess.CompletedProcess(list(programs[0]), code, *printed(said))


def by_launcher(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """As `on_two`, by PyTorch's launcher, as `accelerate launch` does."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments]
    launcher = Program(*command, ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
    out, err = launcher.communicate()
    assert launcher.returncode == 0, err[-3000:]
    return subprocess.CompletedProcess(command, 0, out, err)
