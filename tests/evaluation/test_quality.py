"""PSNR and SSIM by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from ldm.errors import LdmError
from ldm.evaluation.metrics.reconstruction import psnr, ssim


def test_psnr_by_hand() -> None:
    target = torch.zeros(3, 3, 16, 20)
    reconstruction = torch.stack([target[0], target[1] + 0.2, target[2] + 7])  # the last one is cut off at 1
    found = psnr(reconstruction, target)
    assert found[0] == math.inf
    assert found[1].item() == pytest.approx(20.0, abs=1e-4)  # 10 log10(2² / 0.2²)
    assert found[2].item() == pytest.approx(10 * math.log10(4), abs=1e-4)


def test_ssim_by_hand() -> None:
    target = torch.rand(2, 3, 24, 30) * 2 - 1
    reconstruction = (target + 0.3 * torch.randn_like(target)).clamp(-1, 1)

    def smooth(x: np.ndarray) -> np.ndarray:
        filtered = gaussian_filter(x, sigma=1.5, radius=5, axes=(2, 3))
        return filtered[:, :, 5:-5, 5:-5]  # windows that lie in the image

    x, y = reconstruction.double().numpy(), target.double().numpy()
    mx, my = smooth(x), smooth(y)
    vx, vy, cov = smooth(x * x) - mx**2, smooth(y * y) - my**2, smooth(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    expected = ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(ssim(reconstruction, target).numpy(), expected, atol=1e-4)
    torch.testing.assert_close(ssim(target, target), torch.ones(2))
    assert ssim(target[:1], target[:1]).shape == (1,)
    assert ssim(target[:, :, :11, :11], target[:, :, :11, :11]).isfinite().all()
    with pytest.raises(LdmError, match="at least 11×11 pixels; these have 10×30"):
        ssim(target[:, :, :10], target[:, :, :10])
