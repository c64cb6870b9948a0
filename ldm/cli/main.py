"""The command `ldm`. Data goes to stdout, progress and messages to stderr; bad input gets one line and exit code 1.

Commands import what they need when they run, so that `ldm --help` answers at once.
"""

from __future__ import annotations

import atexit
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
from ldm.cli.importing import importing
from ldm.cli.options import AxesCommand, FlagGroup, with_options
from ldm.errors import LdmError
from ldm.runtime.quiet import quiet
from ldm.server.limits import Limits
from pipelines.settings import LOADING, at, parsed

app = typer.Typer(
    name="ldm",
    cls=FlagGroup,
    help="Latent text-to-image diffusion: Stable Diffusion 1.x, 2.x and SDXL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --clip_skip is --clip-skip
    },
)

Source = Annotated[str, typer.Argument(help="A model folder, a checkpoint file, or a Hub name (owner/name).")]
FamilyOption = Annotated[str | None, typer.Option(help="Family of a file whose tensors do not tell: sd2 or sd2-v.")]
Variant = Annotated[str | None, typer.Option(help="Which of a folder's weights to read, such as fp16.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
Replace = Annotated[
    list[str] | None,
    typer.Option(
        "--component", help="Component from elsewhere, as NAME=PATH or NAME=HUB-NAME: unet, vae, text_encoder[_2]."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the destination if it exists.")]
ModelDest = Annotated[str, typer.Argument(help="A folder to write, or a single file if it ends in .safetensors.")]
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
    source: Annotated[
        str, typer.Argument(help="A model folder, a checkpoint file, a Hub name (owner/name), or an image.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all weights: check digests, those of the Hub too, and all numbers.")
    ] = False,
    family: FamilyOption = None,
    variant: Variant = None,
    revision: Revision = None,
    component: Replace = None,
    allow_pickle: Pickle = False,
) -> None:
    """Describe a model: family, components, types, parameters, prediction type.

    A family's name (sd15, sdxl ...) in place of a source describes the released models of that family; of an image
    (PNG, JPEG, WebP) it is told by what it was made, its watermark, and whether its C2PA manifest is right.
    """
    from ldm.cli.common import SourceOptions
    from ldm.cli.image_info import is_image, print_image

    options = SourceOptions(family, variant, revision, tuple(component or ()), allow_pickle)
    if is_image(source):
        print_image(source, json, verify, options)
        return
    from ldm.cli.info import print_description

    print_description(source, json, verify, options)


@app.command()
def convert(
    source: Source,
    dest: ModelDest,
    dtype: Annotated[str | None, typer.Option(help="Convert the weights: fp32, fp16 or bf16.")] = None,
    as_variant: Annotated[str | None, typer.Option(help="Variant in the names of a folder's files: fp16.")] = None,
    shard_size: Annotated[str | None, typer.Option(help="Largest file in a folder, such as 5GB (10GB).")] = None,
    force: Force = False,
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


adapter = typer.Typer(
    help="LoRA and other adapters: what a file is, into a model, out of two models, smaller, with other names.",
    no_args_is_help=True,
)
app.add_typer(adapter, name="adapter")
AdapterFile = Annotated[str, typer.Argument(help="An adapter's file, or a folder by peft or diffusers.")]
AdapterDest = Annotated[str, typer.Argument(help="The file to write, or a folder with --format peft.")]
Rank = Annotated[int | None, typer.Option(help="The largest rank.")]
Energy = Annotated[float | None, typer.Option(help="Share of the sum of squares to keep, such as 0.95.")]
AdapterFormat = Annotated[str, typer.Option("--format", help="kohya, diffusers, or peft (a folder).")]
AdapterModel = Annotated[
    str | None,
    typer.Option("--model", help="A model or family that the adapter fits, if its tensors do not tell."),
]
PartialAdapters = Annotated[
    bool, typer.Option("--partial-adapters", help="Use what fits of an adapter that does not fit as a whole.")
]
AdapterType = Annotated[str | None, typer.Option("--dtype", help="Type of the tensors: fp32, fp16 or bf16.")]


@adapter.command("info")
def adapter_info(
    file: AdapterFile,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    allow_pickle: Pickle = False,
) -> None:
    """Describe an adapter: kind, base model, layers, rank, alpha, trigger words, training record."""
    from ldm.cli.adapter import print_adapter

    print_adapter(file, json, allow_pickle)


@adapter.command("merge")
def adapter_merge(
    model: Source,
    dest: ModelDest,
    lora: Annotated[list[str], typer.Option("--lora", metavar="FILE[:WEIGHT]", help="An adapter; once for each.")],
    dtype: AdapterType = None,
    force: Force = False,
    partial_adapters: PartialAdapters = False,
    allow_pickle: Pickle = False,
) -> None:
    """Write a model with adapters merged into its weights."""
    from ldm.cli.adapter import merge

    merge(model, dest, lora, dtype, force, partial_adapters, allow_pickle)


@adapter.command("extract")
def adapter_extract(
    base: Source,
    tuned: Annotated[str, typer.Argument(help="A model trained from the first one.")],
    dest: AdapterDest,
    rank: Rank = None,
    energy: Energy = None,
    format: AdapterFormat = "kohya",
    dtype: AdapterType = None,
    force: Force = False,
    allow_pickle: Pickle = False,
) -> None:
    """Write the difference of two models as a LoRA, and say how much of it that keeps."""
    from ldm.cli.adapter import extract

    extract(base, tuned, dest, rank, energy, format, dtype, force, allow_pickle)


@adapter.command("resize")
def adapter_resize(
    file: AdapterFile,
    dest: AdapterDest,
    rank: Rank = None,
    energy: Energy = None,
    format: AdapterFormat = "kohya",
    model: AdapterModel = None,
    force: Force = False,
    partial_adapters: PartialAdapters = False,
    allow_pickle: Pickle = False,
) -> None:
    """Write an adapter at a smaller rank, and say how much of it that keeps."""
    from ldm.cli.adapter import resize

    resize(file, dest, rank, energy, format, model, force, partial_adapters, allow_pickle)


@adapter.command("convert")
def adapter_convert(
    file: AdapterFile,
    dest: AdapterDest,
    format: AdapterFormat,
    model: AdapterModel = None,
    dtype: AdapterType = None,
    force: Force = False,
    partial_adapters: PartialAdapters = False,
    allow_pickle: Pickle = False,
) -> None:
    """Write an adapter with the names of another format."""
    from ldm.cli.adapter import convert

    convert(file, dest, format, model, dtype, force, partial_adapters, allow_pickle)


def _of_generate_itself(
    *,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One prompt or several.")] = None,
    prompts_file: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="Prompts, one a line; or JSON lines with settings.")
    ] = None,
    other_prompts: Annotated[list[str] | None, typer.Option("--prompt", hidden=True)] = None,
    out: Annotated[str, typer.Option(help="A folder, or a .png for one image.")] = "outputs",
    sheet: Annotated[bool, typer.Option("--grid", help="Also write all images on one sheet.")] = False,
    xy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X=VALUES [Y=VALUES]",
            help="Compare: one sheet with a column and a row for each value, such as "
            "steps=10,20 guidance=1,3; model, prompt, replace=fox,cat and lora-weight, too.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each image.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and make nothing.")] = False,
) -> None:
    """The options of `ldm generate` that are no settings of images or models."""


def generate_command() -> Callable[..., None]:
    """The command `generate`, with an option for each setting."""
    settings, loading = at("shell"), at("shell", LOADING)
    del settings["prompt"]  # it is the argument, not an option

    def generate(**given: Any) -> None:
        """Make images of prompts, as PNG files with a record of how they were made."""
        from ldm.cli.generate import Options, work_of
        from pipelines.axes import parsed_axes

        options = Options(
            prompts=[*(given["prompts"] or ()), *(given["other_prompts"] or ())],
            settings=parsed(given, settings), loading=parsed(given, loading),
            prompts_file=given["prompts_file"], out=given["out"], sheet=given["sheet"], as_json=given["json"],
            dry_run=given["dry_run"], xy=parsed_axes(given["xy"]) if given["xy"] else (),
        )  # fmt: skip
        work = work_of(options)
        if not work.left and not options.dry_run:
            print(f"ldm: nothing to do: all {len(work.jobs)} images are there", file=sys.stderr)
            return
        with importing():
            from ldm.cli.making import make_images  # PyTorch, only now that there is something to make

        make_images(options, work)

    return with_options(generate, [*settings.values(), *loading.values()], _of_generate_itself)


app.command(cls=AxesCommand)(generate_command())


def _of_serve_itself(
    *,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="As --model of `ldm generate`; by default the built-in one.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; another one needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any.")] = 7860,
    api_key: Annotated[str | None, typer.Option(help="Key that requests need; or LDM_API_KEY in the environment.")] = (
        None
    ),
    hostname: Annotated[list[str] | None, typer.Option(help="Name by which requests may call this host.")] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait.")] = Limits.queue,
    max_steps: Annotated[int, typer.Option(min=1, help="Steps of a pass.")] = Limits.steps,
    max_pixels: Annotated[int, typer.Option(min=1, help="Pixels of a pass.")] = Limits.pixels,
    max_images: Annotated[int, typer.Option(min=1, help="Images of a job.")] = Limits.images,
    max_seconds: Annotated[float, typer.Option(min=1, help="Time for a job.")] = Limits.seconds,
    keep_jobs: Annotated[int, typer.Option(min=1, help="Jobs that are over and kept, to be fetched.")] = (
        Limits.kept_jobs
    ),
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time for jobs to end when it is told to stop.")] = 60.0,
    together: Annotated[
        int | None, typer.Option(min=1, help="Pixels of latents worked on at a time; 1: one image after the other.")
    ] = None,
    history: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Keep images of jobs that ask for it, and list them.")
    ] = None,
    history_most: Annotated[
        int | None, typer.Option(min=1, help="Images that the history keeps; the oldest leave. By default all.")
    ] = None,
    runs: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Show the runs of training in it, and their evaluations.")
    ] = None,
    train: Annotated[bool, typer.Option("--train", help="Let visitors train adapters; their runs go into --runs.")] = (
        False
    ),
    replicas: Annotated[
        str | None,
        typer.Option(metavar="N|MIN-MAX", help="Engines in processes of their own, by Ray Serve, on a GPU each."),
    ] = None,
    replica_jobs: Annotated[
        int, typer.Option(min=1, help="Jobs of each replica above which another one is started, up to MAX.")
    ] = 8,
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster for the replicas (HOST:PORT or auto); by default this machine.")
    ] = None,
) -> None:
    """The options of `ldm serve` that are no settings of models."""


def serve_command() -> Callable[..., None]:
    """The command `serve`, with an option for each setting of loading."""
    loading = at("shell", LOADING)
    del loading["source"]  # it is the argument, not an option

    def serve(**given: Any) -> None:
        """Make images for others over HTTP: many requests at once, in batches that they join and leave."""
        from ldm.cli.serve import ServeOptions, serve_images

        source = {} if given["model"] is None else {"source": given["model"]}
        limits = Limits(
            queue=given["queue"], steps=given["max_steps"], pixels=given["max_pixels"], images=given["max_images"],
            seconds=given["max_seconds"], kept_jobs=given["keep_jobs"],
        )  # fmt: skip
        options = ServeOptions(
            loading=source | parsed(given, loading), host=given["host"], port=given["port"], api_key=given["api_key"],
            hostnames=tuple(given["hostname"] or ()), log_prompts=given["log_prompts"],
            drain_seconds=given["drain_seconds"], most=given["together"], limits=limits, history=given["history"],
            history_most=given["history_most"], runs=given["runs"], train=given["train"],
            replicas=given["replicas"], replica_jobs=given["replica_jobs"], ray_address=given["ray_address"],
        )  # fmt: skip
        serve_images(options)

    return with_options(serve, loading.values(), _of_serve_itself)


app.command()(serve_command())


@app.command()
def repro(
    file: Annotated[
        str,
        typer.Argument(metavar="IMAGE", help="A PNG made by `ldm generate`, AUTOMATIC1111's programs or the like."),
    ],
    model: Annotated[str | None, typer.Option(help="The model that made the image, if its path has changed.")] = None,
    refiner: Annotated[str | None, typer.Option(help="The refiner, if its path has changed.")] = None,
    image: Annotated[str | None, typer.Option(help="The starting image, if its path has changed.")] = None,
    mask: Annotated[str | None, typer.Option(help="The mask, if its path has changed.")] = None,
    out: Annotated[str | None, typer.Option(help="Also write the new image, to this .png.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; by default that of the record.")] = None,
    component: Replace = None,
    lora_dir: Annotated[
        str | None, typer.Option(help="Folder of LoRA files, if their paths have changed or are not known.")
    ] = None,
    embedding: Annotated[list[str] | None, typer.Option(help="The embeddings, if their paths have changed.")] = None,
    control: Annotated[
        list[str] | None, typer.Option(help="All condition images, if their paths have changed.")
    ] = None,
    control_model: Annotated[list[str] | None, typer.Option(help="The control models, likewise.")] = None,
    image_prompt: Annotated[
        list[str] | None, typer.Option(help="All image prompts, if their paths have changed.")
    ] = None,
    image_prompt_mask: Annotated[list[str] | None, typer.Option(help="All masks of image prompts, likewise.")] = None,
    ip_adapter: Annotated[list[str] | None, typer.Option(help="The IP-Adapters, if their paths have changed.")] = None,
    image_encoder: Annotated[str | None, typer.Option(help="Their image encoder, if its path has changed.")] = None,
    safety: Annotated[str | None, typer.Option(help="The safety checker, likewise.")] = None,
    allow_pickle: Pickle = False,
) -> None:
    """Make an image, or a sheet of --xy, again from the record in it, and print how the pixels differ."""
    from ldm.cli.repro import Replacements, reproduce_image

    others = Replacements(
        model, refiner, image, mask, device, dtype, component or (), lora_dir, embedding or (), image_prompt or (),
        image_prompt_mask or (), ip_adapter or (), image_encoder, safety, allow_pickle, control or (),
        control_model or (),
    )  # fmt: skip
    reproduce_image(file, out, others)


@app.command()
def preprocess(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="canny, lineart, gray, blur, tile; or, by a network, depth, normal, pose, seg.",
        ),
    ],
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="An image file.")],
    out: Annotated[str, typer.Option(metavar="FILE", help="The condition image, a .png.")],
    model: Annotated[str | None, typer.Option(help="Folder or Hub name of another network of transformers.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels; by default the image's.")] = None,
) -> None:
    """Make a condition image for a ControlNet or T2I-Adapter of an image."""
    from ldm.cli.preprocess import preprocess_image

    preprocess_image(kind, image, out, model, size)


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
    """Train models: ldm train CONFIG.yaml KEY=VALUE ... The same command again resumes a stopped run.

    On several GPUs or machines: accelerate launch train_ldm.py CONFIG.yaml KEY=VALUE ...
    """
    from ldm.cli.train import train_models

    train_models(config, overrides or [])


@app.command("train-adapter")
def train_an_adapter(
    images: Annotated[str, typer.Argument(help="A folder of images; captions beside them (a.txt) are used.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Settings as for `ldm train`."),
    ] = None,
    model: Annotated[str, typer.Option(help="The model to adapt.")] = "emoji",
    trigger: Annotated[str, typer.Option(help="Words that call what is learned: they begin each caption.")] = "",
    class_prompt: Annotated[
        str,
        typer.Option(help="What it is without the trigger (a dog): the model first makes images of it to keep."),
    ] = "",
    kind: Annotated[str, typer.Option(help="lora, or textual-inversion: a new word, named by --trigger.")] = "lora",
    initial: Annotated[str, typer.Option(help="Words that a new word begins with, such as dog.")] = "",
    output: Annotated[str, typer.Option(help="The run's folder; the same command again resumes it.")] = "runs/adapter",
) -> None:
    """Train a LoRA: ldm train-adapter PHOTOS --model MODEL --trigger "sks dog" [KEY=VALUE ...]

    Settings are chosen for the model's family, the number of images and the free memory, and printed as those of
    `ldm train`. The result is OUTPUT/adapter/adapter.safetensors, or a file in OUTPUT/textual-inversion/embeddings, and
    beside it sheet.png: images without it and with it.
    """
    from ldm.cli.train_adapter import AdapterJob, train_adapter

    train_adapter(AdapterJob(images, model, output, kind, trigger, class_prompt, initial), overrides or [])


@app.command()
def plan(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A YAML file, as for `ldm train`.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="On top of it.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Number of devices.")] = 1,
    measure: Annotated[int, typer.Option(min=0, help="Number of real steps to time.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Forecast a run: parameters, memory (weights, gradients, optimiser, averages, activations), operations.

    Memory is predicted; operations (PFLOP) are counted.
    """
    from ldm.cli.plan import print_forecast

    print_forecast(config, overrides or [], processes, measure, json)


@app.command()
def selftest(
    folder: Annotated[str, typer.Option(help="A new folder, which all processes can see.")] = "selftest",
    precision: Annotated[str, typer.Option(help="Precision of the computation: auto, no, fp16 or bf16.")] = "no",
) -> None:
    """Check in two minutes that training works on this machine: accelerate launch -m ldm selftest.

    Gradients of every loss, the same weights on all processes, crops and their latents, conditioning dropout, learning
    rates, resuming, numbers that are not finite.
    """
    from ldm.cli.selftest import check_training

    check_training(folder, precision)


@app.command()
def bench(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A model, or a family with random weights.")] = (
        "emoji"
    ),
    size: Annotated[str | None, typer.Option(help="Size of the images, WxH; by default the model's own.")] = None,
    batch: Annotated[int, typer.Option(help="Images in a batch.")] = 1,
    steps: Annotated[int, typer.Option(help="Steps of each image; the median step is shown.")] = 4,
    rounds: Annotated[int, typer.Option(help="Measured calls of each side, after one to warm up.")] = 5,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; by default what the device is good at.")
    ] = None,
    rival_dtype: Annotated[str | None, typer.Option(help="Type of the other sides; by default the same.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; by default the best there is.")] = None,
    against: Annotated[
        str, typer.Option(help="Other sides, with commas: diffusers, channels-last, compiled, openvino, plain (ours).")
    ] = "diffusers",
    compile: Annotated[bool, typer.Option("--compile", help="Compile ours.")] = False,
    quantize: Annotated[str | None, typer.Option(help="Quantisation of our side: int8, int8-weights or fp8.")] = None,
    cold: Annotated[bool, typer.Option("--cold", help="Also time new processes, from command to image.")] = False,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="File for all numbers, as JSON.")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="FILE", help="Such a file of before: fail if ours has become slower.")
    ] = None,
) -> None:
    """Measure the speed of making images, beside diffusers with the same weights."""
    from ldm.bench.command import measure
    from ldm.bench.options import BenchOptions

    measure(
        BenchOptions(
            source, size=size, batch=batch, steps=steps, rounds=rounds, dtype=dtype, rival_dtype=rival_dtype,
            device=device, against=against, compile=compile, quantize=quantize, cold=cold, out=out,
            compare=compare,
        )
    )  # fmt: skip


@app.command("eval")
def evaluate(
    sources: Annotated[list[str], typer.Argument(metavar="A [B]", help="One or two models or folders of images.")],
    data: Annotated[
        str | None, typer.Option(help="Reference images, whose captions are the prompts: a folder or shards.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            help="Metrics, with commas: fid, sfid, kid, is, precision, recall, density, coverage; fd-clip, cmmd, "
            "clip-score, r-precision; memorisation; rfid, psnr, ssim, lpips (autoencoder)."
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Images a side; by default one for each caption.")] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help="Prompts, one a line, in place of captions.")
    ] = None,
    training: Annotated[str | None, typer.Option(help="Training images, to find copies of them.")] = None,
    features: Annotated[
        str, typer.Option(help="Network for FID and the like: inception[:FILE], or clip:… as for --clip.")
    ] = "inception",
    clip: Annotated[
        str | None, typer.Option(help="Network for CLIP score: clip:NAME@WEIGHTS of open_clip, or clip:FOLDER of ours.")
    ] = None,
    copies: Annotated[str, typer.Option(help="Network that finds copies: sscd[:FILE].")] = "sscd",
    lpips: Annotated[str, typer.Option(help="Backbone of LPIPS, alex or vgg16, or a file of its weights.")] = "alex",
    sweep: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V,V", help="Repeat with each value: guidance=1,3,5."),
    ] = None,
    both: Annotated[
        list[str] | None, typer.Option("--with", metavar="KEY=VALUE", help="Setting of the images, such as steps=20.")
    ] = None,
    with_a: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Setting of model A alone.")] = None,
    with_b: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Setting of model B alone.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the others have the numbers after it.")] = 0,
    batch: Annotated[int, typer.Option(help="Images made at a time.")] = 8,
    out: Annotated[
        str, typer.Option(help="Folder for images and report; with the same one, a stopped evaluation resumes.")
    ] = "evaluation",
    cache: Annotated[str | None, typer.Option(help="Folder for features of reference images.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda, mps or cpu; by default the best there is.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print report.json in place of tables.")] = False,
) -> None:
    """Measure the quality of images, with intervals, or compare two models: ldm eval A B --data FOLDER.

    The report is OUT/report.html and OUT/report.json. On several GPUs: accelerate launch -m ldm eval ...
    """
    from ldm.cli.evaluate_options import EvaluateOptions, check_options

    options = EvaluateOptions(
        sources=sources, data=data, metrics=metrics, n=n, prompts=prompts, training=training, features=features,
        clip=clip, copies=copies, lpips=lpips, sweeps=sweep or (),
        settings={"both": both or (), "A": with_a or (), "B": with_b or ()}, seed=seed, batch=batch, out=out,
        cache=cache, device=device, as_json=json,
    )  # fmt: skip
    check_options(options)
    with importing():
        from ldm.cli.evaluate import evaluate_sources  # PyTorch, only now that there is something to evaluate

    evaluate_sources(options)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Run the command line; here alone errors become messages."""
    interrupted: list[int] = []  # kept, because a library may turn the exception into another one

    def interrupt(number: int, _: object) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    def unraisable(lost: Any) -> None:
        """Repeat a signal that came in a callback, where Python drops exceptions; report other errors as usual."""
        if not isinstance(lost.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(lost)
        elif interrupted:
            again = threading.Timer(0.05, os.kill, (os.getpid(), interrupted[-1]))
            again.daemon = True
            again.start()

    quiet()
    for number in SIGNALS:
        signal.signal(number, interrupt)
    sys.unraisablehook = unraisable
    if isinstance(sys.stdout, io.TextIOWrapper):  # its encoding may lack arrows, or bytes of file names
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)  # typer would print its usage text, and turn an interruption into an exit
        sys.stdout.flush()
        if interrupted:
            raise KeyboardInterrupt
        sys.exit(code if isinstance(code, int) else 0)
    except BaseException as error:
        if interrupted:
            _fail("interrupted", 128 + interrupted[0])
        if isinstance(error, LdmError):
            _fail(str(error), 1)
        if isinstance(error, _UsageError):
            _fail_usage(error)
        if isinstance(error, MemoryError):
            _fail("out of memory", 1)
        if isinstance(error, OSError):  # of the output: other OSErrors are caught where they happen
            with contextlib.suppress(OSError):  # buffered output would fail again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):  # the reader has gone: exit silently
                sys.exit(141)
            _fail(f"the output cannot be written: {error.strerror or error}", 1)
        raise


_UsageError: Any = typer.BadParameter.__mro__[1]  # typer does not export it


def command() -> None:
    """`main` as a process of its own. It ends as soon as all threads and exit functions have ended.

    Python would then take all modules apart, which takes a fifth of a second with PyTorch's.
    """
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # all is done
    threading._shutdown()  # type: ignore[attr-defined]  # both as a process that multiprocessing forked does
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(0)


def _fail_usage(error: Any) -> NoReturn:
    """Say what is wrong with the arguments, and where they are described; without any arguments, print the help."""
    text, near = error.format_message(), getattr(error, "possibilities", None)
    if "\n" in text:
        print(text, file=sys.stderr)
        sys.exit(2)
    if near:
        _fail(f"{error.message}; did you mean {near[0]}?", 2)
    _fail(f"{text.rstrip('.')}; see {error.ctx.command_path} --help" if error.ctx else text, 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"ldm: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
