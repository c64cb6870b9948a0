"""Models by their Hub name, from a small server on this machine that speaks the Hub's protocol, and from the cache."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import controls
import pytest
import tiny
from commands import run
from huggingface_hub import constants
from launched import PATIENCE
from safetensors.torch import load_file, save_file

from ldm.errors import LdmError
from ldm.weights.control_models import open_control_model
from ldm.weights.downloads import check_download
from ldm.weights.hub import wanted
from ldm.weights.sources import open_source, verify_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One public model, `someone/tiny`, from a folder; remembers what was fetched."""

    root: Path
    fetched: list[str]
    damaged: dict[str, bytes]  # what is sent in place of a file

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        files = [file for file in self.root.rglob("*") if file.is_file()]
        names = [file.relative_to(self.root).as_posix() for file in files]
        api = "api/models/someone/tiny"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in names]
            return self.send(json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}).encode(), body, {})
        if path in (f"{api}/tree/main", f"{api}/tree/{COMMIT}"):
            sizes = [file.stat().st_size for file in files]
            tree = [
                {"type": "file", "path": name, "size": size, "oid": "0" * 40}
                for name, size in zip(names, sizes, strict=True)
            ]
            return self.send(json.dumps(tree).encode(), body, {})
        for revision in ("main", COMMIT):
            start = f"someone/tiny/resolve/{revision}/"
            if path.startswith(start) and (self.root / path.removeprefix(start)).is_file():
                name = path.removeprefix(start)
                content = (self.root / name).read_bytes()
                if body:
                    self.fetched.append(name)
                kind = hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1
                start = b"" if name.endswith(".safetensors") else b"blob %d\0" % len(content)
                sent = self.damaged.get(name, content)
                return self.send(
                    sent, body, {"ETag": f'"{kind(start + content).hexdigest()}"', "X-Repo-Commit": COMMIT}
                )
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def send(self, content: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[type[Hub], str]]:
    tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "remote")
    (tmp_path / "remote" / "one_big_file.safetensors").write_bytes(bytes(1000))
    (tmp_path / "remote" / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(bytes(1000))
    (tmp_path / "remote" / "unet" / "diffusion_pytorch_model.bin").write_bytes(bytes(1000))
    handler = type("OneHub", (Hub,), {"root": tmp_path / "remote", "fetched": [], "damaged": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def at(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, offline: bool = False) -> None:
    """What the environment tells huggingface_hub as it is imported: the Hub's address, its cache, and no network."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)


def test_a_control_model_by_its_name(
    hub: tuple[type[Hub], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its repository holds the folder of one component, perhaps in several variants."""
    handler, url = hub
    handler.root = controls.folder(controls.controlnet(tiny.family("sd15", shallow=True)), tmp_path / "control")
    (handler.root / "diffusion_pytorch_model.fp16.safetensors").write_bytes(bytes(1000))
    (handler.root / "README.md").write_text("")
    for offline in (False, True):
        at(monkeypatch, url, tmp_path / "home", offline)
        open_control_model("someone/tiny", tiny.family("sd15", shallow=True)).load()
    assert sorted(handler.fetched) == ["config.json", "diffusion_pytorch_model.safetensors"]


def info(name: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "ldm", "info", name, "--json"],
        env=clean | {"HF_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def test_a_model_is_fetched_once_and_only_what_is_read(
    hub: tuple[type[Hub], str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, url = hub
    first = info("someone/tiny", tmp_path / "home", HF_ENDPOINT=url)
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert report["components"]["unet"]["parameters"] > 0
    assert "unet/diffusion_pytorch_model.safetensors" in handler.fetched
    for name in (
        "one_big_file.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
    ):
        assert name not in handler.fetched
    count = len(handler.fetched)
    for offline in (False, True):
        at(monkeypatch, url, tmp_path / "home", offline)
        assert run(capsys, monkeypatch, "info", "someone/tiny", "--json") == (0, first.stdout, "")
    assert len(handler.fetched) == count


def test_a_download_is_compared_with_the_digests_of_the_hub(
    hub: tuple[type[Hub], str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, url = hub
    at(monkeypatch, url, tmp_path / "home")
    (handler.root / "ldm_manifest.json").unlink()  # as of a model that others wrote
    for file in handler.root.glob("*/*.safetensors"):
        if "fp16" not in file.name:
            save_file(load_file(file), file)
    name = "unet/diffusion_pytorch_model.safetensors"
    content = bytearray((handler.root / name).read_bytes())
    content[-100] ^= 1
    handler.damaged[name] = bytes(content)
    code, out, err = run(capsys, monkeypatch, "info", "someone/tiny")
    assert (code, out) == (1, "")
    assert f"{name} is not what the Hub has (its digest there is " in err
    handler.damaged.clear()
    for blob in (tmp_path / "home").rglob("blobs/*"):
        blob.unlink()
    assert run(capsys, monkeypatch, "info", "someone/tiny")[0] == 0

    (file,) = (tmp_path / "home").rglob("snapshots/*/scheduler/scheduler_config.json")
    opened = open_source(file.parents[1], verify=False)
    assert "3 weight files agree with the Hub's digests" in verify_source(opened)
    file.write_text(file.read_text().replace("0.00085", "0.00095"))
    with pytest.raises(LdmError, match=r"scheduler_config.json is not what the Hub has .* fetch it again"):
        open_source(file.parents[1])  # loading reads small files whole


def test_a_download_to_a_folder_is_compared_as_well(tmp_path: Path) -> None:
    tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "ldm_manifest.json").unlink()
    file = tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file)  # without a digest of its own
    stated = tmp_path / "m" / ".cache" / "huggingface" / "download" / "unet" / f"{file.name}.metadata"
    stated.parent.mkdir(parents=True)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    stated.write_text(f"{COMMIT}\n{digest}\n{file.stat().st_mtime + 0.5}\n")
    lines = verify_source(open_source(tmp_path / "m"))
    assert "1 weight files agree with the Hub's digests" in lines

    data, time = bytearray(file.read_bytes()), file.stat().st_mtime
    data[-5000] ^= 1
    file.write_bytes(data)
    os.utime(file, (time, time))
    with pytest.raises(LdmError, match=r"model.safetensors is not what the Hub has"):
        check_download(file)
    os.utime(file, (time + 10, time + 10))  # changed by its owner: the download's digest says nothing of it
    assert not check_download(file)


def test_models_that_are_not_there(
    hub: tuple[type[Hub], str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = hub
    for name, offline, message in (
        ("someone/else", False, "neither a path here nor a model on the Hub"),
        ("someone/tiny", True, "the Hub cannot be reached"),
    ):
        at(monkeypatch, url, tmp_path / "home", offline)
        code, _, err = run(capsys, monkeypatch, "info", name)
        assert code == 1
        assert message in err
        assert err.startswith("ldm: ")
        assert err.count("\n") == 1


def test_an_address_is_no_name() -> None:
    with pytest.raises(LdmError, match="z.safetensors is an address: name a model of the Hub as owner/name, or fetch"):
        open_source("https://huggingface.co/x/y/resolve/main/z.safetensors")


def test_one_set_of_weights_is_chosen() -> None:
    files = [
        "model_index.json", "README.md", "v1-5-pruned.safetensors", "safety_checker/model.safetensors",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin", "unet/diffusion_flax_model.msgpack",
        "text_encoder/model.fp16.safetensors", "text_encoder/config.json",
        *(f"vae/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)),
        "vae/diffusion_pytorch_model.safetensors.index.json", "tokenizer/merges.txt", "tokenizer/vocab.json",
        "scheduler/scheduler_config.json",
    ]  # fmt: skip
    common = {f for f in files if f.endswith((".json", "merges.txt"))}
    shards = {f for f in files if "-of-" in f}
    half = {"text_encoder/model.fp16.safetensors"}
    assert set(wanted(files, None)) == common | shards | half | {"unet/diffusion_pytorch_model.safetensors"}
    of_vae = {file for file in common if "index" in file and "vae" in file}
    fp16 = half | {"unet/diffusion_pytorch_model.fp16.safetensors"}
    assert set(wanted(files, "fp16")) == (common - of_vae) | fp16
    pickles = ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"]
    assert wanted(pickles, None) == []
    assert wanted(pickles, None, allow_pickle=True) == pickles
