"""The perceptual distance of two images (LPIPS, version 0.1), through which gradients reach both.

Zhang et al. 2018 (arXiv 1801.03924): features of a network trained to classify images, each place scaled to length 1,
squared differences, weighted by heads fitted to human judgements. `tools/fetch_weights.py lpips` makes the
files, one for each backbone.

B batch, C channels of a feature map, H×W height and width
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError, listing
from ldm.files import check_digest, replacing
from ldm.models.unfilled import unfilled
from ldm.weights.published import published
from ldm.weights.tensors import Output, Store, TensorInfo, write_safetensors

SHIFT = (-0.030, -0.088, -0.188)  # mean and standard deviation of ImageNet's colours, for images in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
EPS = 1e-10  # added to the length of the features of a place


@dataclass(frozen=True)
class TrunkStage:
    """Convolutions with ReLUs up to a feature map that is compared."""

    convs: tuple[tuple[int, int, int, int], ...]  # channels out, kernel, stride, padding of each
    pool: int = 0  # kernel of the max pooling of stride 2 before them; 0: none


@dataclass(frozen=True)
class Backbone:
    """The convolutional part of a classifier."""

    stages: tuple[TrunkStage, ...]
    smallest: int  # least height and width in pixels of an image


BACKBONES = {
    "vgg16": Backbone(
        tuple(
            TrunkStage(((width, 3, 1, 1),) * count, pool)
            for width, count, pool in ((64, 2, 0), (128, 2, 2), (256, 3, 2), (512, 3, 2), (512, 3, 2))
        ),
        smallest=16,
    ),
    "alex": Backbone(
        (
            TrunkStage(((64, 11, 4, 2),)),
            TrunkStage(((192, 5, 1, 2),), pool=3),
            TrunkStage(((384, 3, 1, 1),), pool=3),
            TrunkStage(((256, 3, 1, 1),)),
            TrunkStage(((256, 3, 1, 1),)),
        ),
        smallest=31,
    ),
}


class LPIPS(nn.Module):
    """The distance of two batches of images; random weights until a file is loaded. No parameter has a gradient."""

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: str) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise LdmError(f"LPIPS has no backbone {backbone!r}; choose {' or '.join(BACKBONES)}")
        self.backbone = backbone
        self.trunk = nn.ModuleList()
        self.lin = nn.ModuleList()
        width = 3
        for stage in BACKBONES[backbone].stages:
            for out, kernel, stride, padding in stage.convs:
                self.trunk.append(nn.Conv2d(width, out, kernel, stride, padding))
                width = out
            head = nn.Conv2d(width, 1, 1, bias=False)
            head.weight.data.abs_()  # not negative, like the fitted heads
            self.lin.append(head)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [-1, 1] to a feature map (B, C, h, w) of each stage, of length 1 at each place."""
        convs = iter(self.trunk)
        x = (x - self.shift) / self.scale
        found = []
        for stage in BACKBONES[self.backbone].stages:
            if stage.pool:
                x = F.max_pool2d(x, stage.pool, stride=2)
            for _ in stage.convs:
                x = F.relu(next(convs)(x))
            whole = x.float()  # half precision would round lengths near EPS to 0
            found.append(whole / (torch.linalg.vector_norm(whole, dim=1, keepdim=True) + EPS))
        return found

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (B,) of images (B, 3, H, W) in [-1, 1]; 0 for equal ones.

        Convolutions run in the precision of the caller's autocast, the rest in fp32.

        Raises:
            LdmError: the images are too small for the backbone.
        """
        smallest = BACKBONES[self.backbone].smallest
        if min(a.shape[2:]) < smallest:
            raise LdmError(
                f"LPIPS with {self.backbone} needs images of at least {smallest}×{smallest} pixels; "
                f"these have {a.shape[2]}×{a.shape[3]}"
            )
        total = torch.zeros(len(a), device=a.device)
        for x, y, head in zip(self.features(a), self.features(b), self.lin.parameters(), strict=True):
            total = total + ((x - y).square() * head[0]).sum(dim=1).mean(dim=(1, 2))
        return total


def save_lpips(model: LPIPS, path: Path, metadata: Mapping[str, str], overwrite: bool = False) -> None:
    """Write the weights as one safetensors file: `trunk.N.weight`, `trunk.N.bias` and `lin.N.weight`, fp32.

    Raises:
        LdmError: `path` exists and `overwrite` is not set, or cannot be written.
    """
    outputs = [
        Output(name, TensorInfo(torch.float32, tuple(tensor.shape)), tensor.clone)
        for name, tensor in model.state_dict().items()
    ]
    with replacing(path, folder=False, overwrite=overwrite, need=sum(o.info.nbytes for o in outputs)) as temporary:
        write_safetensors(temporary, outputs, metadata)


def _differences(backbone: str, found: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the backbone's tensors that `found` lacks or has in another shape, and of unknown ones in it."""
    with unfilled():
        wanted = {name: tuple(tensor.shape) for name, tensor in LPIPS(backbone).state_dict().items()}
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def lpips_file(backbone: str) -> str:
    """The name of a backbone's file in the weights folder."""
    return f"lpips-{backbone}.safetensors"


def lpips_path(source: str | Path) -> Path:
    """The path of a file, or of a backbone's file in the weights folder.

    Raises:
        LdmError: the backbone's file is missing.
    """
    return published(lpips_file(str(source)), "lpips") if source in BACKBONES else Path(source)


def load_lpips(source: str | Path, device: torch.device | str = "cpu") -> LPIPS:
    """The distance with the weights of a file that `save_lpips` wrote, with the backbone of the file.

    `source` is the file, or the name of a backbone, whose file is then taken from the weights folder.

    Raises:
        LdmError: the file is missing, cannot be read, is damaged, or holds another network.
    """
    path = lpips_path(source)
    store = Store([path])
    found = {name: info.shape for name, info in store.infos.items()}
    wrong = {backbone: _differences(backbone, found) for backbone in BACKBONES}
    backbone = min(wrong, key=lambda name: len(wrong[name]))
    if wrong[backbone]:
        raise LdmError(
            f"{path} does not hold the weights of LPIPS: {listing(wrong[backbone])} are missing, unexpected or "
            "misshapen; make it with tools/fetch_weights.py lpips"
        )
    check_digest(path)
    model = LPIPS(backbone).to(device)
    model.load_state_dict(dict(store.read(found, torch.float32, device)))
    return model
