"""The order of the code: lengths, names with one meaning, the word image, no circles, a readable U-Net."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

import pytest
import tiny
import torch
from modules import ROOT, imports, parsed
from networks import inputs

CODE = [path for top in ("ldm", "pipelines", "tools") for path in sorted((ROOT / top).rglob("*.py"))]
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in CODE}
TEXTS = (".py", ".md", ".toml", ".yaml", ".jinja", ".cpp", ".h")
RECORDED = ("benchmarks/emoji/", "tests/recorded/", "ldm/builtin/")  # data, and vocabularies
LONGEST_FUNCTION = 60  # lines
LONGEST_CLASS = 250


def lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def too_long() -> Iterator[tuple[str, int]]:
    for path in CODE:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                longest = LONGEST_CLASS
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                longest = LONGEST_FUNCTION
            else:
                continue
            if lines(node) > longest:
                yield f"{path.relative_to(ROOT)} {node.name}", lines(node)


def test_functions_and_classes_are_short() -> None:
    wrong = dict(too_long())
    assert not wrong, f"longer than {LONGEST_FUNCTION} lines (functions) or {LONGEST_CLASS} (classes): {wrong}"


def test_a_class_name_has_one_meaning() -> None:
    places: defaultdict[str, list[str]] = defaultdict(list)
    for module, path in MODULES.items():
        for node in parsed(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module)
    wrong = {name: found for name, found in places.items() if len(found) > 1}
    assert not wrong, f"one name, several classes: {wrong}"


def test_every_module_says_what_it_is() -> None:
    wrong = [str(path.relative_to(ROOT)) for path in CODE if not ast.get_docstring(parsed(path))]
    assert not wrong, f"without a docstring: {wrong}"


def test_the_word_is_image() -> None:
    word = "pic" + "ture"
    old = f"{word}s.json"  # a file in the folders of runs that earlier versions began
    tops = [ROOT / top for top in ("ldm", "pipelines", "tools", "tests", "configs", "docs", "benchmarks")]
    files = [*ROOT.glob("*"), *(path for top in tops for path in top.rglob("*"))]
    names = {path: str(path.relative_to(ROOT)) for path in files if path.is_file()}
    wrong = [
        name
        for path, name in names.items()
        if not name.startswith(RECORDED)
        and (
            word in name.lower()
            or (path.suffix in TEXTS and word in path.read_text(encoding="utf-8").lower().replace(old, ""))
        )
    ]
    assert not wrong, f"say image, not {word}: {wrong}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    """Imports within functions count too; those of the package itself, `ldm`, are made when a name is asked for."""
    graph: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        if not module.startswith("tools"):
            found = {name for name, _ in imports(path) if name in MODULES} - {module, "ldm"}
            # `from package import module` is about the module
            graph[module] = {name for name in found if not any(other.startswith(f"{name}.") for other in found)}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_a_pass_of_the_unet_is_short() -> None:
    """All functions of the project that it runs: their statements, without signatures and docstrings."""
    ran: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(ROOT / "ldm")):
            ran.add(frame.f_code)

    for name in ("sd15", "sdxl"):
        unet = tiny.model(name).unet
        x, t, cond = inputs(unet, torch.float32)
        sys.setprofile(note)
        try:
            with torch.inference_mode():
                unet(x, t, cond)
        finally:
            sys.setprofile(None)
    places = {(Path(code.co_filename), code.co_firstlineno) for code in ran}
    count = branches = 0
    for path in {path for path, _ in places}:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef) and (path, node.lineno) in places:
                body = node.body[ast.get_docstring(node) is not None :]
                count += (body[-1].end_lineno or 0) - body[0].lineno + 1
                branches += sum(isinstance(part, ast.If | ast.IfExp) for part in ast.walk(node))
    files = {path for path, _ in places}
    assert count <= 80 and branches <= 5 and len(files) <= 3, (count, branches, files)
