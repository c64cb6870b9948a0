"""Make a model with averaged weights of any width from the snapshots of a run (`ema.widths` in its configuration).

    python tools/recombine_averages.py runs/mine/base --width 0.08 --out mine-0.08

Karras et al. 2024 (arXiv 2312.02696), section 3.2. Narrow averages (0.02) are close to the last weights, wide averages
(0.25) to the mean over the run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.ema import recombine


def run(stage: Path, width: float, step: int | None, out: Path) -> None:
    """Write the model.

    Raises:
        LdmError: the stage has no snapshots, or the destination exists.
    """
    model = LatentDiffusion.from_pretrained(stage / "model", dtype=torch.float32)
    whole = nn.ModuleDict({part: getattr(model, part) for part in ("unet", "autoencoder", "text_encoders")})
    known = dict(whole.named_parameters())
    trained = "autoencoder" if (stage / "averages" / "autoencoder").is_dir() else "unet"
    for name, tensor in recombine(stage / "averages" / trained, width, step).items():
        known[
            name if name in known else f"{trained}.{name}"
        ].data = tensor  # full names if several networks were trained
    model.save_pretrained(out)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", type=Path, help="the folder of a finished stage")
    parser.add_argument("--width", type=float, required=True, help="relative to the run's length, 0 to 0.288")
    parser.add_argument("--step", type=int, help="last step of the average; default: the last snapshot")
    parser.add_argument("--out", type=Path, required=True, help="the model folder to write")
    options = parser.parse_args()
    try:
        run(options.stage, options.width, options.step, options.out)
    except LdmError as error:
        sys.exit(f"recombine_averages: {error}")


if __name__ == "__main__":
    main()
