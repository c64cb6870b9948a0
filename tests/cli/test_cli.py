"""The installed command, as a user calls it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from commands import COMMAND, run
from launched import PATIENCE, Program

import ldm
from ldm.cli import main as cli
from ldm.cli.common import to_bytes
from ldm.errors import LdmError
from ldm.files import check_digest
from ldm.latent_diffusion import LatentDiffusion


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model"
    tiny.model("sdxl", shallow=True).save_pretrained(path)
    return path


def test_installed_command(model: Path, tmp_path: Path) -> None:
    """In a process of its own: version, JSON on stdout, an error in one line on stderr with exit code 1."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE)

    assert call("--version").stdout == f"ldm {ldm.__version__}\n"
    report = call("info", model, "--json")
    assert (report.returncode, report.stderr) == (0, "")
    assert json.loads(report.stdout)["components"]["unet"]["dtype"] == "float32"
    failed = call("info", tmp_path / "nowhere")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("ldm: ")
    assert failed.stderr.count("\n") == 1
    for arguments, line in (
        (["info"], "ldm: Missing argument 'source'; see ldm info --help\n"),
        (["generate", "a cat", "--outdir", "x"], "ldm: No such option: --outdir; did you mean --out?\n"),
        (["make"], "ldm: No such command 'make'; see ldm --help\n"),
    ):
        wrong = call(*arguments)
        assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", line)


def test_info_of_a_folder(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "info", model, "--json", "--verify")
    report = json.loads(out)
    assert code == 0
    assert report["family"] == "custom"
    assert report["prediction_type"] == "epsilon"
    assert set(report["components"]) == {"unet", "vae", "text_encoder", "text_encoder_2"}
    reference = LatentDiffusion.from_pretrained(model)
    for name, module in reference.modules().items():
        assert report["components"][name]["parameters"] == sum(p.numel() for p in module.parameters())
    assert report["verified"] == [
        "4 of 4 weight files carry a digest, and agree with it",
        "all files agree with the folder's manifest",
        "all weights are finite numbers",
    ]
    code, out, _ = run(capsys, monkeypatch, "info", model)
    assert code == 0
    assert "diffusers folder" in out


def test_info_of_a_family(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(capsys, monkeypatch, "info", "sdxl", "--json")
    assert code == 0
    assert json.loads(out)["components"]["unet"]["parameters"] == 2_567_463_684


def test_verify_finds_numbers_that_are_not_finite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tiny.model("sd15", shallow=True)
    broken.unet.conv_in.weight.data[0, 0, 0, 0] = float("inf")
    broken.save_pretrained(tmp_path / "m.safetensors")
    code, out, err = run(capsys, monkeypatch, "info", tmp_path / "m.safetensors", "--verify")
    assert (code, out) == (1, "")
    assert "input_blocks.0.0.weight holds 1 numbers that are not finite" in err


def test_verify_finds_flipped_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.model("sd15", shallow=True).save_pretrained(tmp_path / "m.safetensors")
    data = bytearray((tmp_path / "m.safetensors").read_bytes())
    data[-1000] ^= 1
    (tmp_path / "m.safetensors").write_bytes(data)
    assert run(capsys, monkeypatch, "info", tmp_path / "m.safetensors")[0] == 0  # names and shapes alone
    code, _, err = run(capsys, monkeypatch, "info", tmp_path / "m.safetensors", "--verify")
    assert code == 1
    assert "has changed since it was written" in err


def test_convert_both_ways(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    single, folder = tmp_path / "m.safetensors", tmp_path / "m"
    assert run(capsys, monkeypatch, "convert", model, single) == (0, f"{single}\n", "")
    assert run(capsys, monkeypatch, "convert", single, folder, "--shard-size", "1MB")[0] == 0
    assert tiny.same_weights(LatentDiffusion.from_pretrained(model), LatentDiffusion.from_pretrained(folder))
    assert run(capsys, monkeypatch, "convert", folder, single, "--dtype", "fp16", "--force")[0] == 0
    assert LatentDiffusion.from_pretrained(single).unet.conv_in.weight.dtype == torch.float16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "{tmp}/m.ckpt"], "pickles are not written"),
        (["{model}", "{model}"], "exists; choose another name or ask for it to be replaced"),
        (["{model}", "{tmp}/a/b/c"], "does not exist; create it first"),
        (["{model}", "{tmp}/x", "--dtype", "int3"], "--dtype 'int3' is not known; choose fp32, fp16 or bf16"),
        (["{model}", "{tmp}/x", "--shard-size", "-5"], "--shard-size '-5'"),
        (["{model}", "{tmp}/x", "--shard-size", "0GB"], "--shard-size '0GB'"),
        (["{model}", "{tmp}/x", "--shard-size", "9" * 400], "--shard-size"),
        (["{model}", "{tmp}/x.safetensors", "--shard-size", "1GB"], "is a single file; --as-variant and --shard-size"),
        (["{model}", "{tmp}/" + "x" * 300], "cannot be written: File name too long"),
        (["{model}", "{tmp}/x", "--component", "vae=a", "--component", "vae=b"], "each name once"),
        (["{model}", "{tmp}/x", "--revision", "main"], "a local path, which has no revision='main'"),
        (["{model}", "{tmp}/x", "--component", "vae"], "write NAME=PATH"),
        (["{model}", "{tmp}/x", "--component", "vea=/x"], "component 'vea' is not one of this model's"),
        (["{model}", "{tmp}/x", "--component", "vae=/nowhere"], "/nowhere does not exist"),
        (["{model}", "{tmp}/x", "--as-variant", "../x"], "letters, digits and underscores"),
        (["{model}", "{tmp}/x", "--variant", "fp99"], "no weights of the variant 'fp99'"),
        (["{model}", "{tmp}/x", "--family", "sd2"], "is a folder, whose files say what it is"),
        (["/dev/null", "{tmp}/x"], "is not a regular file"),
        (["{tmp}", "{tmp}/x"], "is not a model folder"),
        (["", "{tmp}/x"], "is not a model folder|does not exist"),
        (["a\nb\x1b[31m", "{tmp}/x"], "a b.*does not exist"),
        (["x" * 10_000, "{tmp}/x"], "cannot be read|does not exist"),
    ],
)
def test_wrong_arguments_get_one_line_and_leave_nothing(
    arguments: list[str], message: str, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, out, err = run(
        capsys, monkeypatch, "convert", *(text.format(model=model, tmp=tmp_path) for text in arguments)
    )
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert re.search(message, err), err
    assert list(tmp_path.iterdir()) == []


def test_the_end_of_the_output_is_noticed(model: Path) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [COMMAND, "info", str(model)], stdout=full, stderr=subprocess.PIPE, text=True, timeout=PATIENCE
        )
    assert result.returncode == 1
    assert result.stderr == "ldm: the output cannot be written: No space left on device\n"


def in_place_of_the_commands(program: str, call: str) -> subprocess.CompletedProcess[str]:
    """A process in which `cli.main` or `cli.command` runs the function `app` of a program."""
    whole = f"from ldm.cli import main as cli\n{program}cli.app = app\ncli.{call}()\n"
    return subprocess.run([sys.executable, "-c", whole], capture_output=True, text=True, timeout=PATIENCE)


def test_a_signal_in_a_callback_is_not_lost() -> None:
    """Python drops what is raised in callbacks of weak references, and prints it."""
    program = (
        "import os, signal, time, weakref\n"
        "class Thing: pass\n"
        "def callback(_):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.01)\n"
        "def app(standalone_mode):\n"
        "    thing = Thing()\n"
        "    here = weakref.ref(thing, callback)\n"
        "    del thing\n"
        "    time.sleep(30)\n"
        "    print('not interrupted')\n"
    )
    result = in_place_of_the_commands(program, "main")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "ldm: interrupted\n")


def test_the_process_ends_when_all_is_done() -> None:
    """Threads and exit functions have ended, and all is written; modules are not taken apart."""
    program = (
        "import atexit, threading, time\n"
        "class Module:\n"
        "    def __del__(self):\n"
        "        print('taken apart')\n"
        "module = Module()\n"
        "def app(standalone_mode):\n"
        "    atexit.register(print, 'exit function', end='')\n"
        "    threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
    )
    result = in_place_of_the_commands(program, "command")
    assert (result.returncode, result.stdout, result.stderr) == (0, "thread\nexit function", "")


def test_a_family_has_no_weights_to_verify(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run(capsys, monkeypatch, "info", "sdxl", "--verify")
    assert code == 1
    assert "sdxl is a family, not a model" in err


def test_a_signal_leaves_nothing(model: Path, tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        process = subprocess.Popen(
            [COMMAND, "convert", str(model), str(tmp_path / "out.safetensors")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(1.5)
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
        if process.returncode == 0:
            (tmp_path / "out.safetensors").unlink()
        else:
            assert (process.returncode, err) == (128 + number, "ldm: interrupted\n")
        assert list(tmp_path.iterdir()) == []


def test_a_terminal_that_does_not_know_a_letter(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    monkeypatch.setattr(sys, "argv", ["ldm", "convert", str(model), str(tmp_path / "\udcffé.safetensors")])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    sys.stdout.flush()
    assert written.getvalue().endswith(b"\\udcff\\xe9.safetensors\n")


def test_ctrl_c_leaves_nothing(model: Path, tmp_path: Path) -> None:
    """A real interrupt while the command starts, and while it writes: the file is there whole, or not at all."""
    out = tmp_path / "out.safetensors"

    def interrupted(process: subprocess.Popen[str] | Program, starting: bool = False) -> None:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
        if process.returncode != 0:
            assert process.returncode in (130, -signal.SIGINT), err
            assert "Traceback" not in err or starting
        if process.returncode == 0 or out.exists():  # it had been finished before the interrupt
            assert check_digest(out)
            out.unlink()
        assert list(tmp_path.iterdir()) == []

    for delay in (0.3, 1.5):
        command = [COMMAND, "convert", str(model), str(out)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(delay)
        interrupted(process, delay == 0.3)  # the interpreter itself is still starting
    for delay in (0, 0.005, 0.02):
        program = Program("-m", "ldm", "convert", model, out)
        while program.poll() is None and not list(tmp_path.iterdir()):
            time.sleep(0.001)
        time.sleep(delay)
        interrupted(program)


def test_an_unwritable_destination(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("ldm.files.os.fsync", full)
    with pytest.raises(LdmError, match="cannot be written: No space left on device"):
        LatentDiffusion.from_pretrained(model).save_pretrained(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5K", 1500), ("77", 77)])
def test_sizes(text: str, size: int) -> None:
    assert to_bytes(text) == size
