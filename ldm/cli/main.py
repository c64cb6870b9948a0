"""The command `ldm`. Data goes to stdout, progress and messages to stderr; bad input gets one line and exit code 1.

Commands import what they need when they run, so that `ldm --help` answers at once.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

import ldm
from ldm.cli.options import with_options
from ldm.errors import LdmError
from pipelines.settings import LOADING, at, parsed

app = typer.Typer(
    name="ldm",
    help="Latent text-to-image diffusion: Stable Diffusion 1.x, 2.x and SDXL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[str, typer.Argument(help="A model folder, a checkpoint file, or a Hub name (owner/name).")]
FamilyOption = Annotated[str | None, typer.Option(help="What a single file is, where it cannot say: sd2 or sd2-v.")]
Variant = Annotated[str | None, typer.Option(help="Which of a folder's weights to read, such as fp16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
Replace = Annotated[
    list[str] | None,
    typer.Option("--component", help="Take a part from elsewhere, as NAME=PATH: unet, vae, text_encoder[_2]."),
]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read tensors, and nothing else, from .ckpt and .bin.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ldm {ldm.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def info(
    source: Source,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything: digests, and that all weights are finite.")
    ] = False,
    family: FamilyOption = None,
    variant: Variant = None,
    revision: Revision = None,
    component: Replace = None,
    allow_pickle: Pickle = False,
) -> None:
    """Say what a model is: family, components, types, parameters, prediction type.

    A family's name (sd15, sdxl ...) in place of a source describes the released models of that family.
    """
    from ldm.cli.common import SourceOptions
    from ldm.cli.info import print_description

    options = SourceOptions(family, variant, revision, tuple(component or ()), allow_pickle)
    print_description(source, json, verify, options)


@app.command()
def convert(
    source: Source,
    dest: Annotated[str, typer.Argument(help="A folder to write, or a single file if it ends in .safetensors.")],
    dtype: Annotated[str | None, typer.Option(help="Convert the weights: fp32, fp16 or bf16.")] = None,
    as_variant: Annotated[str | None, typer.Option(help="Put a variant into the names of a folder's weights.")] = None,
    shard_size: Annotated[str | None, typer.Option(help="Split a folder's larger files, such as 5GB (10GB).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the destination if it exists.")] = False,
    family: FamilyOption = None,
    variant: Variant = None,
    revision: Revision = None,
    component: Replace = None,
    allow_pickle: Pickle = False,
) -> None:
    """Write a model in another layout or type: folder to single file, single file to folder, fp32 to fp16."""
    from ldm.cli.common import SourceOptions
    from ldm.cli.convert import convert_model

    options = SourceOptions(family, variant, revision, tuple(component or ()), allow_pickle)
    convert_model(source, dest, dtype, as_variant, shard_size, force, options)


def _of_generate_itself(
    *,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to make images of.")] = None,
    prompts_file: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="Prompts, one a line; or JSON lines with settings.")
    ] = None,
    out: Annotated[str, typer.Option(help="A folder, or a .png for one image.")] = "outputs",
    sheet: Annotated[bool, typer.Option("--grid", help="Also all images on one sheet.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each image.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and make nothing.")] = False,
) -> None:
    """The options of `ldm generate` that are about the command, not about images or models."""


def generate_command() -> Callable[..., None]:
    """The command `generate`, with an option for each setting."""
    settings, loading = at("shell"), at("shell", LOADING)
    del settings["prompt"]  # its argument

    def generate(**given: Any) -> None:
        """Make images of prompts, as PNG files that say how they were made."""
        from ldm.cli.generate import Options, generate_images

        options = Options(
            prompts=given["prompts"] or [], settings=parsed(given, settings), loading=parsed(given, loading),
            prompts_file=given["prompts_file"], out=given["out"], sheet=given["sheet"], as_json=given["json"],
            dry_run=given["dry_run"],
        )  # fmt: skip
        generate_images(options)

    return with_options(generate, [*settings.values(), *loading.values()], _of_generate_itself)


app.command()(generate_command())


@app.command()
def repro(
    file: Annotated[
        str,
        typer.Argument(metavar="IMAGE", help="A PNG made by `ldm generate`, or by a program of AUTOMATIC1111's kind."),
    ],
    model: Annotated[
        str | None, typer.Option(help="The model that it was made with, if it is not where it was.")
    ] = None,
    refiner: Annotated[str | None, typer.Option(help="The refiner, if one was used.")] = None,
    image: Annotated[str | None, typer.Option(help="The image that it started from, likewise.")] = None,
    mask: Annotated[str | None, typer.Option(help="The mask, likewise.")] = None,
    out: Annotated[str | None, typer.Option(help="Also write the image, to this .png.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; by default as it was made.")] = None,
    allow_pickle: Pickle = False,
) -> None:
    """Make an image again from what it says of itself, and report how the pixels differ."""
    from ldm.cli.repro import reproduce_image

    reproduce_image(file, model, refiner, image, mask, out, device, dtype, allow_pickle)


@app.command()
def schedulers(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the schedulers and the spacings that go with each."""
    from ldm.cli.schedulers import print_schedulers

    print_schedulers(json)


def _fields(wanted: bool) -> None:
    if wanted:
        from ldm.cli.train import fields

        typer.echo(f"{train.__doc__}\n\nEvery key, its default and what it means:\n\n{fields()}")
        raise typer.Exit


@app.command(context_settings={"help_option_names": []})
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="On top of it.")] = None,
    _: Annotated[
        bool, typer.Option("--help", "-h", callback=_fields, is_eager=True, help="Describe every key.")
    ] = False,
) -> None:
    """Train models: ldm train CONFIG.yaml KEY=VALUE ... The same command again goes on where it stopped.

    On several GPUs or machines: accelerate launch train_ldm.py CONFIG.yaml KEY=VALUE ...
    """
    from ldm.cli.train import train_models

    train_models(config, overrides or [])


@app.command()
def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, as for `ldm train`.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="On top of it.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="On how many devices.")] = 1,
    measure: Annotated[int, typer.Option(min=0, help="Do so many real steps, and say how long all will take.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what training will need: parameters, memory (weights + gradients + optimiser + averages + activations), work.

    Memory is predicted; PFLOP are counted.
    """
    from ldm.cli.plan import print_forecast

    print_forecast(config, overrides or [], processes, measure, json)


@app.command()
def selftest(
    folder: Annotated[str, typer.Option(help="Where to work: new, and seen by all processes.")] = "selftest",
    precision: Annotated[str, typer.Option(help="Of the computation: no, fp16 or bf16.")] = "no",
) -> None:
    """Check in two minutes that training works on this machine: accelerate launch -m ldm selftest.

    Gradients of every loss, the same weights on all processes, crops and their latents, drop-out, learning rates,
    stopping and going on, numbers that are not finite.
    """
    from ldm.cli.selftest import check_training

    check_training(folder, precision)


@app.command()
def bench(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A model, or a family to try with random weights.")] = (
        "emoji"
    ),
    size: Annotated[str | None, typer.Option(help="Pixels, WxH; by default the model's own.")] = None,
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 1,
    steps: Annotated[int, typer.Option(help="Of each image; the median one counts.")] = 4,
    rounds: Annotated[int, typer.Option(help="Calls of each side, after one that warms up.")] = 5,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; by default what the device is good at.")
    ] = None,
    rival_dtype: Annotated[str | None, typer.Option(help="Likewise, of the others; by default the same.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; by default the best there is.")] = None,
    against: Annotated[
        str, typer.Option(help="Separated by commas: diffusers, channels-last, compiled, openvino, plain (ours).")
    ] = "diffusers",
    compile: Annotated[bool, typer.Option("--compile", help="Compile ours.")] = False,
    quantize: Annotated[str | None, typer.Option(help="Of ours: int8, int8-weights or fp8.")] = None,
    cold: Annotated[bool, typer.Option("--cold", help="New processes too, from the command to the image.")] = False,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="JSON with all numbers.")] = None,
) -> None:
    """Measure how fast images are made, beside diffusers with the same weights."""
    from ldm.bench.command import measure
    from ldm.bench.options import BenchOptions

    measure(
        BenchOptions(
            source, size=size, batch=batch, steps=steps, rounds=rounds, dtype=dtype, rival_dtype=rival_dtype,
            device=device, against=against, compile=compile, quantize=quantize, cold=cold, out=out,
        )
    )  # fmt: skip


@app.command("eval")
def evaluate(
    sources: Annotated[list[str], typer.Argument(metavar="A [B]", help="Models, or folders of images, one or two.")],
    data: Annotated[
        str | None, typer.Option(help="Images to compare with, whose captions are prompts: a folder, shards.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Separated by commas: fid, sfid, kid, is, precision, recall, density, coverage; fd-clip, cmmd, "
            "clip-score, r-precision; memorisation; rfid, psnr, ssim, lpips (autoencoder)."
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Images of each; by default one for each caption.")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts, one a line, in place of captions.")
    ] = None,
    training: Annotated[str | None, typer.Option(help="Training images, to look for copies of them.")] = None,
    features: Annotated[
        str, typer.Option(help="Network for FID and the like: inception[:FILE], or clip:… as for --clip.")
    ] = "inception",
    clip: Annotated[
        str | None, typer.Option(help="Network for prompts: clip:NAME@WEIGHTS of open_clip, or clip:FOLDER of ours.")
    ] = None,
    copies: Annotated[str, typer.Option(help="Network that knows images again: sscd[:FILE].")] = "sscd",
    lpips: Annotated[str, typer.Option(help="Backbone of LPIPS, alex or vgg16, or a file of its weights.")] = "alex",
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=V,V", help="Also with these values: guidance=1,3,5, steps=10,20.")
    ] = None,
    both: Annotated[
        list[str] | None, typer.Option("--with", metavar="KEY=VALUE", help="How images are made, such as steps=20.")
    ] = None,
    with_a: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Likewise, of the first alone.")] = None,
    with_b: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Likewise, of the second.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first image; the others have the numbers after it.")] = 0,
    batch: Annotated[int, typer.Option(help="Images made at a time.")] = 8,
    out: Annotated[
        str, typer.Option(help="A folder for images and report; the same one again goes on.")
    ] = "evaluation",
    cache: Annotated[str | None, typer.Option(help="Folder for what is found in reference images.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; by default the best there is.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print report.json in place of tables.")] = False,
) -> None:
    """Say how good images are, with intervals, and which of two models is better: ldm eval A B --data FOLDER.

    The report is OUT/report.html and OUT/report.json. On several GPUs: accelerate launch -m ldm eval ...
    """
    from ldm.cli.evaluate import EvaluateOptions, evaluate_sources

    evaluate_sources(
        EvaluateOptions(
            sources=sources, data=data, metrics=metrics, n=n, prompts=prompts, training=training, features=features,
            clip=clip, copies=copies, lpips=lpips, sweeps=sweep or (),
            settings={"both": both or (), "A": with_a or (), "B": with_b or ()}, seed=seed, batch=batch, out=out,
            cache=cache, device=device, as_json=json,
        )
    )  # fmt: skip


def main() -> None:
    """Run the command line; the only place where errors become messages."""
    interrupted: list[int] = []  # remembered, because a library may turn the exception into another one

    def interrupt(number: int, _: object) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    def unraisable(lost: Any) -> None:
        """Repeat a signal that arrived in a callback, where Python drops exceptions; report all else as usual."""
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(lost)
        elif interrupted:
            again = threading.Timer(0.05, os.kill, (os.getpid(), interrupted[-1]))
            again.daemon = True
            again.start()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    sys.unraisablehook = unraisable
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may not know arrows, or the bytes of a file's name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
        sys.stdout.flush()
    except BaseException as error:
        if interrupted:
            _fail("interrupted", 128 + interrupted[0])
        if isinstance(error, LdmError):
            _fail(str(error), 1)
        if isinstance(error, MemoryError):
            _fail("out of memory", 1)
        if isinstance(error, OSError):  # of the output: everything else is caught where it happens
            with contextlib.suppress(OSError):  # what is left of it would fail once more at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # its reader has gone: so do we, without a word
                sys.exit(141)
            _fail(f"the output cannot be written: {error.strerror or error}", 1)
        raise


def _fail(message: str, code: int) -> NoReturn:
    print(f"ldm: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
