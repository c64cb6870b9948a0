"""Measure how many images per second a core loads, compared with torchvision's ImageFolder.

Both decode a JPEG, resize its shorter side to the target with PIL's bicubic filter, crop at random, and make float
batches. The images are smoothed noise with about the detail of photographs, written once. One thread, no workers, CPU
seconds; passes of both alternate, and the first passes do not count.

    python tools/measure_loader.py /tmp/jpegs
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from ldm.data.framing import Framing
from ldm.data.loader import Loader
from ldm.data.plan import BatchPlan
from ldm.data.sources import open_images

BATCH = 16


def write(folder: Path, count: int, side: int) -> None:
    """Write JPEGs with about the detail of photographs, unless they exist."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:05}.jpg"
        if path.exists():
            continue
        layers = [generator.normal(0, 40 / 2**level, (side >> 5 - level, side >> 5 - level, 3)) for level in range(5)]
        image = np.full((side, side, 3), 128.0)
        for layer in layers:
            scaled = [Image.fromarray(layer[..., c].astype(np.float32)).resize((side, side)) for c in range(3)]
            image += np.stack([np.asarray(channel) for channel in scaled], axis=2)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def rate(batches: Iterable[object], count: int) -> float:
    """The images per second of one pass."""
    start = time.process_time()
    for _ in islice(batches, count // BATCH):
        pass
    return count // BATCH * BATCH / (time.process_time() - start)


def main() -> None:
    """Print the images per second of both, their spread, and all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the images")
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--side", type=int, action="append", help="side of the JPEGs in pixels; default: 512 and 2048")
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for side in options.side or [512, 2048]:
        count = options.images if side <= 512 else options.images // 4
        root = options.folder / str(side)
        write(root / "all", count, side)
        images = open_images(str(root / "all"), root / "cache", captions="optional")
        for size in (256, 512):
            plans = {
                "square": BatchPlan(images, Framing(size=size, buckets=False), BATCH, 0),
                "buckets": BatchPlan(images, Framing(size=size), BATCH, 0),
            }
            scale = transforms.Normalize([0.5] * 3, [0.5] * 3)
            steps: list[object] = [
                transforms.Resize(size, InterpolationMode.BICUBIC),
                transforms.RandomCrop(size),
                transforms.ToTensor(),
                scale,
            ]
            same = ImageFolder(str(root), transforms.Compose(steps), allow_empty=True)
            cases: dict[str, Callable[[], Iterable[object]]] = {
                "torchvision": lambda same=same: DataLoader(same, BATCH, shuffle=True, drop_last=True),
                **{name: lambda plan=plan: Loader(plan) for name, plan in plans.items()},
            }
            passes = [
                {name: rate(batches(), count) for name, batches in cases.items()} for _ in range(options.runs + 1)
            ]
            for name in cases:
                rates = [one[name] for one in passes[1:]]
                row = {"jpeg": side, "size": size, "loader": name, "images_per_cpu_s": round(median(rates), 1)}
                rows.append(row | {"lowest": round(min(rates), 1), "highest": round(max(rates), 1)})
                print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
