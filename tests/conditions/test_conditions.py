"""Condition images: filters against their definitions, networks of transformers with random weights, wrong input."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import transformers
from commands import run
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from ldm.cli.main import app
from ldm.conditions import filters, networks
from ldm.conditions.table import KINDS, condition
from ldm.errors import LdmError

SIZE = (96, 72)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """Smooth colours with a black ring."""
    x, y = np.meshgrid(np.linspace(120, 250, SIZE[0]), np.linspace(150, 250, SIZE[1]))
    drawn = Image.fromarray(np.stack([x, y, 255 - x / 2], axis=-1).astype(np.uint8))
    ImageDraw.Draw(drawn).ellipse((30, 20, 60, 50), outline="black", width=2)
    return drawn


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny networks by the kinds of condition images."""
    root = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 37}
    dpt = transformers.DPTConfig(
        **small, num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3], image_size=32, patch_size=16,
        neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16, is_hybrid=False,
    )  # fmt: skip
    segformer = transformers.SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8, 8, 16, 16], num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=16,
        num_labels=150,
    )  # fmt: skip
    backbone = transformers.VitPoseBackboneConfig(
        **small, image_size=[64, 48], patch_size=[16, 16], num_hidden_layers=2, out_indices=[2]
    )
    vitpose = transformers.VitPoseConfig(backbone_config=backbone, num_labels=17, use_simple_decoder=True)
    made = {
        "depth": (
            transformers.DPTForDepthEstimation(dpt),
            transformers.DPTImageProcessor(size={"height": 32, "width": 32}),
        ),
        "seg": (
            transformers.SegformerForSemanticSegmentation(segformer),
            transformers.SegformerImageProcessor(size={"height": 64, "width": 64}),
        ),
        "pose": (
            transformers.VitPoseForPoseEstimation(vitpose),
            transformers.VitPoseImageProcessor(size={"height": 64, "width": 48}),
        ),
    }
    for name, parts in made.items():
        for part in parts:
            part.save_pretrained(root / name)
    return {**{name: root / name for name in made}, "normal": root / "depth"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_size(kind: str, image: Image.Image, folders: dict[str, Path]) -> None:
    model = str(folders[kind]) if KINDS[kind].model else None
    made = condition(kind, image, model=model)
    assert (made.size, made.mode) == (SIZE, "RGB")
    before = image.copy()
    assert made.tobytes() == condition(kind, image, model=model).tobytes()
    assert image.tobytes() == before.tobytes()


def test_edges_are_opencvs(image: Image.Image) -> None:
    edges = cv2.Canny(np.asarray(image), 100, 200)
    assert np.array_equal(np.asarray(condition("canny", image)), np.repeat(edges[..., None], 3, axis=2))
    assert 50 < (edges > 0).sum() < 500


def test_lines_are_white_where_the_image_is_darker_than_around(image: Image.Image) -> None:
    lines, dark = np.asarray(condition("lineart", image))[..., 0], np.asarray(image).max(axis=-1) == 0
    assert lines[dark].min() > 100 and np.median(lines[~dark]) < 30
    assert not np.asarray(condition("lineart", Image.new("RGB", SIZE, "red"))).any()


def test_the_other_filters(image: Image.Image) -> None:
    pixels = np.asarray(image, float)
    assert condition("image", image) is image
    gray = np.asarray(condition("gray", image), float)
    assert np.abs(gray[..., 0] - pixels @ [0.299, 0.587, 0.114]).max() <= 1 and (np.ptp(gray, axis=-1) == 0).all()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8))
    for kind, most in (("blur", 8), ("tile", 25)):
        made = np.asarray(condition(kind, noise), float)
        assert made.std() < most and abs(made.mean() - np.asarray(noise).mean()) < 2


def test_depth_is_the_pipelines(image: Image.Image, folders: dict[str, Path]) -> None:
    theirs = transformers.pipeline("depth-estimation", model=str(folders["depth"]), device="cpu")(image)
    ours = np.asarray(condition("depth", image, model=str(folders["depth"])), float)[..., 0]
    assert np.abs(ours - np.asarray(theirs["depth"], float)).max() <= 1


class Distances:
    """A pipeline that gives distances: 1 to 4 metres, from left to right."""

    model = SimpleNamespace(config=SimpleNamespace(model_type="zoedepth"))

    def __call__(self, image: Image.Image) -> dict[str, torch.Tensor]:
        return {"predicted_depth": torch.linspace(1, 4, SIZE[0]).expand(SIZE[1], -1)}


def test_of_distances_the_inverse_is_taken(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_pipeline", lambda task, model: Distances())
    made = np.asarray(condition("depth", image))[..., 0]
    metres = np.linspace(1, 4, SIZE[0])
    assert np.abs(made - 255 * (1 / metres - 1 / 4) / (3 / 4)).max() <= 0.51


def test_normals_of_a_slope(image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    slope = np.tile(np.linspace(0, 1, SIZE[0], dtype=np.float32), (SIZE[1], 1))
    monkeypatch.setattr(networks, "_depth", lambda image, model: slope)
    normals = np.asarray(networks.normal(image)) / 127.5 - 1
    x = 8 * 32 / (SIZE[0] - 1)
    wanted = np.array([x, 0, 2 * np.pi]) / np.hypot(x, 2 * np.pi)
    assert np.abs(normals[10, 60] - wanted).max() < 0.02  # 8-bit
    assert np.abs(normals[10, 10] - [0, 0, 1]).max() < 0.02  # far away


def test_segments_have_the_colours_of_their_classes(image: Image.Image, folders: dict[str, Path]) -> None:
    model = str(folders["seg"])
    made = np.asarray(condition("seg", image, model=model))
    network = transformers.SegformerForSemanticSegmentation.from_pretrained(model)
    processor = transformers.AutoImageProcessor.from_pretrained(model)
    with torch.inference_mode():
        outputs = network(**processor(image, return_tensors="pt"))
    classes = processor.post_process_semantic_segmentation(outputs, target_sizes=[(SIZE[1], SIZE[0])])[0].numpy()
    colours = np.frombuffer(networks._COLOURS, np.uint8).reshape(150, 3)
    assert colours[[0, 1, 2, 149]].tolist() == [[120, 120, 120], [180, 120, 120], [6, 230, 230], [92, 0, 255]]
    assert np.array_equal(made, colours[classes])


def test_a_skeleton() -> None:
    points = np.full((17, 2), 200.0)
    points[[5, 6, 8, 0]] = [(300, 150), (200, 150), (200, 250), (250, 100)]  # shoulders, right elbow, nose
    scores = [0.9 if number in (0, 5, 6, 8) else 0.1 for number in range(17)]
    drawn = np.asarray(networks.skeletons((512, 512), [(points, scores), (points + 250, np.zeros(17))]))
    assert drawn[150, 250].tolist() == [255, 85, 0]  # the neck
    assert drawn[100, 250].tolist() == [255, 0, 0] and drawn[250, 200].tolist() == [255, 255, 0]
    assert drawn[150, 225].tolist() == [153, 0, 0] and drawn[200, 200].tolist() == [153, 102, 0]
    assert drawn[125, 250].any() and not drawn[300:].any()


def test_people_are_found_by_a_detector(
    image: Image.Image, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = [("person", (0, 0, 40, 72)), ("cat", (0, 0, 9, 9)), ("person", (50, 10, 90, 60))]
    found = [
        {"label": name, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))} for name, box in boxes
    ]
    monkeypatch.setattr(networks, "_pipeline", lambda task, model: lambda image: found)
    monkeypatch.setattr(networks, "_SURE", 0.0)
    drawn = []
    monkeypatch.setattr(networks, "skeletons", lambda size, people: drawn.append(people) or Image.new("RGB", size))
    condition("pose", image, model=f"a detector+{folders['pose']}")
    processor = transformers.AutoImageProcessor.from_pretrained(folders["pose"])
    network = transformers.VitPoseForPoseEstimation.from_pretrained(folders["pose"])
    coco = [[[0.0, 0.0, 40.0, 72.0], [50.0, 10.0, 40.0, 50.0]]]
    with torch.inference_mode():
        outputs = network(**processor(image, boxes=coco, return_tensors="pt"))
    for (points, _), wanted in zip(drawn[0], processor.post_process_pose_estimation(outputs, coco)[0], strict=True):
        assert np.array_equal(points, wanted["keypoints"].numpy())
    found.clear()
    condition("pose", image, model=f"a detector+{folders['pose']}")
    assert drawn[1] == [] and "no person was found" in caplog.text


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("cany", {}, "the kind 'cany' of condition images is not known; did you mean canny?"),
        ("canny", {"model": "x"}, "canny 'x': this kind of condition images needs no model"),
        (
            "inpaint",
            {},
            "inpaint: no image file holds what ControlNets read where the mask is white, -1;",
        ),
        ("depth", {"model": "."}, ". cannot be opened as a model for depth-estimation ("),
        ("pose", {"model": "."}, ". cannot be opened as a network for poses ("),
    ],
)
def test_wrong_input(
    kind: str, given: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LdmError) as error:
        condition(kind, Image.new("RGB", (8, 8)), **given)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_a_model_of_another_task(folders: dict[str, Path]) -> None:
    for kind, other in (("seg", "depth"), ("pose", "seg")):
        with pytest.raises(LdmError, match="cannot be opened as"):
            condition(kind, Image.new("RGB", (64, 64)), model=str(folders[other]))


def test_the_command(
    image: Image.Image, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    image.save("in.png")
    assert run(capsys, monkeypatch, "preprocess", "canny", "in.png", "--out", "edges.png")[:2] == (0, "edges.png\n")
    assert Image.open("edges.png").tobytes() == condition("canny", image).tobytes()
    options = ["--out", "depth.png", "--model", folders["depth"], "--size", "64x48"]
    assert run(capsys, monkeypatch, "preprocess", "depth", "in.png", *options)[0] == 0
    assert Image.open("depth.png").size == (64, 48) and "in.png is resized from 96×72 to 64×48" in caplog.text
    for arguments, message in (
        (["inpaint", "in.png", "--out", "x.png"], "(--control inpaint=FILE --mask FILE)"),
        (["canny", "gone.png", "--out", "x.png"], "gone.png does not exist"),
        (["canny", "in.png", "--out", "x.jpg"], "name a file that ends in .png"),
        (["canny", "in.png", "--out", "x.png", "--size", "big"], "--size 'big': WIDTHxHEIGHT"),
    ):
        code, _, err = run(capsys, monkeypatch, "preprocess", *arguments)
        assert code == 1 and message in err
    shown = CliRunner().invoke(app, ["preprocess", "--help"], env={"COLUMNS": "200"}).output
    listed = re.search(r"canny, lineart[^.]*", shown)
    assert listed is not None
    assert set(re.findall(r"[a-z]+", listed[0].replace("or, by a network,", ""))) == KINDS.keys() - {"image"}
    assert filters.THRESHOLDS == (100, 200)
