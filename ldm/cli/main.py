"""The command `ldm`. Data goes to stdout, progress and messages to stderr; bad input gets one line and exit code 1.

Commands import what they need when they run, so that `ldm --help` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

import ldm
from ldm.errors import LdmError

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
    from ldm.cli import info as command

    command.run(source, json, verify, family, variant, revision, component or [], allow_pickle)


@app.command()
def convert(
    source: Source,
    dest: Annotated[str, typer.Argument(help="A folder to write, or a single file if it ends in .safetensors.")],
    dtype: Annotated[str | None, typer.Option(help="Convert the weights: fp32, fp16 or bf16.")] = None,
    as_variant: Annotated[str | None, typer.Option(help="Put a variant into the names of a folder's weights.")] = None,
    shard_size: Annotated[str, typer.Option(help="Split a folder's larger files, such as 5GB or 500MB.")] = "10GB",
    force: Annotated[bool, typer.Option("--force", help="Replace the destination if it exists.")] = False,
    family: FamilyOption = None,
    variant: Variant = None,
    revision: Revision = None,
    component: Replace = None,
    allow_pickle: Pickle = False,
) -> None:
    """Write a model in another layout or type: folder to single file, single file to folder, fp32 to fp16."""
    from ldm.cli import convert as command

    command.run(
        source, dest, dtype, as_variant, shard_size, force, family, variant, revision, component or [], allow_pickle
    )


def main() -> None:
    """Run the command line; the only place where errors become messages."""
    interrupted: list[int] = []  # remembered, because a library may turn the exception into another one

    def interrupt(number: int, _: object) -> None:
        interrupted.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        app()
    except BaseException as error:
        if interrupted:
            _fail("interrupted", 130)
        if isinstance(error, LdmError):
            _fail(str(error), 1)
        if isinstance(error, MemoryError):
            _fail("out of memory", 1)
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone: so do we, without a word
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        raise


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    printable = "".join(c if c.isprintable() else "?" for c in line)
    print(f"ldm: {printable}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
