"""Make a built-in model of a trained one: weights in fp16, the pair that compares texts and pictures, known words.

    python tools/pack_builtin.py runs/emoji-small/base/model --clip runs/emoji-small/text/clip --data emoji

The folder's README.md, its model card, is ours to write and stays.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from ldm.data.sources import open_images
from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.weights.builtin import FOLDER, WORDS, vocabulary
from ldm.weights.contrastive import load_clip, write_clip
from ldm.weights.files import replacing

MOST = 36 * 10**6  # bytes of weights, of all built-in models
CARD, NOTICE = "README.md", "NOTICE.md"


def main() -> None:
    """Write the folder whole, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the result of the stage base")
    parser.add_argument("--clip", type=Path, required=True, help="the folder clip of the stage text")
    parser.add_argument("--data", type=Path, required=True, help="what prepare_emoji.py wrote")
    parser.add_argument("--name", default="emoji", help="of the built-in model")
    options = parser.parse_args()
    try:
        pack(options.model, options.clip, options.data, FOLDER / options.name)
    except LdmError as error:
        raise SystemExit(f"pack_builtin: {error}") from None


def pack(source: str, clip: Path, data: Path, folder: Path) -> None:
    """Write the built-in model.

    Raises:
        LdmError: something is missing, the pair is not the model's, or the weights are too large.
    """
    model = LatentDiffusion.from_pretrained(source, dtype=torch.float32)
    pair = load_clip(clip, model)
    known = vocabulary(open_images(f"{data}/train-*.tar", data / "index").captions())
    with replacing(folder, folder=True, overwrite=True, need=MOST) as temporary:
        model.save_pretrained(temporary / "model", dtype=torch.float16)
        for part in (temporary / "model").iterdir():
            part.rename(temporary / part.name)
        (temporary / "model").rmdir()
        write_clip(pair.half(), temporary / "clip")
        (temporary / WORDS).write_text("\n".join(known) + "\n", encoding="utf-8")
        shutil.copy(data / NOTICE, temporary / NOTICE)
        if (folder / CARD).is_file():
            shutil.copy(folder / CARD, temporary / CARD)
        size = sum(path.stat().st_size for path in temporary.rglob("*.safetensors"))
        if size > MOST:
            raise LdmError(f"the weights have {size / 1e6:.1f} MB; at most {MOST / 1e6:.0f} are wanted")
    print(f"{folder}: {size / 1e6:.1f} MB of weights, {len(known)} words")


if __name__ == "__main__":
    main()
