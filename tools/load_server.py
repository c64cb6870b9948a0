"""Load `ldm serve` with many clients: images a second and latencies, beside one image at a time; or overload it.

A server of the built-in model (or MODEL) is started, loaded and stopped, once with batches and once without; and one of
diffusers' pipeline with the same weights (`tools/diffusers_server.py`), if MODEL is a folder in its layout. "Alone" is
the time of a single client's images beside those of `Pipeline` in this process. Mixed requests have other steps and
schedulers, with as many steps on average. It takes about two minutes.

    python tools/load_server.py --seconds 8 --out load.json

An overload (`tools/overload.py`) sends four times as many requests as the server can answer, some cancelled, some
hostile, and ends with status 1 if one of its bounds is broken:

    python tools/load_server.py --overload 600 --out overload.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TextIO
from urllib.parse import urlsplit

import numpy as np
import overload
import torch

from ldm.weights.builtin import builtin
from pipelines import Pipeline

STEPS = 20
KEPT = 100  # jobs that are kept in an overload: as many as there are before its memory is judged
TIMES = 4  # an overload's requests, of those that the server can answer
SCHEDULERS = ("euler", "ddim", "dpm++2m", "unipc", "euler-a")
PROMPTS = ("a smiling cat with heart eyes, fluent 3d style", "octopus, noto style", "fox, noto style", "weary face")


@dataclass
class ServerProcess:
    """A server in a process of its own."""

    address: str
    process: subprocess.Popen[str]


@contextmanager
def server(*command: str, log: Any = subprocess.DEVNULL) -> Iterator[ServerProcess]:
    """A new server by a command of Python, which is told to stop at the end; `log` is a file for its log."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        yield ServerProcess(urlsplit(process.stdout.readline().strip()).netloc, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ours(model: str, *options: str) -> tuple[str, ...]:
    """The command of Python that serves a model."""
    return "-m", "ldm", "serve", model, "--port", "0", *options


def settings(draw: random.Random, mixed: bool) -> dict[str, object]:
    """The settings of one request."""
    found: dict[str, object] = {"prompt": draw.choice(PROMPTS), "seed": draw.randrange(2**32), "steps": STEPS}
    if mixed:
        found |= {"steps": draw.choice([STEPS // 2, STEPS, 3 * STEPS // 2]), "scheduler": draw.choice(SCHEDULERS)}
    return found


def image(connection: http.client.HTTPConnection, wanted: dict[str, object]) -> tuple[int, int, float]:
    """Status, size and seconds of one request."""
    begun = time.monotonic()
    headers = {"content-type": "application/json", "accept": "image/png"}
    connection.request("POST", "/v1/jobs", json.dumps(wanted), headers)
    answer = connection.getresponse()
    return answer.status, len(answer.read()), time.monotonic() - begun


def load(address: str, clients: int, seconds: float, mixed: bool) -> dict[str, float]:
    """Images a second and latencies of clients that ask one after the other, after one image each to warm up.

    Raises:
        OSError: a client got no answer, or no image was made.
    """
    times: list[tuple[float, float]] = []  # end, seconds
    failed: list[int] = []
    errors: list[Exception] = []
    warm, end = threading.Barrier(clients + 1), [time.monotonic() + 10_000]

    def client(number: int) -> None:
        connection, draw = http.client.HTTPConnection(address, timeout=120), random.Random(number)
        try:
            image(connection, settings(draw, mixed))
            warm.wait()
            connection.close()  # the server closes one that was not used for long
            while time.monotonic() < end[0]:
                status, _, taken = image(connection, settings(draw, mixed))
                times.append((time.monotonic(), taken))
                if status != 200:
                    failed.append(status)
        except (OSError, http.client.HTTPException) as error:
            errors.append(error)
            warm.abort()  # nobody waits for this client
        except threading.BrokenBarrierError:
            pass  # another one has said why

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        warm.wait()
    begun = time.monotonic()
    end[0] = begun + seconds
    for thread in threads:
        thread.join()
    if errors:
        raise OSError(f"{len(errors)} of {clients} clients got no answer: {errors[0]!r}")
    within = sum(at <= end[0] for at, _ in times)
    if not within:
        raise OSError(f"no image was made in {seconds:g} seconds: take longer (--seconds)")
    taken = sorted(taken for _, taken in times)
    return {
        "images_per_second": within / seconds,
        "p50": median(taken),
        "p95": taken[int(0.95 * (len(taken) - 1))],
        "failed": len(failed),
    }


def alone(address: str, count: int) -> list[float]:
    """Seconds of images that one client asks for."""
    connection, draw = http.client.HTTPConnection(address, timeout=120), random.Random(0)
    return [image(connection, settings(draw, mixed=False))[2] for _ in range(count + 2)][2:]


def beside(model: str, count: int) -> list[float]:
    """Seconds of the same images by `Pipeline`."""
    pipeline, draw, found = Pipeline(model), random.Random(0), []
    for _ in range(count + 2):
        wanted: dict[str, Any] = settings(draw, mixed=False)
        begun = time.monotonic()
        pipeline(wanted.pop("prompt"), **wanted)
        found.append(time.monotonic() - begun)
    return found[2:]


def compare(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure a server with batches and one without, and print the figures."""
    found: dict[str, dict[str, float]] = {}
    pipeline = beside(options.model, options.alone)
    with server(*ours(options.model, "--queue", "1000")) as running:
        served = alone(running.address, options.alone)
        found["alone"] = {"pipeline": median(pipeline), "served": median(served)}
        found["batches"] = load(running.address, options.clients, options.seconds, mixed=False)
        found["mixed"] = load(running.address, options.clients, options.seconds, mixed=True)
    with server(*ours(options.model, "--queue", "1000", "--together", "1")) as running:
        found["one_at_a_time"] = load(running.address, options.clients, options.seconds, mixed=False)
    folder = builtin(options.model) or Path(options.model)
    if (folder / "model_index.json").is_file():
        with server(str(Path(__file__).with_name("diffusers_server.py")), str(folder)) as running:
            found["diffusers"] = load(running.address, options.clients, options.seconds, mixed=False)
    for name, figures in found.items():
        print(f"{name:>14}  " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)
    one = found["one_at_a_time"]["images_per_second"]
    print(f"batches / one at a time: {found['batches']['images_per_second'] / one:.2f}; "
          f"mixed / batches: {found['mixed']['images_per_second'] / found['batches']['images_per_second']:.2f}; "
          f"alone: {1000 * (found['alone']['served'] - found['alone']['pipeline']):.1f} ms over Pipeline")  # fmt: skip
    return found


# --- an overload ------------------------------------------------------------------------------------------------------


def canaries(model: str) -> list[overload.Canary]:
    """Requests with the images that `Pipeline` makes."""
    pipeline, found = Pipeline(model, dtype=torch.float32), []
    for number in range(overload.KNOWN):
        wanted = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": 1000 + number, "steps": STEPS - number}
        wanted |= {"cfg_scale": 2 + number / 4}
        made = pipeline(wanted["prompt"], **{name: value for name, value in wanted.items() if name != "prompt"})
        found.append(overload.Canary(wanted, np.asarray(made.images[0].convert("RGB"), np.int32)))
    return found


def overloaded(options: argparse.Namespace, log: TextIO) -> dict[str, Any]:
    """Overload a server, in fp32, so that images can be compared; print and return the figures. `log` takes its log."""
    known = canaries(options.model)

    def ordinary(draw: random.Random) -> dict[str, Any]:
        return overload.usual(draw, PROMPTS, SCHEDULERS, STEPS)

    limits = "--queue", str(options.queue), "--keep-jobs", str(KEPT)
    with server(*ours(options.model, "--dtype", "fp32", *limits), log=log) as running:
        rate = options.rate
        if rate is None:
            rate = TIMES * load(running.address, options.clients, options.seconds, mixed=True)["images_per_second"]
        run = overload.Overload(running.address, running.process.pid, known, ordinary)
        print(f"{rate:.1f} requests a second for {options.overload:g} s", flush=True)
        tally = asyncio.run(run.run(rate, options.overload))
        figures = overload.figures_of(tally, options.overload, rate)
        figures["left"] = left(running.address)
    log.seek(0)
    _, *tracebacks = log.read().split("Traceback")
    figures["tracebacks"] = len(tracebacks)
    figures["examples"] += [text[-1500:] for text in tracebacks[:3]]
    figures |= {"exit_status": abs(running.process.returncode), "cores": os.cpu_count(), "load": os.getloadavg()}
    print(overload.table(figures))
    return figures


def left(address: str) -> int:
    """The images that still wait or run a minute after a run, if not none before."""
    end, count = time.monotonic() + 60, 1
    while count and time.monotonic() < end:
        connection = http.client.HTTPConnection(address, timeout=60)
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
        figures = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        count = int(float(figures["ldm_waiting_images"]) + float(figures["ldm_running_images"]))
        time.sleep(0.5)
    return count


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="as for ldm serve")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--alone", type=int, default=10, help="images of a single client")
    parser.add_argument("--overload", type=float, metavar="SECONDS", help="overload a server for so long instead")
    parser.add_argument("--rate", type=float, help="requests a second of an overload; by default 4 times the capacity")
    parser.add_argument("--queue", type=int, default=64, help="images that may wait in an overload")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_args()
    with tempfile.TemporaryFile("w+") as log:
        found = overloaded(options, log) if options.overload else compare(options)
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))
    problems = overload.broken(found) if options.overload else []
    print(*(f"broken: {problem}" for problem in problems), sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
