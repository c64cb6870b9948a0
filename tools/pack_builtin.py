"""Make the built-in models from trained models: weights in fp16, the contrastive pair, and the captions' words.

    python tools/pack_builtin.py runs/emoji-small/base/model --refiner runs/emoji-small/refiner/model \\
        --clip runs/emoji-small/text/clip --data emoji

The base's model card, README.md in its folder, is written by hand and is kept, and so are the adapters.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from ldm.data.sources import open_images
from ldm.errors import LdmError
from ldm.files import replacing
from ldm.latent_diffusion import LatentDiffusion
from ldm.weights.builtin import ADAPTERS, DEFAULT, FOLDER, REFINER, WORDS, vocabulary
from ldm.weights.components import fingerprint
from ldm.weights.contrastive import load_clip, write_clip
from ldm.weights.manifest import NAME as MANIFEST
from ldm.weights.manifest import write_manifest

MOST = 36 * 10**6  # largest size in bytes of the weights of all built-in models
CARD, NOTICE = "README.md", "NOTICE.md"


def main() -> None:
    """Write the folders and print their size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the result of the stage base")
    parser.add_argument("--refiner", required=True, help="the result of the stage refiner")
    parser.add_argument("--vae", help="the folder of an autoencoder with a better decoder than the model's")
    parser.add_argument("--clip", type=Path, required=True, help="the folder `clip` of the stage text")
    parser.add_argument("--data", type=Path, required=True, help="the folder that prepare_emoji.py wrote")
    options = parser.parse_args()
    try:
        components = {"vae": options.vae} if options.vae else None
        model = LatentDiffusion.from_pretrained(options.model, dtype=torch.float32, components=components)
        refiner = LatentDiffusion.from_pretrained(options.refiner, dtype=torch.float32)
        pack(model, refiner, options.clip, options.data)
    except LdmError as error:
        raise SystemExit(f"pack_builtin: {error}") from None


def pack(model: LatentDiffusion, refiner: LatentDiffusion, clip: Path, data: Path) -> None:
    """Write both folders, beside the adapters.

    Raises:
        LdmError: a file is missing, the models do not belong together, or the weights are too large.
    """
    pair = load_clip(clip, model)
    known = vocabulary(open_images(f"{data}/train-*.tar", data / "index").captions())
    read = [fingerprint({"text": one.text_encoders.towers[-1]}) for one in (model, refiner)]
    if read[0] != read[1]:
        raise LdmError("the refiner reads another text encoder than the model; train it in the same run")
    with replacing(FOLDER, folder=True, overwrite=True, need=MOST) as temporary:
        base, small = temporary / DEFAULT, temporary / REFINER
        model.save_pretrained(base, dtype=torch.float16)
        write_clip(pair.half(), base / "clip")
        (base / WORDS).write_text("\n".join(known) + "\n", encoding="utf-8")
        shutil.copy(data / NOTICE, base / NOTICE)
        if (FOLDER / DEFAULT / CARD).is_file():
            shutil.copy(FOLDER / DEFAULT / CARD, base / CARD)
        refiner.save_pretrained(small, dtype=torch.float16)
        for part in ("vae", "text_encoder_2", "tokenizer_2"):  # shared with the base
            shutil.rmtree(small / part)
        (small / MANIFEST).unlink()
        write_manifest(small, {})
        size = sum(path.stat().st_size for path in temporary.rglob("*.safetensors"))
        if size > MOST:
            raise LdmError(f"the weights have {size / 1e6:.1f} MB; at most {MOST / 1e6:.0f} are wanted")
        if ADAPTERS.is_dir():
            shutil.copytree(ADAPTERS, temporary / ADAPTERS.name)
    print(f"{FOLDER}: {size / 1e6:.1f} MB of weights, {len(known)} words")


if __name__ == "__main__":
    main()
