"""Options of the command line from the rows of `pipelines.settings`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer

from pipelines.settings import COMPONENTS, FLAG, Setting


def option(row: Setting) -> Parameter:
    """A row as a parameter of a command, with a text, True or False as value; None if the option is not given.

    Components are a list of texts.
    """
    flags = f"{row.option}/--no-{row.option[2:]}" if row.default is True else row.option
    default = "" if row.default is None or row.kind is FLAG else f"  [default: {_text(row.default)}]"
    metavar = None if row.kind is FLAG else row.kind.metavar
    kind: Any = bool if row.kind is FLAG else list[str] if row.kind is COMPONENTS else str
    info = typer.Option(flags, help=row.help + default, show_default=False, metavar=metavar)
    return Parameter(row.name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info])


def _text(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def with_options(
    command: Callable[..., None], rows: Iterable[Setting], own: Callable[..., None]
) -> Callable[..., None]:
    """The command with an option for each row, and then the parameters of `own`, as typer reads them."""
    parameters = [option(row) for row in rows] + list(Signature.from_callable(own, eval_str=True).parameters.values())
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command
