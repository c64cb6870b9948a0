"""Send random requests to `ldm serve`, and count what must not be: defects, hangs, files and connections.

Requests are made from the JSON Schema of settings, the fields of AUTOMATIC1111's API, images with damaged records,
values that are odd for their kind, and damaged bodies and forms, for all routes of the application and the page's
files. What must not be: a status of 500 or more but 503, an answer that does not come in time, a job that fails by a
defect, a file opened outside of the model's folder and Python's own, one written outside of the history's, a
connection, a process. Request number I of a seed is always the same, but for names of jobs. Exits with 1 if there was
anything.

    python tools/fuzz_server.py -n 10000 --seed 0
    python tools/fuzz_server.py -n 10000 --only /sdapi --only /v1/history
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
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from PIL import Image

from ldm.conditions.table import KINDS
from ldm.images import png_bytes
from ldm.sampling.scheduler_names import SAMPLERS
from ldm.server.a1111_fields import HARMLESS, LARGER, LATENT, OF_IMAGES, OF_TEXT, WITHOUT_EFFECT
from ldm.server.guard import A1111, FORMS
from ldm.server.history import History
from ldm.server.jobs import FAILED, Event, ServerJob
from ldm.server.limits import Limits
from ldm.server.page_files import page_files
from ldm.server.service import Service
from ldm.server.serving import in_thread
from pipelines import Pipeline
from pipelines.a1111 import SPACING_NAMES, to_parameters
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
)
WRITING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink")  # paths come first
OPENAI = {
    "response_format": ("b64_json", "url"), "output_format": ("png", "jpeg", "webp", "gif"), "stream": (True, False),
    "output_compression": (0, 50, 100, 101), "partial_images": (0, 1, 3, 4), "quality": ("auto", "hd"), "model": ("x",),
    "background": ("auto", "transparent"), "user": ("me",), "style": ("vivid",),
    "size": ("auto", "64x64"), "svg": ({},),
}  # fmt: skip
FLAGS = (True, False)
WEBUI: dict[str, tuple[Any, ...]] = {  # fields of AUTOMATIC1111's API that mean something
    "negative_prompt": TEXTS, "seed": (-1, 0, 5, 2**32), "cfg_scale": (1, 2.5, 7), "sampler_name": tuple(SAMPLERS),
    "scheduler": ("Automatic", "karras", *SPACING_NAMES), "batch_size": (1, 2, 3), "n_iter": (1, 2),
    "denoising_strength": (0, 0.3, 0.75, 1), "eta": (0, 0.5, 1), "send_images": FLAGS, "enable_hr": FLAGS,
    "override_settings": ({}, {"CLIP_stop_at_last_layers": 2}, {"token_merging_ratio": 0.5}, {"sd_vae": "Automatic"}),
    "force_task_id": ("a", "b", "x" * 101), "refiner_checkpoint": ("None", "x"), "refiner_switch_at": (0.5, 1),
    "hr_scale": (1, 1.5, 2, 1e9), "hr_upscaler": (*LATENT, *LARGER, "ESRGAN"), "hr_resize_x": (0, 96, 10**6),
    "hr_resize_y": (0, 96), "resize_mode": (0, 1, 2, 3, "Just Resize"), "image_cfg_scale": (1.5,),
    "mask_blur": (0, 4, 300, -1), "mask_blur_x": (0, 9.5), "mask_blur_y": (64,), "inpainting_fill": (0, 1, 2, 3),
    "inpaint_full_res": FLAGS, "inpaint_full_res_padding": (0, 32, 10**6), "inpainting_mask_invert": (0, 1, 2),
    "include_init_images": FLAGS,
}  # fmt: skip
UNIT: dict[str, tuple[Any, ...]] = {  # fields of a unit of ControlNet
    "model": ("net", "None", "x"), "weight": (0, 0.5, 1), "guidance_start": (0, 0.5), "guidance_end": (0.4, 1),
    "module": ("none", "canny"), "control_mode": (0, "Balanced", 2), "resize_mode": (0, 1, 2, "Crop and Resize", 9),
    "enabled": FLAGS, "hr_option": ("Both",), "mask": ("",),
}  # fmt: skip
QUERIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "/v1/history": {"text": (*TEXTS, *PATHS), "before": (-1, 0, 5, 10**30, "x"), "count": (-1, 0, 3, 10**30, "")},
    f"{A1111}v1/progress": {"id_task": ("a", "b", *TEXTS), "skip_current_image": ("true", "1", "x")},
    f"{A1111}v1/interrupt": {"id_task": ("a", "b")}, f"{A1111}v1/skip": {"id_task": ("a", "b")},
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


def picked(draw: random.Random, fields: Mapping[str, Sequence[Any]], most: int, odd: float) -> dict[str, Any]:
    """Some fields, each with one of its values, or with an odd one."""
    names = draw.sample(sorted(fields), draw.randrange(min(most, len(fields)) + 1))
    return {name: draw.choice(ODD if draw.random() < odd else tuple(fields[name])) for name in names}


def encoded(draw: random.Random) -> Any:
    """A random image as a request has it; sometimes a path."""
    if draw.random() < 0.05:
        return draw.choice((*PATHS, *TEXTS, *ODD))
    half = Image.new(draw.choice(("L", "RGB")), (64, 64))
    half.paste("white", (0, 0, 64, draw.choice((32, 64))))
    data = png_bytes(half) if draw.random() < 0.6 else image_bytes(draw)
    return draw.choice(("", "data:image/png;base64,")) + base64.b64encode(data).decode()


def webui_fields(draw: random.Random, images: bool) -> dict[str, Any]:
    """The body of a request of AUTOMATIC1111's API."""
    odd = draw.choice((0.0, 0.0, 0.2))
    found: dict[str, Any] = {"prompt": draw.choice(TEXTS), "steps": draw.randint(1, 3), "width": 64, "height": 64}
    found |= picked(draw, WEBUI, draw.choice((0, 2, 5)), odd)
    if draw.random() < 0.2:
        found |= picked(draw, HARMLESS | dict.fromkeys((*WITHOUT_EFFECT, *OF_TEXT, *OF_IMAGES), TEXTS), 2, odd)
    if images or draw.random() < 0.05:
        found["init_images"] = [encoded(draw) for _ in range(draw.choice((1,) * 10 + (0, 2)))]
        if draw.random() < 0.6:
            found["mask"] = encoded(draw)
    if draw.random() < 0.3:
        units = [{"image": encoded(draw), **picked(draw, UNIT, 3, odd)} for _ in range(draw.choice((1, 1, 2)))]
        name = draw.choice(("ControlNet", "controlnet", "ADetailer"))
        found["alwayson_scripts"] = {name: draw.choice(({"args": units}, {"args": units}, units, {}, 5))}
    return found


def recorded_image(draw: random.Random, record: Mapping[str, Any]) -> str:
    """An image whose record has odd values, parts missing or added."""
    found = dict(record)
    for name in draw.sample(sorted(found), draw.choice((0, 1, 3))):
        found[name] = draw.choice((*ODD, *TEXTS, *PATHS))
        if draw.random() < 0.3:
            del found[name]
    if draw.random() < 0.2:
        found[draw.choice((*TEXTS, "image", "mask", "control", "adapters", "embeddings", "image_prompt"))] = (
            draw.choice(
                (*ODD, {"path": "/etc/passwd", "sha256": "0"}, [{"kind": "canny", "path": "/etc/passwd"}], {"style": 1})
            )
        )
    text = to_parameters(dict(record))
    data = damaged(draw, text.encode())
    parameters = draw.choice((text, "", data.decode("utf-8", "replace"), draw.choice(TEXTS)))
    wanted = None if draw.random() < 0.3 else json.loads(json.dumps(found))
    return base64.b64encode(png_bytes(Image.new("RGB", (8, 8)), wanted, parameters.replace("\0", ""))).decode()


def body_of(draw: random.Random, path: str, schema: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a request to a path."""
    if path in (f"{A1111}v1/txt2img", f"{A1111}v1/img2img"):
        return webui_fields(draw, path.endswith("img2img"))
    if path == f"{A1111}v1/options":
        name = draw.choice(("sd_model_checkpoint", "samples_format", "sd_vae", "token_merging_ratio", *TEXTS[:5]))
        return {name: draw.choice(("png", "Automatic", 0.0, *ODD))}
    if path in ("/v1/info", f"{A1111}v1/png-info"):
        return {"image": encoded(draw) if draw.random() < 0.3 else recorded_image(draw, record)}
    if path == "/v1/conditions":
        kinds = (*KINDS, "inpaint") if draw.random() < 0.8 else (*TEXTS, *ODD)
        return {"kind": draw.choice(kinds), "image": encoded(draw)}
    given = settings(draw, schema)
    if path.startswith("/v1/images"):
        given |= {name: draw.choice(values) for name, values in OPENAI.items() if draw.random() < 0.06}
    return given


@dataclass(frozen=True)
class RandomRequest:
    """A request to send."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class FuzzTargets:
    """What requests are made for."""

    schema: Mapping[str, Any]  # of settings
    routes: list[tuple[str, str]]  # method, path
    record: Mapping[str, Any]  # of an image of the server


def request(draw: random.Random, targets: FuzzTargets, jobs: list[str]) -> RandomRequest:
    """A random request to one of the routes."""
    routes = targets.routes
    posts = [route for route in routes if route[0] == "POST"] or routes
    method, path = draw.choice(posts if draw.random() < 0.75 else routes)
    for name in ("name", "number"):
        numbers = ["0", "1", "2", "-1", "9" * 30, "x"]
        known = [*jobs[-8:], *PATHS, "x"] if name == "name" else [*numbers, str(draw.randrange(1, 200))]
        for part in (f"{{{name}}}", f"{{{name}:path}}"):
            path = path.replace(part, quote(draw.choice(known), safe=draw.choice(("", "/"))))
    if draw.random() < 0.02:
        method, path = draw.choice(("GET", "POST", "PUT", "PATCH", "HEAD")), "/" + quote(draw.choice(PATHS))
    elif path.startswith("/page/") and draw.random() < 0.5:
        path = f"/page/{quote(draw.choice((*PATHS, '..', 'index.html')), safe=draw.choice(('', '/', '/.')))}"
    headers, body = {"content-type": "application/json"}, b""
    if method in ("POST", "PUT", "PATCH"):
        given = body_of(draw, path, targets.schema, targets.record)
        body = json.dumps(given).encode()
        if path in FORMS and draw.random() < 0.9:
            headers["content-type"], body = "multipart/form-data; boundary=x", form(draw, given)
        if draw.random() < 0.12:
            body = damaged(draw, body)
    if path in QUERIES and draw.random() < 0.8:
        query = picked(draw, QUERIES[path], 3, 0.05)
        path += "?" + urlencode({name: str(value).encode("utf-8", "replace") for name, value in query.items()})
    if draw.random() < 0.15:
        headers |= draw.choice(HEADERS)
    return RandomRequest(method, path, headers, body)


# --- what must not be -------------------------------------------------------------------------------------------------


@dataclass
class ServerWatch:
    """What the threads of the server do, but those whose names begin with `fuzz`."""

    folders: tuple[str, ...]  # whose files may be read
    written: str  # the folder in which files may be written
    found: list[str] = field(default_factory=list)
    on: bool = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note an event of Python's auditing (PEP 578)."""
        if not self.on or threading.current_thread().name.startswith("fuzz"):
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            writes = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and path != os.devnull
            if not path.startswith(self.written) and (writes or not path.startswith(self.folders)):
                self.found.append(f"opened {path!r} ({'write' if writes else 'read'})")
        elif event in WRITING:
            paths = [
                os.path.realpath(os.fsdecode(one)) for one in arguments if isinstance(one, (str, bytes, os.PathLike))
            ]
            if not all(path.startswith(self.written) for path in paths):
                self.found.append(f"{event} {arguments!r}"[:300])
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

    def __init__(
        self, service: Service, address: str, seed: int, record: Mapping[str, Any], only: Sequence[str] = ("/",)
    ) -> None:
        """`record` is that of an image; `only` are beginnings of the paths that are asked for."""
        self.service, self.seed, self.netloc = service, seed, urlsplit(address).netloc
        self.findings, self.jobs = FuzzFindings(), [""]
        status, body = self.send(RandomRequest("GET", "/openapi.json", {}, b""))
        assert status == 200, status
        described = json.loads(body)["paths"]
        routes = [(method.upper(), path) for path, own in described.items() for method in own]
        routes += [("GET", path) for path in (*page_files(), f"{A1111}{{name:path}}")]
        routes = [route for route in routes if route[1].startswith(tuple(only))]
        self.targets = FuzzTargets(service.schema(), routes, record)
        service.watchers.append(self.job_is_over)

    def job_is_over(self, job: ServerJob, event: Event) -> None:
        """Note a job that failed by a defect."""
        if event.last and job.state == FAILED and job.status == 500:
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
        sent, begun = request(draw, self.targets, self.jobs), time.monotonic()
        try:
            status, body = self.send(sent)
        except (OSError, http.client.HTTPException) as error:
            self.findings.note(f"no answer ({type(error).__name__}: {error})", sent, number)
            return
        self.findings.slowest = max(self.findings.slowest, time.monotonic() - begun)
        path = sent.path.partition("?")[0]
        self.findings.statuses[f"{status} {sent.method} /{'/'.join(path.split('/')[1:4])[:30]}"] += 1
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


def fuzz(
    service: Service,
    folders: tuple[Path, ...],
    numbers: range,
    seed: int = 0,
    threads: int = 4,
    only: Sequence[str] = ("/",),
) -> FuzzFindings:
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
    if service.history is not None:
        service.accept({**first, "n": 2, "keep": True}).result(SECONDS)
    job = service.accept(first)
    for one in (job, service.accept({**first, "scheduler": "DEISMultistepScheduler"})):
        one.result(SECONDS)  # so that what is imported late is there
    written = str(service.history.folder.resolve()) + os.sep if service.history else "\0"
    watch = ServerWatch(tuple(os.path.realpath(path) for path in (*folders, *own)), written)
    sys.addaudithook(watch)
    with in_thread(service) as address:
        fuzzer = Fuzzer(service, address, seed, service.record(job, 0) or {}, only)
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
    parser.add_argument("--only", action="append", metavar="PATH", help="routes that begin so")
    parser.add_argument("--model", help="a model; the built-in one if none is named")
    parser.add_argument("--control-model", help="a control model, too")
    options = parser.parse_args()
    loading = {} if options.model is None else {"source": options.model}
    loading |= {} if options.control_model is None else {"control_models": (options.control_model,)}
    folders = tuple(Path(one) for one in (options.model, options.control_model) if one is not None)
    begun, numbers = time.monotonic(), range(options.first, options.first + options.n)
    with tempfile.TemporaryDirectory() as kept:
        history = History(Path(kept) / "kept")
        service = Service(Pipeline(**loading), loading, LIMITS, history=history)
        found = fuzz(service, folders, numbers, options.seed, options.threads, options.only or ("/",))
        history.close()
    for text, count in sorted(found.statuses.items()):
        print(f"{count:6} {text}")
    print(f"{options.n} requests in {time.monotonic() - begun:.0f} s, the slowest {found.slowest:.1f} s")
    print(*found.problems, sep="\n")
    print(f"{len(found.problems)} problems")
    sys.exit(bool(found.problems))


if __name__ == "__main__":
    main()
