"""Inception v3 of 2015, the network of FID, sFID, KID and the Inception score.

The weights are those of TensorFlow's graph of 2015-12-05, which every well-known implementation has converted. Its
average pools leave out the border, and its last block pools by the maximum; torch-fidelity's blocks do so too.
Images are resized as clean-fid does (Parmar et al. 2022, arXiv 2104.11222): with antialiasing, in float, not
rounded. Figures with the resizing of TensorFlow 1, which torch-fidelity and torchmetrics imitate, differ for images of
any other size than 299×299.

B images, C channels
"""

from __future__ import annotations

import zipfile
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import (
    BasicConv2d,
    InceptionA,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE_1,
    InceptionE_2,
)

from ldm.errors import LdmError, listing
from ldm.evaluation.metrics.distances import spatial_features
from ldm.evaluation.networks.exact import exact
from ldm.files import check_digest, file_digest, stated_digest
from ldm.models.unfilled import unfilled
from ldm.weights.published import INCEPTION, published
from ldm.weights.tensors import open_store

SIDE = 299  # pixels
COUNTERS = "num_batches_tracked"  # buffers of batch norms in some files, which are not needed


class Network(nn.Module):
    """The network, with torch-fidelity's names."""

    def __init__(self, classifier: bool) -> None:
        """Build the network, with `classifier` also the layer of the logits of 1008 classes."""
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = InceptionA(192, pool_features=32)
        self.Mixed_5c = InceptionA(256, pool_features=64)
        self.Mixed_5d = InceptionA(288, pool_features=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, channels_7x7=128)
        self.Mixed_6c = InceptionC(768, channels_7x7=160)
        self.Mixed_6d = InceptionC(768, channels_7x7=160)
        self.Mixed_6e = InceptionC(768, channels_7x7=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE_1(1280)
        self.Mixed_7c = InceptionE_2(2048)
        self.fc = nn.Linear(2048, 1008, bias=False) if classifier else None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The outputs of images (B, 3, 299, 299) in [0, 255], by name."""
        x = self.Conv2d_1a_3x3((x - 128) / 128)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(x))
        x = F.max_pool2d(x, kernel_size=3, stride=2)  # (B, 64, 73, 73)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, kernel_size=3, stride=2)  # (B, 192, 35, 35)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (B, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (B, 768, 17, 17)
        given = {"spatial": spatial_features(x)}
        x = self.Mixed_7a(self.Mixed_6e(x))  # (B, 1280, 8, 8)
        x = self.Mixed_7c(self.Mixed_7b(x))  # (B, 2048, 8, 8)
        given["features"] = F.adaptive_avg_pool2d(x, 1).flatten(1)
        if self.fc is not None:
            given["logits"] = self.fc(given["features"])
        return given


def _is_script(path: Path) -> bool:
    """Whether a file is TorchScript, in which these weights are often published: a program, which is not run here."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())
    except Exception:  # no archive, or a damaged one; the reader of the tensors raises its own error
        return False


class Inception:
    """An extractor of `features` (B, 2048), `spatial` (B, 2023) and, if the file has a classifier, `logits` (B, 1008).

    The logits are without the classifier's biases, as the Inception score is defined (Salimans et al. 2016).
    """

    name = "Inception v3"
    preparation = f"{SIDE}×{SIDE}, bicubic, antialiased, not rounded (clean-fid)"

    def __init__(self, path: Path | None = None, device: torch.device | str = "cpu") -> None:
        """Args:
            path: a safetensors file or a state dict as torch-fidelity, torchmetrics and pytorch-fid have it; by
                default the file in the weights folder.
            device: of the network.

        Raises:
            LdmError: the file is missing or damaged, or holds another network.
        """
        path = path or published(INCEPTION, "inception")
        if _is_script(path):
            raise LdmError(
                f"{path} is TorchScript, a program; give a file of weights alone, such as torch-fidelity's, or make "
                "one with tools/fetch_weights.py inception"
            )
        store = open_store(path, allow_pickle=True)
        found = {name: info.shape for name, info in store.infos.items() if not name.endswith((COUNTERS, "fc.bias"))}
        with unfilled():
            self.network = Network(classifier="fc.weight" in found)
        wanted = {n: tuple(t.shape) for n, t in self.network.state_dict().items() if not n.endswith(COUNTERS)}
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if wrong:
            raise LdmError(
                f"{path} does not hold the weights of Inception v3: {listing(wrong)} are missing, unexpected or "
                "misshapen; make it with tools/fetch_weights.py inception"
            )
        check_digest(path)
        self.device = torch.device(device)
        self.network.load_state_dict(dict(store.read(wanted, torch.float32, self.device)), assign=True)
        self.network.eval()
        self.digest = stated_digest(path) or file_digest(path)
        self.gives = frozenset({"features", "spatial", "logits"} if "fc.weight" in found else {"features", "spatial"})

    def prepare(self, image: Image.Image) -> Tensor:
        """An image in RGB to (3, 299, 299) in [0, 255]."""
        channels = [
            Image.fromarray(channel).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            for channel in np.asarray(image, np.float32).transpose(2, 0, 1)
        ]
        return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]).clip(0, 255))

    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        """Prepared images (B, 3, 299, 299) to their features, on the CPU."""
        with exact():
            return {name: values.cpu() for name, values in self.network(inputs.to(self.device)).items()}
