"""Wrong command lines, configurations and paths are answered before PyTorch is imported, and errors name their keys."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launched import PATIENCE, ROOT

from ldm.errors import LdmError
from ldm.training.checks import check_bounds, check_paths
from ldm.training.config import load

LIGHT = """
import json, os, signal, sys
from ldm.cli.main import main

said, patience = sys.argv[1:]
for line in sys.stdin:
    folder, environment, *sys.argv[1:] = json.loads(line)
    if child := os.fork():  # each command has a process of its own
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm(int(patience))
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(said, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(folder)
    os.environ.update(environment)
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    heavy = {"torch", "numpy", "accelerate", "transformers", "diffusers", "pyarrow"} & sys.modules.keys()
    assert not heavy, heavy
    sys.exit(code)
"""
Answer = Callable[..., tuple[int, str, str]]
TINY = str(ROOT / "configs" / "tiny.yaml")


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Answer]:
    """Runs a command in a folder: its exit code, stdout and stderr; it imports nothing heavy."""
    said = tmp_path_factory.mktemp("said")
    light = subprocess.Popen(
        [sys.executable, "-c", LIGHT, said, str(PATIENCE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def call(*arguments: str, folder: Path, **environment: str) -> tuple[int, str, str]:
        assert light.stdin is not None and light.stdout is not None
        light.stdin.write(json.dumps([str(folder), environment, *arguments]) + "\n")
        light.stdin.flush()
        code = int(light.stdout.readline())
        out, err = ((said / name).read_text() for name in ("stdout", "stderr"))
        assert "Traceback" not in err, err
        return code, out, err

    with light:
        yield call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "missing.yaml"], "missing.yaml cannot be read: No such file or directory"),
        (["train", TINY, "unknown.key=1"], "unknown is not known"),
        (["train", TINY, "base.steps=0"], "base.steps is 0"),
        (["train", TINY], "data.source is not set"),
        (["train", TINY, "data.source=nowhere"], "data.source: nowhere does not exist; give a folder"),
        (["plan", "missing.yaml"], "missing.yaml cannot be read"),
        (["plan", TINY, "data.bucket_step=64"], "set data.bucket_step=32"),
        (["plan", TINY, "--measure", "2"], "data.source is not set"),
        (["selftest", "--precision", "int4"], "--precision 'int4': choose auto, no, fp16, bf16"),
        (["eval", "nowhere"], "nowhere does not exist; name a model"),
        (["eval", "emoji", "--data", "nowhere"], "--data: nowhere does not exist"),
        (["eval", "emoji", "--with", "stepps=3"], "--with stepps is not known; did you mean steps"),
        (["eval", "emoji", "--with", "steps=0"], "steps 0: a whole number from 1"),
        (["eval", "emoji", "--prompts", "missing.txt"], "missing.txt cannot be read"),
        (["train-adapter", "nowhere", "--trigger", "sks dog"], "data.source: nowhere does not exist"),
        (["train-adapter", ".", "--model", "nowhere"], "model.source: nowhere does not exist"),
        (["train-adapter", ".", "adapter.rnk=4"], "adapter.rnk is not known; did you mean"),
        (["train-adapter", ".", "--trigger", "sks dog"], "holds no images; name a folder"),
        (["generate", "--steps", "3"], "no prompt"),
        (["generate", "a fox", "--steps", "0"], "--steps 0: a whole number from 1"),
        (["generate", "a fox", "--model", "nowhere"], "nowhere does not exist; give a model folder"),
        (["generate", "a fox", "--model", "hf://owner/name"], "hf://owner/name is an address"),
        (["generate", "a fox", "--refiner", "nowhere"], "nowhere does not exist; give a model folder"),
        (["generate", "a fox", "--safety", "nowhere"], "nowhere does not exist; give a safety checker's folder"),
        (["generate", "a fox", "--c2pa", "a.pem,b.pem"], "c2pa a.pem cannot be read: No such file"),
        (["generate", "a fox", "--image", "missing.png"], "missing.png does not exist"),
        (["generate", "a fox", "--out", "one.jpg"], "name a folder, or a file that ends in .png"),
        (["generate", "a fox", "-n", "2", "--out", "one.png"], "2 images need a folder"),
        (["generate", "--prompts", "missing.txt"], "missing.txt cannot be read"),
        (["generate", "a fox", "--xy", "steps=1,2", "model=nowhere,emoji"], "nowhere does not exist; give a model"),
    ],
)
def test_wrong_input_is_answered_before_pytorch_is_imported(
    answer: Answer, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, out, err = answer(*arguments, folder=tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("ldm: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "file"),
    [(["--metrics", "is"], "inception-2015-12-05"), (["--data", ".", "--metrics", "memorisation"], "sscd")],
)
def test_published_weights_are_looked_for_early(
    answer: Answer, arguments: list[str], file: str, tmp_path: Path
) -> None:
    code, out, err = answer("eval", "emoji", *arguments, folder=tmp_path, LDM_WEIGHTS=str(tmp_path))
    assert (code, out) == (1, "")
    assert err.startswith(f"ldm: {tmp_path / file}") and "is missing; fetch it with" in err


@pytest.mark.parametrize("command", ["train", "plan", "eval", "selftest", "bench", "generate"])
def test_help_needs_no_pytorch(answer: Answer, tmp_path: Path, command: str) -> None:
    code, out, err = answer(command, "--help", folder=tmp_path)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) > 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["base.sizes=[{size: 96}]"], "data.bucket_step is 64: base.sizes has 96, which is no multiple of it; "
                                      "set data.bucket_step=48"),
        (["base.sizes=[{size: 512, steps: 5}, {size: 96}]"], "set data.bucket_step=32"),
        (["base.sizes=[{size: 100}]"], "choose a size that is a multiple of 8"),
        (["stages=[text,base]", "text.sizes=[{size: 32}]"], "text.sizes has 32"),
        (["base.sizes=[{size: 256}, {size: 512}]"], "base.sizes: the steps of each but the last must be given"),
        (["data.stream=true", "data.cache=true"], "data.cache: a stream cannot be cached"),
        (["data.cache=true", "data.crop=center", "data.crops=4"], "data.crops is 4: an image has one crop"),
        (["data.bucket_step=12"], "data.bucket_step is 12: input should be a multiple of 8"),
        (["data.aspect=17"], "data.aspect is 17"),
        (["data.upscale=65"], "data.upscale is 65"),
        (["data.crops=65"], "data.crops is 65"),
    ],
)  # fmt: skip
def test_bounds_name_the_key_to_change(overrides: list[str], message: str) -> None:
    with pytest.raises(LdmError) as caught:
        check_bounds(load(None, overrides))
    assert message in str(caught.value)


def test_what_a_message_advises_is_right() -> None:
    check_bounds(load(None, ["base.sizes=[{size: 96}]", "data.bucket_step=48"]))
    check_bounds(load(None, ["base.sizes=[{size: 100}]", "stages=[text]"]))  # of a stage that is not trained


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.source="], "data.source is not set"),
        (["data.source=a.png"], "data.source: a.png is a file; give a folder"),
        (["data.source=nothing-*.tar"], "data.source: no shard matches nothing-*.tar"),
        (["data.source=nothing.tar"], "data.source: nothing.tar cannot be read: No such file"),
        (["data.source=https://host/a.tar"], "data.source: https://host/a.tar is remote"),
        (["data.source=images", "data.stream=true"], "data.source: images cannot be streamed"),
        (["model.source=nowhere.safetensors"], "model.source: nowhere.safetensors does not exist; give a model"),
        (["model.components={vae: nowhere.pt}"], "model.components.vae: nowhere.pt does not exist"),
        (["stages=[base,refiner]", "refiner.model.source=gone"], "refiner.model.source: gone does not exist"),
        (["base.evaluation.every=5", "base.evaluation.data=gone"], "base.evaluation.data: gone does not exist"),
        (["output=a.png/run"], "output a.png/run cannot be used: "),
    ],
)  # fmt: skip
def test_paths_name_their_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Path("a.png").touch()
    right = ["data.source=images", "model.source=emoji", "output=runs/new"]
    check_paths(load(None, right))
    changed = [override.split("=")[0] for override in overrides]
    with pytest.raises(LdmError) as caught:
        check_paths(load(None, [*(one for one in right if one.split("=")[0] not in changed), *overrides]))
    assert message in str(caught.value)


def test_what_a_run_will_not_read_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    given = ["data.source=images", "model.source=nowhere", "output=run"]
    check_paths(load(None, [*given, "stages=[refiner]", "refiner.model.source=owner/name"]))
    Path("run/base").mkdir(parents=True)
    Path("run/base/done.json").touch()
    check_paths(load(None, given))  # the stage is done
    check_paths(load(None, ["data.source=owner/name", "model.source=owner/name", "base.evaluation.data=gone"]))
