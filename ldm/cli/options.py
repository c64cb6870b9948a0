"""Options of the command line from the rows of `pipelines.settings`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from pipelines.settings import FLAG, Setting

AXIS = re.compile(r"[A-Za-z][\w/-]*=")  # the beginning of a word that names an axis


class AsGiven:
    """The conversion of an option to its type, for texts, lists of texts and flags: none."""

    @staticmethod
    def coerce(value: Any, **_: Any) -> Any:
        """The value; several as a list."""
        return list(value) if isinstance(value, tuple) else value


def as_given(parameters: list[Any]) -> list[Any]:
    """Parameters of typer that stay as the command line has them.

    To convert them, typer 0.29 would import pydantic and make a schema for each, which takes longer than all else
    before PyTorch; other versions do not ask.
    """
    for parameter in parameters:
        parameter.get_runtime_param = AsGiven
    return parameters


class TextCommand(TyperCommand):
    """A command whose options are texts, lists of texts and flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        return as_given(super().get_params(ctx))


class AxesCommand(TextCommand):
    """A command whose option --xy takes the words NAME=VALUES behind its own, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, with_axes(args))


def with_axes(words: list[str]) -> list[str]:
    """The words of a command with an --xy before each NAME=VALUES that follows one."""
    found: list[str] = []
    follows = False
    for number, word in enumerate(words):
        if word == "--":
            return [*found, *words[number:]]
        axis = follows and AXIS.match(word) is not None
        found += ["--xy", word] if axis and found[-1] != "--xy" else [word]
        follows = axis or word == "--xy" or word.startswith("--xy=")
    return found


class FlagGroup(TyperGroup):
    """A group of commands whose own options are flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        return as_given(super().get_params(ctx))


def option(row: Setting) -> Parameter:
    """A row as a parameter of a command, with a text, True or False as value; None if the option is not given.

    An option that may be given several times is a list of texts.
    """
    flags = f"{row.option}/--no-{row.option[2:]}" if row.default is True else row.option
    default = "" if row.default is None or row.kind is FLAG else f"  [default: {_text(row.default)}]"
    metavar = None if row.kind is FLAG else row.kind.metavar
    kind = _type(row)
    info = typer.Option(flags, help=row.help + default, show_default=False, metavar=metavar)
    return Parameter(row.name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info])


def other_options(row: Setting) -> Iterator[Parameter]:
    """A row's other names as parameters of a command that the help does not show."""
    kind = _type(row)
    for name in row.names:
        if row.option_of(name) == row.option:
            continue
        info = typer.Option(row.option_of(name), hidden=True, show_default=False)
        yield Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info])


def _type(row: Setting) -> Any:
    """The type of a row's option."""
    return bool if row.kind is FLAG else list[str] if row.kind.joined else str


def _text(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def with_options(
    command: Callable[..., None], rows: Iterable[Setting], own: Callable[..., None]
) -> Callable[..., None]:
    """The command with options for each row and its other names, then the parameters of `own`, as typer reads them."""
    rows = tuple(rows)
    parameters = [option(row) for row in rows] + [other for row in rows for other in other_options(row)]
    parameters += Signature.from_callable(own, eval_str=True).parameters.values()
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
