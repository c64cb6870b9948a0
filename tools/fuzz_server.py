"""Send random requests to `ldm serve`, and count what must not be: defects, hangs, files and connections.

Requests are made from the JSON Schema of settings, from values that are odd for their kind, and from damaged bodies and
forms, for all routes of the application. What must not be: a status of 500 or more but 503, an answer that does not
come in time, a job that fails by a defect, a file opened outside of the model's folder and Python's own, one opened for
writing, a connection, a process. Request number I of a seed is always the same, but for names of jobs. Exits with 1 if
there was anything.

    python tools/fuzz_server.py -n 10000 --seed 0
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from PIL import Image

from ldm.images import png_bytes
from ldm.server.guard import FORMS
from ldm.server.jobs import FAILED, Event, ServerJob
from ldm.server.limits import Limits
from ldm.server.service import Service
from ldm.server.serving import in_thread
from pipelines import Pipeline
from pipelines.settings import at
from pipelines.translation import TRANSLATED

LIMITS = Limits(
    body=300_000, upload=20_000, pixels=96 * 96, steps=3, images=2, characters=400, chunks=3, seconds=5.0, queue=32
)
SECONDS = 40.0  # in which an answer must come, and its next part
ROOT = Path(__file__).resolve().parents[1]
PATHS = (
    "/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/a.png", "~/.ssh/id_rsa",
    "//host/share", "style.safetensors", "C:\\a.png", "ftp://127.0.0.1/a", "/dev/zero", "/proc/self/environ", "hf://a/b",
)  # fmt: skip
TEXTS = (
    "a fox", "", " ", "\0", "\ud800", "\u202e", "x" * 500, "a BREAK b", "<lora:../a:1>", "<lora:style:0.5>", "(a:1e9)",
    "((((", "[a:b:0.5]", "[a|b]", "\U0001f98a", "NaN", "null", "-1", "1e999", "64x64", "0x0", "auto", "karras",
    "DPM++ 2M", "euler", "a" * 150, "\n\r\t", "(a:-1)", "embedding:x", "{{}}", "%s%n", "true",
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 0.5, 1e-320, 1e308, -1e308, 2**31, 2**63, -(2**63), [], {}, [[]], [{}], {"": 0},
    [None], "", [1, "a"], {"a": {"b": [1]}}, [0, 1], [1, 0], [0.1, 0.8], [[1, 2], [3, 4]],
)  # fmt: skip
HEADERS = (
    {"accept": "image/png"}, {"accept": "text/event-stream"}, {"accept": "*/*"}, {"content-type": "text/plain"},
    {"origin": "http://evil.example"}, {"host": "evil.example"}, {"sec-fetch-site": "cross-site"}, {"content-type": ""},
    {"content-type": "multipart/form-data; boundary=x"}, {"content-type": "application/json; charset=utf-7"},
)  # fmt: skip
FORBIDDEN = (  # events of Python's auditing
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
)
OPENAI = {
    "response_format": ("b64_json", "url"), "output_format": ("png", "jpeg", "webp", "gif"), "stream": (True, False),
    "output_compression": (0, 50, 100, 101), "partial_images": (0, 1, 3, 4), "quality": ("auto", "hd"), "model": ("x",),
    "background": ("auto", "transparent"), "user": ("me",), "style": ("vivid",),
    "size": ("auto", "64x64"), "svg": ({},),
}  # fmt: skip


def image_bytes(draw: random.Random) -> bytes:
    """An image of a random format, mode and size; one in four is damaged, or none."""
    mode = draw.choice(("RGB", "RGBA", "RGBA", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"))
    kind = draw.choice(("PNG", "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"))
    size = draw.choice(((64, 64), (64, 64), (64, 64), (8, 8), (1, 1), (1, 300), (150, 150), (64, 96)))
    image, file = Image.new(mode, size), io.BytesIO()
    try:
        image.save(file, kind)
    except (OSError, ValueError):
        image.convert("RGB").save(file, "PNG")
    return damaged(draw, file.getvalue()) if draw.random() < 0.25 else file.getvalue()


def damaged(draw: random.Random, data: bytes) -> bytes:
    """Data cut off, with other bytes, with a part twice, or others."""
    if not data:
        return b"\0"
    here, there = sorted(draw.randrange(len(data)) for _ in range(2))
    how = draw.randrange(4)
    if how == 0:
        return data[:there]
    if how == 1:
        return data[:here] + draw.randbytes(draw.randrange(1, 5)) + data[there:]
    if how == 2:
        return data[:there] + data[here:]
    return bytes(byte ^ (draw.random() < 0.02) * draw.randrange(256) for byte in data)


def value_of(draw: random.Random, schema: Mapping[str, Any], odd: float) -> Any:
    """A value for a JSON Schema; that part of values, or of their parts, is odd."""
    if draw.random() < odd:
        return draw.choice((draw.choice(ODD), draw.choice(TEXTS), draw.choice(PATHS)))
    if "anyOf" in schema:
        return value_of(draw, draw.choice(schema["anyOf"]), odd)
    if "enum" in schema:
        return draw.choice(schema["enum"])
    if "contentEncoding" in schema:
        head = draw.choice(("", "", "data:image/png;base64,", "data:text/html,"))
        return head + base64.b64encode(image_bytes(draw)).decode()
    kind = schema.get("type")
    if kind in ("integer", "number"):
        low, high = schema.get("minimum", 0), schema.get("maximum", 100)
        near = [low, high, *([low - 1, high + 1] if odd else []), draw.randint(int(low), min(int(high), int(low) + 4))]
        return draw.choice(near) if kind == "integer" else draw.choice([*near, draw.uniform(low, min(high, 5))])
    if kind == "boolean":
        return draw.random() < 0.5
    if kind == "array":
        parts = schema.get("prefixItems") or [schema.get("items", {})] * draw.randrange(4)
        return [value_of(draw, part, odd) for part in parts]
    if kind == "object":
        names = ("canny", "image", "style", "depth", draw.choice(PATHS))
        inner = schema.get("additionalProperties", {})
        return {draw.choice(names): value_of(draw, inner, odd) for _ in range(draw.randrange(3))}
    return draw.choice((*TEXTS, *PATHS))


def settings(draw: random.Random, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a request: mostly small ones, with a few of all others."""
    found: dict[str, Any] = {"prompt": draw.choice(TEXTS)}
    if draw.random() < 0.9:
        found |= {"steps": draw.randint(1, 3), "size": draw.choice(("64", "64x64", "64x96"))}
    rows, odd = at("http"), draw.choice((0.0, 0.2))
    for name in draw.sample(sorted(schema["properties"]), draw.choice((0, 0, 1, 2, 4))):
        value = value_of(draw, schema["properties"][name], odd)
        others = rows[name].names if name in rows else ()
        found[draw.choice(others) if others and draw.random() < 0.3 else name] = value
    if draw.random() < 0.1:
        found[draw.choice((*TRANSLATED, *TEXTS, *PATHS, "source", "lora_dir"))] = draw.choice(ODD)
    return found


def form(draw: random.Random, given: Mapping[str, Any]) -> bytes:
    """A form with settings and files, its boundary `x`."""
    parts = [(f'name="{name}"', json.dumps(value).strip('"').encode()) for name, value in given.items()]
    names = draw.choices(("image", "image[]", "mask", "markup"), (6, 1, 3, 1), k=draw.randrange(1, 3))
    for name in ["image"] if draw.random() < 0.5 else ["image", "mask"] if draw.random() < 0.5 else names:
        parts.append((f'name="{name}"; filename="{draw.choice(PATHS)}"', image_bytes(draw)))
    if draw.random() < 0.2:
        parts.append((f'name="{draw.choice(("adapters[a]", "seed[]", "a[b", "[]", "", "image", "interval[]"))}"', b"1"))
    lines = [b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (
        head.replace("\r", "").replace("\n", "").encode("utf-8", "replace"), data) for head, data in parts]  # fmt: skip
    return b"".join(lines) + b"--x--\r\n"


@dataclass(frozen=True)
class RandomRequest:
    """A request to send."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def request(
    draw: random.Random, schema: Mapping[str, Any], routes: list[tuple[str, str]], jobs: list[str]
) -> RandomRequest:
    """A random request to one of the routes (method, path)."""
    posts = [route for route in routes if route[0] == "POST"]
    method, path = draw.choice(posts if draw.random() < 0.75 else routes)
    for name in ("name", "number"):
        known = [*jobs[-8:], *PATHS, "x"] if name == "name" else ["0", "1", "-1", "9" * 30, "x"]
        for part in (f"{{{name}}}", f"{{{name}:path}}"):
            path = path.replace(part, quote(draw.choice(known), safe=draw.choice(("", "/"))))
    if draw.random() < 0.02:
        method, path = draw.choice(("GET", "POST", "PUT", "PATCH", "HEAD")), "/" + quote(draw.choice(PATHS))
    headers, body = {"content-type": "application/json"}, b""
    if method in ("POST", "PUT", "PATCH"):
        given = settings(draw, schema)
        if path.startswith("/v1/images"):
            given |= {name: draw.choice(values) for name, values in OPENAI.items() if draw.random() < 0.06}
        body = json.dumps(given).encode()
        if path in FORMS and draw.random() < 0.9:
            headers["content-type"], body = "multipart/form-data; boundary=x", form(draw, given)
        if draw.random() < 0.12:
            body = damaged(draw, body)
    if draw.random() < 0.15:
        headers |= draw.choice(HEADERS)
    return RandomRequest(method, path, headers, body)


# --- what must not be -------------------------------------------------------------------------------------------------


@dataclass
class ServerWatch:
    """What the threads of the server do, but those whose names begin with `fuzz`."""

    folders: tuple[str, ...]  # whose files may be read
    found: list[str] = field(default_factory=list)
    on: bool = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note an event of Python's auditing (PEP 578)."""
        if not self.on or threading.current_thread().name.startswith("fuzz"):
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and path != os.devnull
            if writes or not path.startswith(self.folders):
                self.found.append(f"opened {path!r} ({'write' if writes else 'read'})")
        elif event in FORBIDDEN:
            self.found.append(f"{event} {arguments!r}"[:300])


@dataclass
class FuzzFindings:
    """What a run has found."""

    statuses: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def note(self, what: str, sent: RandomRequest, number: int) -> None:
        """Note a problem of a request."""
        shown = f"{sent.method} {sent.path} {sent.headers} {sent.body[:1500]!r}"
        self.problems.append(f"request {number}: {what}: {shown}")


class Fuzzer:
    """Sends random requests to a service."""

    def __init__(self, service: Service, address: str, seed: int) -> None:
        self.service, self.seed, self.netloc = service, seed, urlsplit(address).netloc
        self.findings, self.jobs = FuzzFindings(), [""]
        self.schema = service.schema()
        status, body = self.send(RandomRequest("GET", "/openapi.json", {}, b""))
        assert status == 200, status
        described = json.loads(body)["paths"]
        self.routes = [(method.upper(), path) for path, own in described.items() for method in own]
        service.watchers.append(self.job_is_over)

    def job_is_over(self, job: ServerJob, event: Event) -> None:
        """Note a job that failed by a defect."""
        if event.kind == "state" and job.over.is_set() and job.state == FAILED and job.status == 500:
            self.findings.problems.append(f"job {job.request.prompts} {dict(job.request.values)}: {job.error}")

    def send(self, sent: RandomRequest) -> tuple[int, bytes]:
        """The status and body of a request's answer."""
        connection = http.client.HTTPConnection(self.netloc, timeout=SECONDS)
        try:
            connection.putrequest(sent.method, sent.path, skip_host="host" in sent.headers)
            for name, value in sent.headers.items():
                connection.putheader(name, value)
            if sent.body or sent.method in ("POST", "PUT", "PATCH"):
                connection.putheader("content-length", str(len(sent.body)))
            connection.endheaders(sent.body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def one(self, number: int) -> None:
        """Send the request of a number, and look at the answer."""
        draw = random.Random(f"{self.seed} {number}")
        sent, begun = request(draw, self.schema, self.routes, self.jobs), time.monotonic()
        try:
            status, body = self.send(sent)
        except (OSError, http.client.HTTPException) as error:
            self.findings.note(f"no answer ({type(error).__name__}: {error})", sent, number)
            return
        self.findings.slowest = max(self.findings.slowest, time.monotonic() - begun)
        self.findings.statuses[f"{status} {sent.method} /{'/'.join(sent.path.split('/')[1:4])[:30]}"] += 1
        if status >= 500 and status != 503:
            self.findings.note(f"status {status}, {body[:200]!r}", sent, number)
        if status == 202:
            name = json.loads(body)["id"]
            self.jobs.append(name)
            if draw.random() < 0.3:
                self.send(RandomRequest("DELETE", f"/v1/jobs/{name}", {}, b""))

    def run(self, numbers: range, threads: int) -> None:
        """Send the requests of these numbers, by several threads."""
        share = [numbers[start::threads] for start in range(threads)]
        workers = [
            threading.Thread(target=lambda own=own: [self.one(number) for number in own], name="fuzz") for own in share
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def settle(self) -> None:
        """Wait until all jobs are over, and look whether the server is as it was."""
        end = time.monotonic() + 2 * LIMITS.seconds
        engine = self.service.engine
        while (engine.waiting or engine.running) and time.monotonic() < end:
            time.sleep(0.05)
        for wrong, text in (
            (engine.failure, f"the engine has ended: {engine.failure}"),
            (engine.waiting or engine.running, "jobs do not end"),
            (self.service.uploads.pixels, f"{self.service.uploads.pixels} pixels of uploads are not given back"),
        ):
            if wrong:
                self.findings.problems.append(text)


def fuzz(service: Service, folders: tuple[Path, ...], numbers: range, seed: int = 0, threads: int = 4) -> FuzzFindings:
    """Send requests to a new server of a service, which reads files of these folders; it is closed at the end."""
    own = (
        ROOT / "ldm",
        ROOT / "pipelines",
        Path(sys.prefix),
        Path(sys.base_prefix),
        Path("/proc"),
        Path("/sys"),
        Path("/dev/null"),
    )
    first: dict[str, Any] = {"prompt": "a fox", "steps": 2, "size": "64"}
    for name in {"inpaint": ("image", "mask"), "edit": ("image",)}.get(service.engine.pipeline.model.family.task, ()):
        first[name] = base64.b64encode(png_bytes(Image.new("L", (64, 64), "white"))).decode()
    service.accept(first).result(SECONDS)  # so that what is imported late is there
    watch = ServerWatch(tuple(os.path.realpath(path) for path in (*folders, *own)))
    sys.addaudithook(watch)
    with in_thread(service) as address:
        fuzzer = Fuzzer(service, address, seed)
        watch.on = True
        try:
            fuzzer.run(numbers, threads)
            fuzzer.settle()
        finally:
            watch.on = False
    fuzzer.findings.problems += [f"{text}, {count} times" for text, count in Counter(watch.found).items()]
    return fuzzer.findings


def main() -> None:
    """Fuzz a server of a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=10_000, help="requests")
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--model", help="a model; the built-in one if none is named")
    options = parser.parse_args()
    loading = {} if options.model is None else {"source": options.model}
    folders = () if options.model is None else (Path(options.model),)
    service = Service(Pipeline(**loading), loading, LIMITS)
    begun, numbers = time.monotonic(), range(options.first, options.first + options.n)
    found = fuzz(service, folders, numbers, options.seed, options.threads)
    for text, count in sorted(found.statuses.items()):
        print(f"{count:6} {text}")
    print(f"{options.n} requests in {time.monotonic() - begun:.0f} s, the slowest {found.slowest:.1f} s")
    print(*found.problems, sep="\n")
    print(f"{len(found.problems)} problems")
    sys.exit(bool(found.problems))


if __name__ == "__main__":
    main()
