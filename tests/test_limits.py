"""The cores and the memory that a process may use, as its control groups and the machine tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm import limits


def written(folder: Path, groups: str, files: dict[str, str]) -> tuple[Path, Path]:
    """The root of control groups with these files, and the file with a process's groups."""
    (own := folder / "own").write_text(groups + "\n")
    for name, text in files.items():
        path = folder / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder / "fs", own


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/docker/a", {"docker/a/cpu.max": "150000 100000"}, 2),
        ("0::/docker/a", {"docker/a/cpu.max": "max 100000", "docker/cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "300000 100000"}, 3),
        ("0::/gone", {}, 8),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
        ("4:cpu:/outside", {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "9000000", "cpu/a/cpu.cfs_period_us": "100000"}, 8),
    ],
)
def test_quotas_of_control_groups(
    groups: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "cores", lambda: 8)
    assert limits.quota(*written(tmp_path, groups, files)) == expected


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {}, 7 * 1024),
        ("0::/docker/a", {"docker/a/memory.max": "max", "docker/memory.max": "4096"}, 4096),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": "9223372036854771712"}, 7 * 1024),
        ("4:memory:/outside", {"memory/memory.limit_in_bytes": "2048"}, 2048),
    ],
)
def test_free_memory(groups: str, files: dict[str, str], expected: int, tmp_path: Path) -> None:
    (machine := tmp_path / "meminfo").write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:  7 kB\n")
    assert limits.free_memory(*written(tmp_path, groups, files), machine) == expected


def test_this_machine_has_memory() -> None:
    assert limits.free_memory() > 2**20


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {}, 997),
        ("0::/a", {"a/pids.max": "30", "a/pids.current": "20"}, 10),
        ("0::/a", {"a/pids.max": "max", "a/pids.current": "20"}, 997),
        ("8:pids:/a", {"pids/a/pids.max": "30", "pids/a/pids.current": "30"}, 0),
    ],
)
def test_free_threads(
    groups: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's limit counts all its threads: here those of two processes; a third one is ending."""
    for thread in ("7/task/7", "7/task/8", "9/task/9"):
        (tmp_path / "proc" / thread).mkdir(parents=True)
    (tmp_path / "proc" / "11").mkdir()
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1000, 2000))
    assert limits.free_threads(*written(tmp_path, groups, files), tmp_path / "proc") == expected


def test_other_users_threads_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "7" / "task" / "7").mkdir(parents=True)
    monkeypatch.setattr("resource.getrlimit", lambda kind: (1000, 2000))
    monkeypatch.setattr("os.getuid", lambda: tmp_path.stat().st_uid + 1)
    assert limits.free_threads(*written(tmp_path, "0::/", {}), tmp_path) == 1000
