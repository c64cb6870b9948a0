"""Axes of a comparison: how they are written, what their cells are, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from ldm.cli.evaluate_options import sweep_of
from ldm.cli.options import with_axes
from ldm.errors import LdmError
from pipelines.axes import DERIVED, cells, given_axes, parsed_axes, values_of
from pipelines.settings import SETTINGS, at, find


@pytest.mark.parametrize(
    ("text", "labels", "values"),
    [
        ("steps=10,20", ["steps 10", "steps 20"], [{"steps": 10}, {"steps": 20}]),
        ("cfg-scale=1, 3.5", ["guidance 1", "guidance 3.5"], [{"guidance": 1.0}, {"guidance": 3.5}]),
        ("sampler=DPM++ 2M Karras", ["scheduler DPM++ 2M Karras"], [{"scheduler": "dpm++2m", "spacing": "karras"}]),
        ("size=64,64x96", ["size 64", "size 64x96"], [{"width": 64, "height": 64}, {"width": 64, "height": 96}]),
        ('prompt="a fox, oil",a cat', ["a fox, oil", "a cat"], [{"prompt": "a fox, oil"}, {"prompt": "a cat"}]),
        ("negative=,blurry", ["negative: ", "negative: blurry"], [{"negative": ""}, {"negative": "blurry"}]),
        ('interval="0.1,0.9","0,1"', ["interval 0.1,0.9", "interval 0,1"],
         [{"interval": (0.1, 0.9)}, {"interval": (0.0, 1.0)}]),
        ("model=dir/a,dir/b", ["model a", "model b"], [{"source": "dir/a"}, {"source": "dir/b"}]),
        ("model=a/x,b/x", ["model a/x", "model b/x"], [{"source": "a/x"}, {"source": "b/x"}]),
        ("lora=a:1,b", ["LoRA a:1", "LoRA b"], [{"adapters": (("a", 1.0),)}, {"adapters": (("b", 1.0),)}]),
        ("S/R=fox,cat", ["fox", "cat"], [{"replace": "fox"}, {"replace": "cat"}]),
        ("lora-weight=0,0.5", ["LoRA weight 0", "LoRA weight 0.5"], [{"lora_weight": 0.0}, {"lora_weight": 0.5}]),
    ],
)  # fmt: skip
def test_an_axis(text: str, labels: list[str], values: list[dict[str, Any]]) -> None:
    (axis,) = parsed_axes([text])
    assert (list(axis.labels), list(axis.values)) == (labels, values)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["steps"], "--xy 'steps': write NAME=VALUE,VALUE, such as steps=10,20"),
        (["steps="], "--xy 'steps=': write NAME=VALUE"),
        (["=3"], "--xy '=3': write NAME=VALUE"),
        (["stepps=1"], "--xy stepps is not known; did you mean steps"),
        (["steps=1,x"], "--xy steps 'x': a whole number from 1"),
        (["steps=1,"], "--xy steps=1,: a value is empty"),
        (["model=,emoji"], "--xy model=,emoji: a value is empty"),
        (["sampling-steps=1,0"], "--xy sampling-steps 0: a whole number from 1"),
        (["lora=a:x:y"], "--xy lora 'a:x:y': "),
        (["steps=3,3"], "--xy steps: each value once, not 3, 3"),
        (["steps=1", "seed=1", "guidance=1,2"], "one for its rows; leave out guidance=1,2"),
        (["steps=1,2", "sampling-steps=3"], "--xy steps and --xy sampling-steps both set steps; leave one out"),
        (["width=64", "size=72"], "--xy width and --xy size both set width"),
        (["sampler=DPM++ 2M Karras,ddim", "spacing=karras"], "--xy sampler and --xy spacing both set spacing"),
        (["n=1,2"], "--xy n is not taken here: a cell has one image; compare seeds"),
        (["batch=1"], "--xy batch is not taken here: cells that differ in texts and seeds alone share a batch"),
        (["quick=true"], "--xy quick is not taken here: plain layers"),
        (['prompt="a'], "--xy prompt: '\"a': a value with a comma stands in double quotes"),
        (['prompt="a"b,c'], "a value with a comma stands in double quotes"),
        (["prompt=a\nb"], "the values stand in one line"),
        (["lora-weight=5000"], "--xy lora-weight 5000.0: a number from -1000 to 1000"),
    ],
)
def test_what_is_no_axis(texts: list[str], message: str) -> None:
    with pytest.raises(LdmError) as error:
        parsed_axes(texts)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no axis: name a setting and its values"),
        ({"steps": 3}, "axes: steps 3: a list of values is needed"),
        ({"prompt": "a cat"}, "axes: prompt 'a cat': a list of values is needed"),
        ({"steps": []}, r"axes: steps .*: a list of values is needed"),
        ({"steps": [1, 0]}, "steps 0: a whole number"),
        ({"seed": [[1, 2]]}, "axes: seed 1,2: a cell has one image, and so one value"),
        ({"steps": [1], "seed": [1], "guidance": [1]}, "leave out guidance"),
        ({"output": ["latents"]}, "axes: output is not known"),
    ],
)
def test_what_is_no_axis_in_python(given: dict[str, Any], message: str) -> None:
    with pytest.raises(LdmError, match=message):
        given_axes(given)


def test_labels_of_values_in_python() -> None:
    given = {"interval": [(0.1, 0.9), (0, 1)], "adapters": [{"a.safetensors": 0.5}, {}]}
    assert [axis.labels for axis in given_axes(given)] == [
        ("interval 0.1,0.9", "interval 0,1"),
        ("LoRA a.safetensors:0.5", "LoRA "),
    ]


def test_every_setting_is_an_axis_or_says_why_not() -> None:
    for row in (*SETTINGS, *DERIVED):
        if "axis" in row.closed:
            with pytest.raises(LdmError, match=row.closed["axis"]):
                find(row.name, "axis", rows=(*SETTINGS, *DERIVED))
    assert set(at("axis")) <= set(at("shell"))  # an axis is read as the option is


def test_cells_stand_row_after_row_and_columns_come_first() -> None:
    jobs = cells(parsed_axes(["steps=1,2", "seed=5,6"]), "a fox", None, {})
    assert [(job.index, dict(job.settings), job.seed) for job in jobs] == [
        (0, {"steps": 1}, 5), (1, {"steps": 2}, 5), (2, {"steps": 1}, 6), (3, {"steps": 2}, 6),
    ]  # fmt: skip
    assert {job.prompt for job in jobs} == {"a fox"}
    assert jobs[1].place == "cell steps 2, seed 5: "
    (one,) = cells(parsed_axes(["model=a"]), "a fox", 9, {})
    assert (one.settings, one.loading, one.seed) == ((), (("source", "a"),), 9)


def test_words_are_replaced_in_all_prompts() -> None:
    jobs = cells(parsed_axes(["replace=fox,cat", "negative=a bad fox,bad"]), "a fox, a fox", 1, {})
    assert [(job.prompt, dict(job.settings)["negative"]) for job in jobs] == [
        ("a fox, a fox", "a bad fox"), ("a cat, a cat", "a bad cat"), ("a fox, a fox", "bad"), ("a cat, a cat", "bad"),
    ]  # fmt: skip


def test_the_adapter_has_the_weight_of_its_cell() -> None:
    jobs = cells(parsed_axes(["lora-weight=0,0.5"]), "a fox", 1, {"adapters": (("style", 1.0),)})
    assert [dict(job.settings)["adapters"] for job in jobs] == [(("style", 0.0),), (("style", 0.5),)]


@pytest.mark.parametrize(
    ("texts", "prompt", "base", "message"),
    [
        (["steps=1"], None, {}, "no prompt: give one, or an axis prompt="),
        (["prompt=a,b"], "c", {}, "--xy prompt: prompt is given besides the axis; leave one out"),
        (["seed=1,2"], "c", {}, "--xy seed: seed is given besides the axis"),
        (["size=64,72"], "c", {"width": 64, "steps": 2}, "--xy size: width is given besides the axis"),
        (["model=a,b"], "c", {"source": "a"}, "--xy model: source is given besides the axis"),
        (["replace=dog,cat"], "a fox", {}, "--xy replace 'dog': the prompts do not have it; the first value is what"),
        (["lora-weight=1"], "a fox", {}, "the axis lora_weight needs one adapter .*, and has 0"),
        (["lora-weight=1"], "a", {"adapters": (("a", 1.0), ("b", 1.0))}, "and has 2"),
    ],
)
def test_what_has_no_cells(texts: list[str], prompt: str | None, base: dict[str, Any], message: str) -> None:
    with pytest.raises(LdmError, match=message):
        cells(parsed_axes(texts), prompt, 1, base)


def test_words_after_the_option_are_axes_too() -> None:
    assert with_axes(["a", "--xy", "x=1", "y=2,3", "b=no", "--out", "z=4"]) == [
        "a", "--xy", "x=1", "--xy", "y=2,3", "--xy", "b=no", "--out", "z=4",
    ]  # fmt: skip
    assert with_axes(["--xy=x=1", "y=2", "a fox", "z=3"]) == ["--xy=x=1", "--xy", "y=2", "a fox", "z=3"]
    assert with_axes(["--xy", "x=1", "--", "y=2"]) == ["--xy", "x=1", "--", "y=2"]


def test_values_with_commas_stand_in_quotes_in_a_sweep_too() -> None:
    assert values_of('a, "b, c","say ""d"""') == ["a", "b, c", 'say "d"']
    assert sweep_of('interval="0.1,0.9","0,1"') == ("interval", ((0.1, 0.9), (0.0, 1.0)))
    assert sweep_of("guidance=1, 3") == ("guidance", (1, 3))
    with pytest.raises(LdmError, match="write KEY=VALUE,VALUE"):
        sweep_of('guidance="1,3')
