"""Forms (multipart/form-data, RFC 7578): their files and texts in memory, and texts as the values of a JSON object."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ldm.errors import LdmError
from pipelines.settings import at

MOST = 256  # parts of a form
HEADERS = 8  # of a part
TEXT = 2**16  # bytes of a text
NUMBER = re.compile(r"-?\d{1,20}(\.\d{1,20})?([eE][+-]?\d{1,3})?")
NAME = re.compile(r"([^\[\]]{1,100})(?:\[([^\[\]]{0,300})\])?")  # name, name[] of a list, name[key] of an object


@dataclass
class UploadedForm:
    """The parts of a form, in their order."""

    texts: list[tuple[str, str]] = field(default_factory=list)
    files: list[tuple[str, bytes]] = field(default_factory=list)


@dataclass
class _Part:
    """A part while it is read."""

    header: bytes = b""  # the name of the present header
    value: bytes = b""
    disposition: bytes = b""
    name: str = ""
    is_file: bool = False
    data: bytearray = field(default_factory=bytearray)


def read_form(body: bytes, content_type: str) -> UploadedForm:
    """The form of a request with that header Content-Type.

    Raises:
        LdmError: it is none, is not whole, or has too many parts, or a part no name or a text that is too long.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind.lower() != b"multipart/form-data" or not boundary:
        raise LdmError("a form is needed: Content-Type: multipart/form-data, with a boundary")
    if body.count(b"--" + boundary) > MOST + 1:  # before the parser, which looks at each for long
        raise LdmError(f"the form has more than {MOST} parts, or its boundary within them")
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks(), max_header_count=HEADERS)  # type: ignore[arg-type]
        parser.write(body)
    except FormParserError:
        raise LdmError("the form is damaged") from None
    if not reader.whole:
        raise LdmError("the form ends before its last part does")
    return reader.form


class _Reader:
    """What the parser tells about a form."""

    def __init__(self) -> None:
        self.form, self.part, self.whole = UploadedForm(), _Part(), False

    def callbacks(self) -> dict[str, Any]:
        """The functions that the parser calls."""
        names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data",
                 "part_end", "end")  # fmt: skip
        return {f"on_{name}": getattr(self, f"_{name}") for name in names}

    def _part_begin(self) -> None:
        self.part = _Part()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self.part.header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self.part.value += data[start:end]

    def _header_end(self) -> None:
        if self.part.header.lower() == b"content-disposition":
            self.part.disposition = self.part.value
        self.part.header = self.part.value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self.part.disposition)
        self.part.name = _decoded(options.get(b"name", b""), "the name of a part")
        self.part.is_file = b"filename" in options
        if not self.part.name:
            raise LdmError("a part of the form has no name")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self.part.data += memoryview(data)[start:end]
        if not self.part.is_file and len(self.part.data) > TEXT:
            raise LdmError(f"{self.part.name[:100]}: a text of a form has at most {TEXT:,} bytes")

    def _part_end(self) -> None:
        name = self.part.name
        if self.part.is_file:
            self.form.files.append((name, bytes(self.part.data)))
        else:
            self.form.texts.append((name, _decoded(bytes(self.part.data), name[:100])))
        self.part.data = bytearray()

    def _end(self) -> None:
        self.whole = True


def _decoded(data: bytes, called: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise LdmError(f"{called} is not UTF-8") from None


# --- texts as values --------------------------------------------------------------------------------------------------


def values_of(form: UploadedForm, texts: Collection[str]) -> dict[str, Any]:
    """The texts of a form as the values that JSON would have; those named in `texts` stay as they are.

    `name[key]` is a value of an object, `name[]` a part of a list. The schema of a setting says whether its values
    may be texts; others are numbers, true or false if they look like it.

    Raises:
        LdmError: a name has another form, or comes twice.
    """
    found: dict[str, Any] = {}
    for called, text in form.texts:
        match = NAME.fullmatch(called)
        if match is None:
            raise LdmError(f"{called[:100]!r}: the name of a value is name, name[] or name[key]")
        name, key = match[1], match[2]
        value = text if name in texts or _is_text(name, key is not None) else _plain(text)
        inner: Any = [] if key == "" else {}
        if key is not None and not isinstance(held := found.setdefault(name, inner), type(inner)):
            raise LdmError(f"{name}: the form has it as a {type(held).__name__} and as {called!r}")
        if (key is None and name in found) or (key and key in found[name]):
            raise LdmError(f"{called!r}: the form has it twice")
        if key is None:
            found[name] = value
        elif key == "":
            found[name].append(value)
        else:
            found[name][key] = value
    return found


def _is_text(name: str, part: bool) -> bool:
    """Whether values of a setting of that name may be texts; of parts of lists and objects, whether they must be."""
    plain = name.replace("-", "_")
    row = next((row for row in at("http").values() if plain in (row.name, *row.names)), None)
    types = set() if row is None else set(_types(row.kind.schema))
    return types == {"string"} if part else "string" in types


def _types(schema: Mapping[str, Any]) -> Iterator[str]:
    """The types of values that a JSON Schema allows, or allows within lists and objects."""
    inner = [schema.get("items"), schema.get("additionalProperties"), *schema.get("anyOf", ())]
    parts = [part for part in inner if isinstance(part, Mapping)]
    for part in parts:
        yield from _types(part)
    if not parts:
        yield schema.get("type", "")


def _plain(text: str) -> Any:
    """A number, true, false or null if a text is one; else the text."""
    if NUMBER.fullmatch(text):
        return int(text) if text.lstrip("-").isdecimal() else float(text)
    return {"true": True, "false": False, "null": None}.get(text, text)
