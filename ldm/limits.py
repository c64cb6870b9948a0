"""What this process may use of the machine: cores, memory and threads, within its control groups (cgroup)."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT, OWN, PROCESSES = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"), Path("/proc")


def cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(root: Path = ROOT, own: Path = OWN) -> int:
    """The cores whose time this process's control groups may use, rounded up; without a limit, all cores."""
    limits = [float(cores())]
    for folder in _groups("cpu", root, own):
        limits += _limit(_read(folder / "cpu.max").split())
        limits += _limit([_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")])
    return max(-int(-min(limits) // 1), 1)


def free_memory(root: Path = ROOT, own: Path = OWN, machine: Path = Path("/proc/meminfo")) -> int:
    """The bytes that the machine can still give, caches of files included, at most the limit of the control groups.

    Where the system does not tell, as on macOS, all of the machine's memory.
    """
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read(machine), re.MULTILINE)
    limits = [int(found[1]) * 1024 if found else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for folder in _groups("memory", root, own):
        texts = [_read(folder / name).strip() for name in ("memory.max", "memory.limit_in_bytes")]
        limits += [int(text) for text in texts if text.isdigit()]
    return min(limits)


def free_threads(root: Path = ROOT, own: Path = OWN, processes: Path = PROCESSES) -> int:
    """The threads that this process may still start, as far as its limits tell: those of the user, control groups."""
    import resource  # not on Windows

    most = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    limits = [sys.maxsize if most == resource.RLIM_INFINITY else most - _threads_of_user(processes)]
    for folder in _groups("pids", root, own):
        texts = [_read(folder / name).strip() for name in ("pids.max", "pids.current")]
        limits += [int(texts[0]) - int(texts[1])] if all(text.isdigit() for text in texts) else []
    return min(limits)


def _threads_of_user(processes: Path) -> int:
    """The threads that this process's user has now, of those processes that it sees."""
    found = 0
    for process in processes.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is hidden
            if process.stat().st_uid == os.getuid():
                found += len(os.listdir(process / "task"))  # noqa: PTH208, pathlib is slow
    return found


def _groups(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's control groups that may limit what a controller gives."""
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            folder = root / path.lstrip("/")
            yield from (one for one in (folder, *folder.parents) if one.is_relative_to(root))
        elif controller in controllers.split(","):  # version 1
            yield root / controller / path.lstrip("/")
            yield root / controller  # a container may see its own group as the root


def _limit(words: list[str]) -> list[float]:
    """Cores from a quota and a period in microseconds; nothing if there is no limit."""
    return [int(words[0]) / int(words[1])] if len(words) == 2 and all(word.isdigit() for word in words) else []


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeError):
        return ""
