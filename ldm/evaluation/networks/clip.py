"""CLIP (Radford et al. 2021, arXiv 2103.00020): features of images and texts in one space.

The networks are models of open_clip and the pairs that the stage `text` trains. Features have length 1.

B images or texts, D features
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldm.errors import LdmError, first_line, suggestion
from ldm.evaluation.networks.exact import exact
from ldm.files import file_digest, stated_digest
from ldm.models.text import check_texts
from ldm.weights.contrastive import load_clip
from ldm.weights.manifest import check_manifest
from ldm.weights.sources import open_source

AT_ONCE = 256  # texts in one call
CUTS = {"shortest": "center crop", "longest": "whole, padded", "squash": "whole, stretched"}  # by open_clip's names


class OpenClip:
    """An extractor with a model of open_clip: `features` (B, D) of images, and of texts."""

    gives = frozenset({"features"})

    def __init__(self, model: str, weights: str, device: torch.device | str = "cpu") -> None:
        """Args:
            model: open_clip's name, such as ViT-B-32.
            weights: open_clip's name of published weights, fetched if they are not in its cache; or a file.
            device: of the network.

        Raises:
            LdmError: model or weights are not known, or the weights are of another model.
        """
        import open_clip  # takes seconds

        if model not in open_clip.list_models():
            raise LdmError(f"open_clip has no model {model!r}; {suggestion(model, open_clip.list_models())}")
        tag = open_clip.get_pretrained_cfg(model, weights)
        path = _published(model, weights) if tag else Path(weights)
        if not path.is_file():
            known = open_clip.list_pretrained_tags_by_model(model)
            raise LdmError(f"{weights} is no file, and no weights that open_clip knows for {model}: {', '.join(known)}")
        try:
            self.network, self.transform = open_clip.create_model_from_pretrained(
                model,
                pretrained=weights,
                device=device,
                # the activation depends on the weights; open_clip uses the model's, and only warns
                force_quick_gelu=bool(tag.get("quick_gelu")),
            )
            self.tokenize: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(model)
        except Exception as error:  # readers of several formats fail in many ways
            reason = first_line(error).partition(". ")[0]  # PyTorch's next sentence advises unsafe reading of pickles
            raise LdmError(
                f"{path} does not hold the weights of open_clip's {model}, or is damaged ({reason})"
            ) from None
        self.network.eval()
        self.device = torch.device(device)
        self.name = f"CLIP {model} ({weights if tag else path.name})"
        self.digest = file_digest(path)
        seen = self.network.visual.preprocess_cfg
        height, width = seen["size"] if isinstance(seen["size"], Sequence) else (seen["size"],) * 2
        self.preparation = f"{width}×{height}, {seen['interpolation']}, antialiased, {CUTS[seen['resize_mode']]}"

    def prepare(self, image: Image.Image) -> Tensor:
        """An image to the model's input (3, H, W)."""
        return self.transform(image)

    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        """Prepared images (B, 3, H, W) to `features` (B, D) of length 1, on the CPU."""
        with exact():
            return {"features": self.network.encode_image(inputs.to(self.device), normalize=True).cpu()}

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Texts to (B, D) of length 1, on the CPU; what is too long for the model is cut.

        Raises:
            LdmError: a caption is no text.
        """
        check_texts(captions)
        with exact():
            tokens = self.tokenize(list(captions)).to(self.device)
            return torch.cat([self.network.encode_text(some, normalize=True) for some in tokens.split(AT_ONCE)]).cpu()


def _published(model: str, weights: str) -> Path:
    """The file with published weights, fetched if it is missing.

    Raises:
        LdmError: it cannot be fetched.
    """
    import open_clip

    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, weights)))
    except Exception as error:  # errors of the network, the Hub, the disk
        raise LdmError(
            f"the weights {weights!r} of open_clip's {model} cannot be fetched ({first_line(error)}); give a file: "
            f"clip:{model}@FILE"
        ) from None


class OwnPair:
    """An extractor with the encoders that the stage `text` trained: `features` (B, D) of images, and of texts."""

    gives = frozenset({"features"})

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """Args:
            folder: output of the stage `text`, with `model` and `clip` in it; or a model with `clip` in it.
            device: of the networks.

        Raises:
            LdmError: the folder holds no such pair, or is damaged.
        """
        clip = folder / "clip"
        if not clip.is_dir():
            raise LdmError(
                f"{folder} holds no contrastive pair (clip is missing); take the output of a stage text, with model "
                "and clip in it"
            )
        source = folder / "model" if (folder / "model").is_dir() else folder
        opened = open_source(source, verify=False)  # of the model, only the text encoders are read and checked
        names = [config.component for config in opened.family.text]
        files = [file for name in names for file in opened.parts[name].store.files]
        check_manifest(source, files)
        self.pair = load_clip(clip, opened.load(torch.float32, device, only=names))
        files += sorted(clip.rglob("*.safetensors"))
        digests = [stated_digest(file) or file_digest(file) for file in files]
        self.name = f"CLIP pair of {folder}"
        self.digest = hashlib.sha256("".join(digests).encode()).hexdigest()
        self.side = self.pair.config.size
        self.preparation = f"{self.side}×{self.side}, bicubic, antialiased, center crop"

    def prepare(self, image: Image.Image) -> Tensor:
        """An image in RGB to (3, S, S) in [-1, 1]."""
        square = ImageOps.fit(image, (self.side, self.side), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 127.5 - 1

    def __call__(self, inputs: Tensor) -> dict[str, Tensor]:
        """Prepared images (B, 3, S, S) to `features` (B, D) of length 1, on the CPU."""
        with exact():
            return {"features": self.pair.encode_images(inputs).cpu()}

    def texts(self, captions: Sequence[str]) -> Tensor:
        """Texts to (B, D) of length 1, on the CPU; what is too long for the model is cut.

        Raises:
            LdmError: a caption is no text.
        """
        with exact():
            some = [captions[start : start + AT_ONCE] for start in range(0, len(captions), AT_ONCE)]
            return torch.cat([self.pair.encode_texts(few) for few in some]).cpu()
