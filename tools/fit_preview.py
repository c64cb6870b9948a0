"""Fit the linear map from a model's latents to colours, for `Family.preview`, and print the previews' PSNR.

    python tools/fit_preview.py MODEL --images FOLDER --size 512

Without `--images`, smooth random colours are used. The PSNR compares the previews with the images at the latents' size.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from ldm.images import load_image, to_tensor
from ldm.latent_diffusion import LatentDiffusion
from ldm.sampling.preview import fit, to_pixels


def main() -> None:
    """Print the rows in the format of `ldm/families.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, file or Hub name")
    parser.add_argument("--images", type=Path, help="a folder of images")
    parser.add_argument("--size", type=int, default=512, help="side in pixels to which images are resized")
    options = parser.parse_args()
    model = LatentDiffusion.from_pretrained(options.model, dtype=torch.float32)
    pixels = None
    if options.images:
        paths = sorted(path for path in options.images.iterdir() if path.suffix.lower() in (".png", ".jpg", ".webp"))
        pixels = to_tensor([load_image(path) for path in paths], options.size, options.size)
    factors = fit(model.autoencoder, pixels)
    for row in factors:
        print("    (" + ", ".join(f"{value:.4f}" for value in row) + "),")
    if pixels is not None:
        config = model.autoencoder.config
        with torch.inference_mode():
            modes = torch.cat([model.autoencoder.encode(row).mode() for row in pixels.split(1)])
        seen = to_pixels((modes - config.shift_factor) * config.scaling_factor, factors)
        error = F.mse_loss(seen.clamp(-1, 1), F.adaptive_avg_pool2d(pixels, seen.shape[2:]))
        print(f"PSNR {10 * math.log10(4 / error):.1f} dB")


if __name__ == "__main__":
    main()
