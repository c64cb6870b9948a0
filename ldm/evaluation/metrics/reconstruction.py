"""PSNR and SSIM of images and their reconstructions, from torchmetrics.

B batch, H×W height and width
"""

from __future__ import annotations

from torch import Tensor

from ldm.errors import LdmError

RANGE = (-1.0, 1.0)  # of the images; values are clipped to it, as when an image is saved
WINDOW = 11  # height and width in pixels of SSIM's Gaussian window, with a standard deviation of 1.5


def psnr(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images (B, 3, H, W) in [-1, 1]: (B,), in dB, over all values of an image.

    It is infinite for equal images.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio  # takes seconds

    return peak_signal_noise_ratio(
        reconstruction.float().clamp(*RANGE), target.float(), data_range=2.0, reduction="none", dim=(1, 2, 3)
    )


def ssim(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of images (B, 3, H, W) in [-1, 1]: (B,), 1 for equal ones.

    K1 = 0.01, K2 = 0.03; the mean over the three colours and over all windows that lie in the image.

    Raises:
        LdmError: the images are smaller than a window.
    """
    if min(target.shape[2:]) < WINDOW:
        raise LdmError(
            f"SSIM needs images of at least {WINDOW}×{WINDOW} pixels; these have {target.shape[2]}×{target.shape[3]}"
        )
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, everywhere = structural_similarity_index_measure(
        reconstruction.float().clamp(*RANGE), target.float(), sigma=1.5, data_range=2.0, return_full_image=True
    )
    border = WINDOW // 2  # within it torchmetrics pads the images by reflection
    return everywhere[:, :, border:-border, border:-border].mean(dim=(1, 2, 3))
