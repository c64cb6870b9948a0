"""Measure how much longer work takes while other processes want the cores, by the waiting policy of OpenMP.

    python tools/measure_neighbours.py [--neighbours 0,1] [--policies load,spinning] [--work generate,train,eval]

Each row is a new process that makes images of the built-in model, trains its U-Net, or computes the features of images
with FID's network, for some seconds, beside so many busy processes for each core. Policies take turns. The last columns
are ratios: to spinning, as OpenMP does it, without neighbours, and with the same neighbours.

By default the neighbours are one program in a session of its own, to which Linux gives as much time as to the measured
one. With `--apart` each has a session, and Linux gives each as much as the measured one: of two cores, it then has two
thirds of one.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from rich.console import Console
from rich.progress import track
from rich.table import Table

from ldm.limits import cores
from ldm.threads import POLICY, SPINS, THREADS

POLICIES: dict[str, dict[str, str]] = {  # environment of the measured process
    "load": {},  # ours
    "spinning": {"GOMP_SPINCOUNT": "300000"},  # GNU's default
    "passive": {POLICY: "passive"},
    "one thread": {THREADS: "1"},
}
BEGIN = """
import statistics, sys, time
"""
END = """
for _ in range(2):
    work()
time.sleep(0.5)
times, end = [], time.perf_counter() + float(sys.argv[1])
while time.perf_counter() < end or len(times) < 3:
    began = time.perf_counter()
    work()
    times.append(time.perf_counter() - began)
print(statistics.median(times))
"""
WORK = {
    "generate": """
from pipelines import Pipeline
pipeline = Pipeline("emoji")
def work():
    pipeline("a smiling cat", steps=10, seed=0)
""",
    "train": """
from pipelines import Pipeline
import torch
from ldm.models.unet import Conditioning
from ldm.runtime.waiting import watch
watch("cpu", torch.get_num_threads())
unet = Pipeline("emoji", quick=False, dtype=torch.float32).model.unet.train().requires_grad_(True)
optimizer, config = torch.optim.AdamW(unet.parameters(), 1e-9), unet.config
latents = torch.randn(8, config.in_channels, config.sample_size, config.sample_size)
text = torch.randn(8, 77, config.text_dim)
pooled = [torch.randn(8, size) for size in (config.pooled_dim, config.size_ids)] if config.pooled_dim else []
timestep = torch.full((8,), 500)
def work():
    optimizer.zero_grad()
    unet(latents, timestep, Conditioning(text, *pooled)).square().mean().backward()
    optimizer.step()
""",
    "eval": """
import torch
from ldm.evaluation.networks.inception import Network
from ldm.runtime.waiting import watch
watch("cpu", torch.get_num_threads())
network, images = Network(False).eval(), torch.rand(8, 3, 299, 299)
def work():
    with torch.inference_mode():
        network(images)
""",
}
NEIGHBOURS = """
import os, sys
for _ in range(int(sys.argv[1]) - 1):
    if os.fork() == 0:
        break
while True:
    pass
"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of work in each process")
    parser.add_argument("--rounds", type=int, default=2, help="processes for each row")
    parser.add_argument("--neighbours", default="0,1", help="busy processes for each core, comma-separated")
    parser.add_argument("--policies", default=",".join(POLICIES), help="comma-separated")
    parser.add_argument("--work", default=",".join(WORK), help="comma-separated")
    parser.add_argument("--apart", action="store_true", help="a session for each neighbour")
    options = parser.parse_args()
    policies, works = options.policies.split(","), options.work.split(",")
    counts = [int(number) for number in options.neighbours.split(",")]
    rows = [(work, count, policy) for work in works for count in counts for policy in policies]
    times: dict[tuple[str, int, str], list[float]] = {row: [] for row in rows}
    for row in track(rows * options.rounds, description="measuring"):
        work, count, policy = row
        with neighbours(count * cores(), options.apart):
            times[row].append(seconds(work, policy, options.seconds))
    table = Table("work", "neighbours for each core", "policy", "ms", "times spinning alone", "times spinning")
    for (work, count, policy), found in times.items():
        here = median(found)
        others = [times.get((work, alone, "spinning")) for alone in (0, count)]
        table.add_row(
            work, str(count), policy, f"{1e3 * here:.1f}",
            *(f"{here / median(other):.2f}" if other else "" for other in others),
        )  # fmt: skip
    Console().print(table)


@contextmanager
def neighbours(count: int, apart: bool) -> Iterator[None]:
    """A context in which so many other processes are busy, in a session for all, or in one for each."""
    programs = [1] * count if apart else [count] * bool(count)
    busy = [subprocess.Popen([sys.executable, "-c", NEIGHBOURS, str(one)], start_new_session=True) for one in programs]
    try:
        yield
    finally:
        for one in busy:
            os.killpg(one.pid, signal.SIGKILL)
            one.wait()


def seconds(work: str, policy: str, duration: float) -> float:
    """The median time of a piece of work in a new process."""
    environment = {name: value for name, value in os.environ.items() if name not in {POLICY, THREADS, *SPINS}}
    ran = subprocess.run(
        [sys.executable, "-c", f"{BEGIN}{WORK[work]}{END}", str(duration)],
        env=environment | POLICIES[policy], stdout=subprocess.PIPE, text=True, check=True, timeout=100 * duration + 300,
    )  # fmt: skip
    return float(ran.stdout.split()[-1])


if __name__ == "__main__":
    main()
