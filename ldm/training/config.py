"""The configuration of a run: typed, checked, documented, read from YAML and `key.sub=value` on the command line."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, create_model, field_validator
from pydantic_core import ErrorDetails

from ldm.errors import LdmError, first_line, suggestion
from ldm.training.sections import DataSection, ModelSection, Section
from ldm.training.stages.sections import SECTIONS
from ldm.training.suggestions import hint

log = logging.getLogger(__name__)
NAMES = list(SECTIONS)
Precision = Literal["auto", "no", "fp16", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # in C where PyYAML has it
NUMBERS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}  # that are computed with, by precision


def _known(name: str) -> str:
    """The name of a stage, if there is one."""
    if name not in NAMES:
        raise ValueError(f"there is no such stage; {suggestion(name, NAMES)}")
    return name


class RunSection(Section):
    """A run."""

    output: str = Field("runs/run", description="the run's folder; the same command again resumes the run")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of all random numbers")
    precision: Precision = Field(
        "no", description="precision to compute in; auto: bf16 where the device has it, else fp32; updates are in fp32"
    )
    stages: list[Annotated[str, AfterValidator(_known)]] = Field(
        ["base"], min_length=1, description="stages to train, in this order"
    )
    trackers: list[str] = Field(["tensorboard"], description="trackers that get the log too: tensorboard, wandb, …")
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()

    @field_validator("precision", mode="before")
    @classmethod
    def _no(cls, precision: Any) -> Any:
        """YAML reads a bare no as false."""
        return "no" if precision is False else precision

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: list[str]) -> list[str]:
        """Each stage starts from the one before it."""
        if stages != [name for name in NAMES if name in stages]:
            raise ValueError(f"each stage once, in the order {', '.join(NAMES)}")
        return stages


if TYPE_CHECKING:

    class Config(RunSection):
        """A run, with a section for each kind of stage."""

        def __getattr__(self, name: str) -> Any:
            """The section of a kind of stage, by its name."""

else:
    sections = {name: (section, section()) for name, section in SECTIONS.items()}
    Config = create_model("Config", __base__=RunSection, __doc__=RunSection.__doc__, __module__=__name__, **sections)


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file, with `key.sub=value` on top; values are written as in YAML.

    Raises:
        LdmError: the file cannot be read, a key is not known (the nearest one is offered), or a value does not fit.
    """
    content = _read(Path(path)) if path else {}
    given: dict[str, str] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise LdmError(f"{override!r}: write KEY=VALUE, such as base.steps=2000")
        if given.setdefault(name, text) != text:
            log.warning("%s is given twice, as %s and %s; the last one counts", name, given[name], text)
            given[name] = text
        try:
            _set(content, name.split("."), yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise LdmError(f"{override!r}: the value cannot be read: {first_line(error)}") from None
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise LdmError("; ".join(_message(problem, path) for problem in error.errors()[:3])) from None


class _OnceLoader(yaml.SafeLoader):
    """YAML in which a key that comes twice is an error: the first would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except OSError as error:
        raise LdmError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LdmError(f"{path} is not UTF-8 text") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise LdmError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise LdmError(f"{path}: keys and values are needed, not a {type(content).__name__}")
    return content


def _set(content: dict[str, Any], keys: list[str], value: Any) -> None:
    for index, key in enumerate(keys[:-1]):
        below = content.setdefault(key, {})
        if not isinstance(below, dict):
            raise LdmError(f"{'.'.join(keys)}: {'.'.join(keys[: index + 1])} is {below!r}; give it as a whole")
        content = below
    content[keys[-1]] = value


def _message(problem: ErrorDetails, path: str | Path | None) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        meant = hint(problem["loc"], _section(problem["loc"][:-1]), [name for name, _, _ in describe()])
        return f"{path or 'the configuration'}: {place} is not known; {meant}"
    return f"{path or 'the configuration'}: {place} is {problem['input']!r}: {problem['msg'].lower()}"


def _section(place: Sequence[int | str]) -> list[str]:
    """The known keys at a place of the configuration."""
    section: type[BaseModel] = Config
    for key in place:
        if isinstance(key, str) and key in section.model_fields:  # others are numbers in lists, and names of the user's
            section = (_sections(section.model_fields[key].annotation) or [section])[0]
    return list(section.model_fields)


def _sections(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for part in get_args(annotation) for found in _sections(part)]


def describe(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of a configuration: its full name, its default as YAML, and what it means."""
    for name, field in section.model_fields.items():
        below = _sections(field.annotation)
        if below and isinstance(field.annotation, type):
            yield f"{prefix}{name}", "", (below[0].__doc__ or "").splitlines()[0]
            yield from describe(below[0], f"{prefix}{name}.")
            continue
        default = field.default
        if isinstance(default, list):
            default = [item.model_dump() if isinstance(item, BaseModel) else item for item in default]
        elif isinstance(default, dict):
            default = {key: item.model_dump() if isinstance(item, BaseModel) else item for key, item in default.items()}
        yield (
            f"{prefix}{name}",
            yaml.safe_dump(default, default_flow_style=True).splitlines()[0],
            field.description or "",
        )


def dump(config: Config) -> str:
    """The whole configuration as YAML, defaults included, for the run's folder."""
    return str(yaml.dump(config.model_dump(mode="json"), Dumper=DUMPER, sort_keys=False, allow_unicode=True))
