"""Condition images by networks of transformers: depth, normals, pose, segments; each by Hub name or folder.

transformers has no pipelines for normals and poses. Normals are those of the depth map; poses are those that ViTPose
finds in the boxes of a detector of people.

H×W height and width of an image
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldm.errors import LdmError, first_line

log = logging.getLogger(__name__)

DEPTH, POSE, SEGMENTS = (
    "depth-anything/Depth-Anything-V2-Small-hf", "PekingU/rtdetr_r50vd_coco_o365+usyd-community/vitpose-base-simple",
    "openmmlab/upernet-convnext-small",
)  # fmt: skip
_DISTANCES = ("depth_pro", "glpn", "zoedepth")  # networks that give distances; the others give their inverse
_FAR = 0.4  # of the depth map: what is farther away is a plane in the map of normals
_FLAT = 2 * np.pi  # the third coordinate of normals before they have length 1: higher is flatter
_RANGE = 32.0  # of DPT's depths, for which the two numbers above were chosen
# ADE20K's colours of its 150 classes (Zhou et al. 2017), three bytes each, on which ControlNets were trained
_COLOURS = bytes.fromhex(
    "787878b4787806e6e650323204c8037878508c8c8ccc05ffe6e6e604fa07e005ffebff0796053d78784608ff33ff06528fff8cccff04"
    "ff3307cc46030066c83de6faff06330b66ffff0747ff09e00907e6dcdcdcff095c7009ff08ffd607ffe0ffb8060aff47ff290a07ffff"
    "e0ff086608ffff3d06ffc207ff7a0800ff14ff0829ff05990633ffeb0cffa0961400a3ff8c8c8cfa0a0f14ff001fff00ff1f00ffe000"
    "99ff000000ffff470000ebff00adff1f00ff0bc8c8ff520000fff5003dff00ff7000ff85ff0000ffa300ff6600c2ff00008fff33ff00"
    "0052ff00ff2900ffad0a00ffadff0000ff99ff5c00ff00ffff00f5ff0066ffad00ff0014ffb8b8001fff00ff3d0047ffff00cc00ffc2"
    "00ff52000aff0070ff3300ff00c2ff007aff00ffa3ff990000ff0aff70008fff005200ffa3ff00ffeb0008b8aa8500ff00ff5cb800ff"
    "ff001f00b8ff00d6ffff00705cff0000e0ff70e0ff46b8a0a300ff9900ff47ff00ff00a3ffcc00ff008f00ffeb85ff00ff00ebf500ff"
    "ff007afff5000abed4d6ff0000ccff1400ffffff000099ff0029ff00ffcc2900ff29ff00ad00ff00f5ff4700ff7a00ff00ffb8005cff"
    "b8ff000085ffffd60019c2c266ff005c00ff"
)
# OpenPose's points, by the numbers of COCO's that ViTPose gives; the neck (1) lies between the shoulders
_POINTS = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
_SURE = 0.3  # the least confidence of a point that is drawn
_STICK = 4  # pixels, half the width of a limb in an image of 512 pixels, and the radius of a point


@lru_cache(maxsize=2)
def _pipeline(task: str, model: str) -> Any:
    """The pipeline of transformers for a task, on the CPU.

    Raises:
        LdmError: the model cannot be opened, or is for another task.
    """
    import transformers

    make: Any = transformers.pipeline
    try:
        made = make(task, model=model, device="cpu", model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unusable(model, f"a model for {task}", first_line(error)) from None
    name = type(made.model).__name__
    if task.split("-")[-1].capitalize() not in name:  # a network of another task only makes transformers log an error
        raise _unusable(model, f"a model for {task}", f"it is a {name}")
    return made


def _unusable(model: str, what: str, reason: str) -> LdmError:
    return LdmError(
        f"{model} cannot be opened as {what} ({reason}); name a folder or a model on the Hub that is one "
        "(model=, --model)"
    )


@lru_cache
def check_network(model: str) -> None:
    """Raise unless the configurations of a kind's networks (NETWORK, or DETECTOR+NETWORK) are here or on the Hub.

    Raises:
        LdmError: one cannot be read.
    """
    from transformers import AutoConfig

    for name in model.split("+"):
        try:
            AutoConfig.from_pretrained(name)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise LdmError(
                f"{name}, which makes condition images, cannot be read ({first_line(error)}); connect to the Hub, "
                "or give a condition image that is made already (control=, --control image=FILE)"
            ) from None


def depth(image: Image.Image, model: str = DEPTH) -> Image.Image:
    """The depth map: near is bright.

    Raises:
        LdmError: the model cannot be opened.
    """
    return Image.fromarray((255 * _depth(image, model)).round().astype(np.uint8)).convert("RGB")


def _depth(image: Image.Image, model: str) -> np.ndarray:
    """The depth (H, W), from 0, far, to 1, near."""
    estimate = _pipeline("depth-estimation", model)
    found: Any = np.asarray(estimate(image)["predicted_depth"], np.float32).squeeze()
    config = estimate.model.config
    if getattr(config, "depth_estimation_type", "") == "metric" or config.model_type in _DISTANCES:
        found = 1 / np.maximum(found, 1e-6)
    if found.shape != (image.height, image.width):
        found = np.asarray(Image.fromarray(found).resize(image.size, Image.Resampling.BICUBIC))
    low, high = found.min(), found.max()
    return (found - low) / (high - low) if high > low else np.zeros_like(found)


def normal(image: Image.Image, model: str = DEPTH) -> Image.Image:
    """The normals of the depth map, as colours.

    Raises:
        LdmError: the model cannot be opened.
    """
    from scipy.ndimage import sobel

    near = _depth(image, model)
    x, y = (np.where(near < _FAR, 0, sobel(near * _RANGE, axis, mode="mirror")) for axis in (1, 0))
    vectors = np.stack([x, y, np.full_like(x, _FLAT)], axis=-1)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return Image.fromarray((vectors * 127.5 + 127.5).clip(0, 255).astype(np.uint8))


def seg(image: Image.Image, model: str = SEGMENTS) -> Image.Image:
    """The segments, in the colours of ADE20K's classes.

    Raises:
        LdmError: the model cannot be opened, or has other classes than ADE20K.
    """
    segment = _pipeline("image-segmentation", model)
    numbers = segment.model.config.label2id
    if len(numbers) * 3 > len(_COLOURS):
        raise LdmError(f"{model} has {len(numbers)} classes; one with the 150 classes of ADE20K is needed (--model)")
    colours = np.frombuffer(_COLOURS, np.uint8).reshape(-1, 3)
    pixels = np.zeros((image.height, image.width, 3), np.uint8)
    for part in segment(image, subtask="semantic"):
        pixels[np.asarray(part["mask"]) > 0] = colours[numbers[part["label"]]]
    return Image.fromarray(pixels)


@lru_cache(maxsize=2)
def _pose_network(model: str) -> tuple[Any, Any]:
    from transformers import AutoImageProcessor, AutoModelForPoseEstimation

    try:
        network = AutoModelForPoseEstimation.from_pretrained(model, use_safetensors=True)
        return AutoImageProcessor.from_pretrained(model), network
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _unusable(model, "a network for poses", first_line(error)) from None


def pose(image: Image.Image, model: str = POSE) -> Image.Image:
    """The poses of people, drawn as OpenPose does; without a person, black.

    `model` is DETECTOR+NETWORK, or a network alone, for which one person fills the image.

    Raises:
        LdmError: a model cannot be opened, or does not give COCO's 17 points.
    """
    import torch

    detector, _, name = model.rpartition("+")
    processor, network = _pose_network(name)
    boxes = _people(image, detector) if detector else [[0.0, 0.0, float(image.width), float(image.height)]]
    if not boxes:
        log.warning("no person was found for the kind pose of condition images: the condition image is black")
        return skeletons(image.size, [])
    with torch.inference_mode():
        inputs = processor(image, boxes=[boxes], return_tensors="pt")
        if getattr(network.config.backbone_config, "num_experts", 1) > 1:  # ViTPose++: the first expert is COCO's
            inputs["dataset_index"] = torch.zeros(len(boxes), dtype=torch.int64)
        (found,) = processor.post_process_pose_estimation(network(**inputs), boxes=[boxes])
    people = [(one["keypoints"].numpy(), one["scores"].numpy().reshape(-1)) for one in found]
    count = len(people[0][0])
    if count != 17:
        raise LdmError(f"{name} gives {count} points; one that gives COCO's 17 is needed (--model)")
    return skeletons(image.size, people)


def _people(image: Image.Image, detector: str) -> list[list[float]]:
    """The boxes of people: left, top, width and height of each."""
    found = [one["box"] for one in _pipeline("object-detection", detector)(image) if one["label"] == "person"]
    return [[box["xmin"], box["ymin"], box["xmax"] - box["xmin"], box["ymax"] - box["ymin"]] for box in found]


def skeletons(size: tuple[int, int], people: Sequence[tuple[np.ndarray, Sequence[float] | np.ndarray]]) -> Image.Image:
    """An image of this size with the skeletons of COCO's points (17, 2), those whose scores (17,) are high enough."""
    drawn = Image.new("RGB", size)
    draw, stick = ImageDraw.Draw(drawn), max(1.0, _STICK * min(size) / 512)
    neck = (5, 6)  # of COCO's points
    colours = [_rainbow(number) for number in range(len(_POINTS))]
    for points, scores in people:
        sure = [all(scores[at] >= _SURE for at in (neck if number is None else (number,))) for number in _POINTS]
        places = [points[list(neck)].mean(axis=0) if number is None else points[number] for number in _POINTS]
        for number, (start, end) in enumerate(_LIMBS):
            if sure[start] and sure[end]:
                colour = tuple(int(0.6 * part) for part in colours[number])
                draw.polygon(_limb(places[start], places[end], stick), fill=colour)
        for place, colour, there in zip(places, colours, sure, strict=True):
            if there:
                draw.ellipse([*(place - stick), *(place + stick)], fill=colour)
    return drawn


def _rainbow(number: int) -> tuple[int, int, int]:
    """OpenPose's colour of a point or limb: hues in steps of 20 degrees, from red on."""
    part, rest = divmod(number, 3)
    up, corners = 85 * rest, ((255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255))
    start, end = corners[part % 6], corners[(part + 1) % 6]
    return tuple(a + (b > a) * up - (b < a) * up for a, b in zip(start, end, strict=True))  # type: ignore[return-value]


def _limb(start: np.ndarray, end: np.ndarray, stick: float) -> list[tuple[float, float]]:
    """The corners of an ellipse from one point to another."""
    middle, along = (start + end) / 2, (end - start) / 2
    across = np.array([-along[1], along[0]]) / max(float(np.linalg.norm(along)), 1e-6) * stick
    angles = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    return [tuple(middle + np.cos(angle) * along + np.sin(angle) * across) for angle in angles]
