"""Load `ldm serve` with many clients, and compare: images a second and latencies beside one image at a time.

A server of the built-in model (or MODEL) is started, loaded and stopped, once with batches and once without. "Alone" is
the time of a single client's images beside those of `Pipeline` in this process. Mixed requests have other steps and
schedulers, with as many steps on average. It takes about a minute.

    python tools/load_server.py --seconds 8 --out load.json
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

STEPS = 20
SCHEDULERS = ("euler", "ddim", "dpm++2m", "unipc", "euler-a")
PROMPTS = ("a smiling cat with heart eyes, fluent 3d style", "octopus, noto style", "fox, noto style", "weary face")


@contextmanager
def server(model: str, *options: str) -> Iterator[str]:
    """The address of a new server, which is told to stop at the end."""
    command = [sys.executable, "-m", "ldm", "serve", model, "--port", "0", "--queue", "1000", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield urlsplit(process.stdout.readline().strip()).netloc
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


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
    """Images a second and latencies of clients that ask one after the other, after one image each to warm up."""
    times: list[tuple[float, float]] = []  # end, seconds
    failed: list[int] = []
    warm, end = threading.Barrier(clients + 1), [0.0]

    def client(number: int) -> None:
        connection, draw = http.client.HTTPConnection(address, timeout=120), random.Random(number)
        image(connection, settings(draw, mixed))
        warm.wait()
        while time.monotonic() < end[0]:
            status, _, taken = image(connection, settings(draw, mixed))
            times.append((time.monotonic(), taken))
            if status != 200:
                failed.append(status)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    end[0] = time.monotonic() + 10_000
    warm.wait()
    begun = time.monotonic()
    end[0] = begun + seconds
    for thread in threads:
        thread.join()
    taken = sorted(taken for _, taken in times)
    within = [at for at, _ in times if at <= end[0]]
    return {
        "images_per_second": len(within) / seconds,
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
    from pipelines import Pipeline

    pipeline, draw, found = Pipeline(model), random.Random(0), []
    for _ in range(count + 2):
        wanted = settings(draw, mixed=False)
        begun = time.monotonic()
        pipeline(wanted.pop("prompt"), **wanted)  # type: ignore[arg-type]
        found.append(time.monotonic() - begun)
    return found[2:]


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji", help="as for ldm serve")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--alone", type=int, default=10, help="images of a single client")
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    pipeline = beside(options.model, options.alone)
    with server(options.model) as address:
        served = alone(address, options.alone)
        found["alone"] = {"pipeline": median(pipeline), "served": median(served)}
        found["batches"] = load(address, options.clients, options.seconds, mixed=False)
        found["mixed"] = load(address, options.clients, options.seconds, mixed=True)
    with server(options.model, "--together", "1") as address:
        found["one_at_a_time"] = load(address, options.clients, options.seconds, mixed=False)
    for name, figures in found.items():
        print(f"{name:>14}  " + "  ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)
    one = found["one_at_a_time"]["images_per_second"]
    print(f"batches / one at a time: {found['batches']['images_per_second'] / one:.2f}; "
          f"mixed / batches: {found['mixed']['images_per_second'] / found['batches']['images_per_second']:.2f}; "
          f"alone: {1000 * (found['alone']['served'] - found['alone']['pipeline']):.1f} ms over Pipeline")  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
