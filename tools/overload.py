"""An overload of `ldm serve`: more requests than it can answer, some cancelled, some hostile; and what must hold then.

Requests begin at random times (a Poisson process), whether earlier ones are answered or not, through all three APIs.
Canaries are requests whose images are known, made by `Pipeline` in this process. Of a hostile request, any refusal is
right. What must hold: `BOUNDS`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression
from typing import Any

import numpy as np
from PIL import Image

CANCELLED, HOSTILE, CANARIES = 0.10, 0.05, 0.05  # parts of the requests
CANCELLED_AFTER = 2.0  # seconds, the mean
SILENCE = 10.0  # seconds at most, in which a client that has begun a request says no more
KNOWN = 8  # canaries that differ
PATIENCE = 300.0  # seconds in which an answer must come
WARM_UP = 0.25  # part of the time after which memory must not grow
STOPPED = 1.0  # seconds of delay of its own timer from which this process was stopped; it cannot say what then was
JSON = "content-type: application/json\r\n"
DOORS = ("/v1/jobs", "/v1/jobs events", "/v1/images/generations", "/sdapi/v1/txt2img")


@dataclass(frozen=True)
class Bound:
    """An upper bound of a figure."""

    figure: str
    most: float
    text: str


BOUNDS = (
    Bound("wrong_images", 0, "canaries with another image"),
    Bound("server_errors", 0, "answers of 500 and more, but 503"),
    Bound("tracebacks", 0, "tracebacks in the server's log"),
    Bound("no_answer", 0, "requests without an answer"),
    Bound("refusal_p99_ms", 200, "99th percentile of refusals (503), ms"),
    Bound("memory_mb_per_minute", 1, "growth of resident memory after warm-up, MB/min"),
    Bound("left", 0, "images that wait or run at the end"),
    Bound("exit_status", 0, "status of the process, told to stop"),
)


@dataclass
class Canary:
    """A request whose image is known."""

    settings: dict[str, Any]
    image: np.ndarray


@dataclass
class OverloadTally:
    """What a run has seen so far."""

    statuses: Counter[str] = field(default_factory=Counter)  # "KIND STATUS"
    refusals: list[tuple[float, float]] = field(default_factory=list)  # begin and end
    images: int = 0
    canaries: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    lost: list[tuple[float, float, str]] = field(default_factory=list)  # without an answer: begin, end, what
    delays: list[tuple[float, float]] = field(default_factory=list)  # of this process's own timer: when, and seconds
    memory: list[tuple[float, float]] = field(default_factory=list)  # minutes, MB


# --- requests ---------------------------------------------------------------------------------------------------------


def raw(method: str, path: str, body: bytes = b"", more: str = "", host: str = "127.0.0.1") -> bytes:
    """A request of HTTP."""
    head = f"{method} {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n{more}"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def asking(door: str, settings: dict[str, Any]) -> bytes:
    """A request for images by a door; with `n`, two of them."""
    path, _, events = door.partition(" ")
    given = dict(settings)
    if path.startswith("/sdapi"):
        given["batch_size"] = given.pop("n", 1)
        given.pop("scheduler", None)
    if events:
        given["previews"] = True
    accept = "accept: text/event-stream\r\n" if events else "accept: image/png\r\n" if path == "/v1/jobs" else ""
    return raw("POST", path, json.dumps(given).encode(), JSON + accept)


def usual(draw: random.Random, prompts: Sequence[str], schedulers: Sequence[str], steps: int) -> dict[str, Any]:
    """The settings of a request like any other."""
    found: dict[str, Any] = {"prompt": draw.choice(prompts), "seed": draw.randrange(2**32)}
    found |= {"steps": draw.choice([steps // 2, steps, 3 * steps // 2]), "scheduler": draw.choice(schedulers)}
    return found | draw.choice([{}, {}, {"cfg_scale": 4}, {"negative_prompt": "red"}, {"n": 2}])


def png(image: Image.Image) -> str:
    """An image as base64."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def hostile_requests() -> list[bytes]:
    """Requests that must be refused, or that cost as much as a client can make them cost."""
    small = {"prompt": "a fox", "steps": 2}
    large = png(Image.new("RGB", (4096, 4096)))  # small as a file

    def job(more: dict[str, Any], path: str = "/v1/jobs") -> bytes:
        return raw("POST", path, json.dumps(small | more).encode(), JSON)

    return [
        raw("POST", "/v1/jobs", b'{"prompt": ', JSON),
        raw("POST", "/v1/jobs", b'{"prompt": [' + b"[]," * 60_000, JSON),
        raw("POST", "/v1/jobs", json.dumps({"prompt": "a" * 300_000}).encode(), JSON),
        raw("POST", "/v1/jobs", b'{"seed": ' + b"9" * 5000 + b"}", JSON),
        job({"steps": 10**6}), job({"width": 10**5, "height": 10**5}), job({"n": 10**4}), job({"nonsense": 1}),
        job({"image": "/etc/passwd"}), job({"image": {"path": "/etc/passwd"}}), job({"adapters": {"../../a": 1}}),
        job({"prompt": "(" * 3000}), job({"prompt": "a BREAK " * 400}), job({"guidance": 1e300}),
        job({"image": large, "strength": 0.1}), job({"image": large[:-400]}),
        job({"image": png(Image.new("1", (1, 1)))}),
        job({"alwayson_scripts": {"x": {"args": [1]}}}, "/sdapi/v1/txt2img"),
        job({"init_images": [large], "width": 10**5}, "/sdapi/v1/img2img"),
        job({"stream": True, "partial_images": 99}, "/v1/images/generations"),
        raw("GET", "/page/../../../../etc/passwd"), raw("GET", "/v1/jobs/" + "x" * 5000), raw("GET", "/%00%ff"),
        raw("POST", "/v1/jobs", json.dumps(small).encode(), JSON, host="evil.example"),
        raw("POST", "/v1/jobs", json.dumps(small).encode(), JSON + "origin: http://evil.example\r\n"),
        raw("POST", "/v1/jobs", more=JSON).replace(b"content-length: 0", b"content-length: 99999999999"),
        b"\x16\x03\x01\x02\x00 nonsense\r\n\r\n", b"GET " + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ]  # fmt: skip


# beginnings of requests that never go on
SILENT = (
    b"", b"POST /v1/jobs HTTP/1.1\r\nhost: 127.0.0.1\r\n",
    b"POST /v1/jobs HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n{",
)  # fmt: skip


def image_in(door: str, body: bytes) -> np.ndarray:
    """The first image of an answer."""
    if door.startswith("/v1/images"):
        body = base64.b64decode(json.loads(body)["data"][0]["b64_json"])
    elif door.startswith("/sdapi"):
        body = base64.b64decode(json.loads(body)["images"][0])
    with Image.open(io.BytesIO(body)) as opened:
        return np.asarray(opened.convert("RGB"), np.int32)


# --- a run ------------------------------------------------------------------------------------------------------------


class Overload:
    """One run against a server."""

    def __init__(
        self, address: str, pid: int, canaries: Sequence[Canary], ordinary: Callable[[random.Random], dict[str, Any]]
    ) -> None:
        """`ordinary` gives the settings of a request like any other."""
        host, _, port = address.rpartition(":")
        self.host, self.port, self.pid = host, int(port), pid
        self.canaries, self.ordinary, self.hostile = canaries, ordinary, hostile_requests()
        self.tally = OverloadTally()

    async def exchange(self, data: bytes, until: float = PATIENCE) -> tuple[str, bytes]:
        """The status and body of an answer; the connection is closed after `until` seconds.

        The status of a refusal is that with "refused": what is answered with 503 later has failed, for time or memory.

        Raises:
            TimeoutError: no answer has come by then.
            OSError: the server has closed the connection without one.
        """
        async with asyncio.timeout(until):
            reader, writer = await asyncio.open_connection(self.host, self.port)
            try:
                writer.write(data)
                await writer.drain()
                answer = await reader.read(-1)
            except ConnectionResetError:  # it did not want the rest of a request; what it said is lost
                answer = b"HTTP/1.1 400 lost\r\n\r\n" if len(data) > 100_000 else b""
            finally:
                writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/"):
            raise OSError("closed without an answer")
        return head.split()[1].decode() + " refused" * (b"\r\nretry-after:" in head.lower()), body

    async def send(self, number: int, seed: int) -> None:
        """Send the request of a number."""
        draw = random.Random(f"{seed} {number}")
        part = draw.random()
        if part < CANCELLED:
            await self.cancel(draw)
        elif part < CANCELLED + HOSTILE:
            await self.attack(draw)
        elif part < CANCELLED + HOSTILE + CANARIES:
            canary, door = draw.choice(self.canaries), draw.choice((DOORS[0], *DOORS[2:]))
            await self.ask("canary", door, canary.settings, canary)
        else:
            await self.ask("usual", draw.choice(DOORS), self.ordinary(draw))

    async def ask(self, kind: str, door: str, settings: dict[str, Any], canary: Canary | None = None) -> None:
        """Ask for an image."""
        tally, begun = self.tally, time.monotonic()
        try:
            status, body = await self.exchange(asking(door, settings))
        except (OSError, TimeoutError) as error:
            tally.lost.append((begun, time.monotonic(), f"{kind} {door}: {type(error).__name__}: {error}"))
            return
        tally.statuses[f"{kind} {status}"] += 1
        if status.startswith("5") and not status.endswith("refused"):
            tally.errors.append(f"{door} {status} {body[:300]!r}")
        if status.endswith("refused"):
            tally.refusals.append((begun, time.monotonic()))
        elif status == "200":
            tally.images += settings.get("n", 1)
            if canary is not None:
                tally.canaries += 1
                made = image_in(door, body)
                if made.shape != canary.image.shape or np.abs(made - canary.image).max() > 2:
                    tally.wrong.append(f"{door} {settings}")

    async def cancel(self, draw: random.Random) -> None:
        """Ask for an image, and end it: the connection is closed, or the job is deleted."""
        settings, seconds, begun = self.ordinary(draw), draw.expovariate(1 / CANCELLED_AFTER), time.monotonic()
        try:
            if draw.random() < 0.6:
                status, _ = await self.exchange(asking(draw.choice(DOORS), settings), seconds)
            else:
                status, body = await self.exchange(raw("POST", "/v1/jobs", json.dumps(settings).encode(), JSON))
                if status == "202":
                    await asyncio.sleep(seconds)
                    status, _ = await self.exchange(raw("DELETE", f"/v1/jobs/{json.loads(body)['id']}"))
            self.tally.statuses[f"cancelled {status}"] += 1
        except TimeoutError:
            self.tally.statuses["cancelled by closing"] += 1
        except OSError as error:
            self.tally.lost.append((begun, time.monotonic(), f"cancelled: {error}"))

    async def attack(self, draw: random.Random) -> None:
        """Send a hostile request, or a part of one."""
        silent, whole, begun = draw.random() < 0.15, draw.random() < 0.9, time.monotonic()
        data = draw.choice(SILENT if silent else self.hostile)
        try:
            if silent or not whole:
                data = data[: draw.randrange(len(data) + 1)]
                await self.exchange(data, draw.uniform(0, SILENCE))
                self.tally.statuses["hostile, in part"] += 1
            else:
                status, _ = await self.exchange(data)
                self.tally.statuses[f"hostile {status}"] += 1
        except (OSError, TimeoutError) as error:
            if silent or not whole:
                self.tally.statuses["hostile, in part"] += 1
            else:
                what = f"hostile {data[:200]!r}: {type(error).__name__}: {error}"
                self.tally.lost.append((begun, time.monotonic(), what))

    async def watch(self, begun: float) -> None:
        """Note the server's memory and how late this process is, until it is cancelled."""
        status = Path(f"/proc/{self.pid}/status")
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.25)
            now = time.monotonic()
            self.tally.delays.append((now, now - before - 0.25))
            resident = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
            self.tally.memory.append(((now - begun) / 60, int(resident.split()[1]) / 1024))

    async def run(self, rate: float, seconds: float, seed: int = 0) -> OverloadTally:
        """Send requests at a rate (one a second) for so long, and wait for their answers."""
        draw, begun, number = random.Random(seed), time.monotonic(), 0
        watching, due, sent = asyncio.create_task(self.watch(begun)), begun, set[asyncio.Task[None]]()
        while (due := due + draw.expovariate(rate)) < begun + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            sent = {task for task in sent if not task.done()} | {asyncio.create_task(self.send(number, seed))}
            number += 1
        await asyncio.gather(*sent)
        watching.cancel()
        return self.tally


# --- figures ----------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], part: float) -> float:
    """The value below which a part of them lies; 0 of none."""
    return sorted(values)[min(int(part * len(values)), len(values) - 1)] if values else 0.0


def figures_of(tally: OverloadTally, seconds: float, rate: float) -> dict[str, Any]:
    """The figures of a run."""
    least: dict[int, float] = {}  # of whole minutes: what is left once the server has given freed memory back
    for minutes, megabytes in tally.memory:
        if WARM_UP * seconds <= 60 * int(minutes) <= seconds - 60:
            least[int(minutes)] = min(megabytes, least.get(int(minutes), megabytes))
    stops = [(at, delay) for at, delay in tally.delays if delay > STOPPED]

    def stopped(begin: float, end: float) -> bool:
        return any(begin < at and at - delay < end for at, delay in stops)

    seen = [end - begin for begin, end in tally.refusals if not stopped(begin, end)]
    lost = [text for begin, end, text in tally.lost if not stopped(begin, end)]
    return {
        "seconds": seconds,
        "requests_per_second": rate,
        "requests": sum(tally.statuses.values()) + len(tally.lost),
        "images": tally.images,
        "canaries": tally.canaries,
        "wrong_images": len(tally.wrong),
        "server_errors": sum(
            count
            for text, count in tally.statuses.items()
            if any(part.isdecimal() and int(part) >= 500 and part != "503" for part in text.split())
        ),
        "no_answer": len(lost),
        "no_answer_while_stopped": len(tally.lost) - len(lost),
        "refusals": len(tally.refusals),
        **{f"refusal_p{round(100 * part)}_ms": 1000 * percentile(seen, part) for part in (0.5, 0.99)},
        "refusals_while_stopped": len(tally.refusals) - len(seen),
        "seconds_stopped": sum(delay for _, delay in stops),
        "own_delay_p99_ms": 1000 * percentile([delay for _, delay in tally.delays], 0.99),
        "memory_mb": max((megabytes for _, megabytes in tally.memory), default=0.0),
        "memory_mb_by_minute": list(least.values()),
        "memory_mb_per_minute": linear_regression(list(least), list(least.values())).slope if len(least) > 1 else None,
        "statuses": dict(sorted(tally.statuses.items())),
        "examples": (tally.wrong + tally.errors + lost)[:10],
    }


def broken(figures: dict[str, Any]) -> list[str]:
    """The bounds that a run has broken; figures that are None are not judged."""
    return [
        f"{bound.text}: {figures[bound.figure]:g}, at most {bound.most:g}"
        for bound in BOUNDS
        if figures[bound.figure] is not None and figures[bound.figure] > bound.most
    ]


def table(figures: dict[str, Any]) -> str:
    """The bounds with their figures, as a table of Markdown, and the rest below."""
    rows = ["| | found | at most |", "|---|---|---|"]
    for bound in BOUNDS:
        value = figures[bound.figure]
        rows.append(f"| {bound.text} | {'too short to say' if value is None else f'{value:.3g}'} | {bound.most:g} |")
    names = {bound.figure for bound in BOUNDS}
    rest = (f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
            if name not in names and name != "examples")  # fmt: skip
    return "\n".join([*rows, "", *rest, *figures["examples"]])
