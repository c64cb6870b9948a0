"""LPIPS against the original package on the same weights, its gradients, and its files."""

from __future__ import annotations

from pathlib import Path

import lpips
import pytest
import torch
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.evaluation.networks.lpips import BACKBONES, LPIPS, load_lpips, save_lpips

# the original package calls torchvision in a way of the past
pytestmark = pytest.mark.filterwarnings(
    "ignore:The parameter 'pretrained':UserWarning", "ignore:Arguments other than a weight enum:UserWarning"
)


def images(side: int = 64) -> tuple[Tensor, Tensor]:
    a = torch.rand(2, 3, side, side + 9) * 2 - 1
    return a, (a + 0.3 * torch.randn_like(a)).clamp(-1, 1)


@pytest.fixture(params=list(BACKBONES))
def both(request: pytest.FixtureRequest) -> tuple[LPIPS, nn.Module]:
    """Ours and the original, with the same random trunk and the published heads, which the package contains."""
    ours = LPIPS(request.param)
    theirs = lpips.LPIPS(net=request.param.removesuffix("16"), pnet_rand=True, verbose=False)
    convs = [module for module in theirs.net.modules() if isinstance(module, nn.Conv2d)]
    for mine, other in zip(ours.trunk, convs, strict=True):
        nn.init.kaiming_normal_(mine.weight)  # torchvision's random VGG would send everything to 0
        other.load_state_dict(mine.state_dict())
    for mine, other in zip(ours.lin, theirs.lins, strict=True):
        mine.load_state_dict({"weight": other.model[-1].weight})
    return ours, theirs


def test_equals_the_original(both: tuple[LPIPS, nn.Module]) -> None:
    ours, theirs = both
    a, b = (x.requires_grad_() for x in images())
    distance, reference = ours(a, b), theirs(a, b).flatten()
    assert distance.shape == (2,)
    assert distance.min() > 1e-3
    torch.testing.assert_close(distance, reference, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(distance.sum(), (a, b))
    for mine, other in zip(gradients, torch.autograd.grad(reference.sum(), (a, b)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-7, rtol=1e-4)


def test_equal_images_have_no_distance() -> None:
    a, _ = images()
    assert LPIPS("alex")(a, a).eq(0).all()


def test_gradients_reach_both_images_and_no_weight() -> None:
    model = LPIPS("alex")
    a, b = (x.requires_grad_() for x in images())
    model(a, b).sum().backward()
    for x in (a, b):
        assert x.grad.isfinite().all()
        assert x.grad.flatten(1).norm(dim=1).min() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_features_of_zero_have_finite_gradients() -> None:
    model = LPIPS("alex")
    for conv in model.trunk:
        nn.init.constant_(conv.bias, -100.0)  # all ReLUs are shut
    a, b = (x.requires_grad_() for x in images())
    distance = model(a, b)
    distance.sum().backward()
    assert distance.eq(0).all()
    assert a.grad.eq(0).all()


def test_half_precision_changes_little() -> None:
    model = LPIPS("alex")
    a, b = images()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(a, b)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, model(a, b), atol=0, rtol=0.03)


@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_the_smallest_image(backbone: str) -> None:
    model, side = LPIPS(backbone), BACKBONES[backbone].smallest
    assert model(*torch.rand(2, 1, 3, side, side)).isfinite().all()
    with pytest.raises(LdmError, match=f"at least {side}×{side} pixels; these have {side}×{side - 1}"):
        model(*torch.rand(2, 1, 3, side, side - 1))


def test_a_file_and_back(tmp_path: Path) -> None:
    model, path = LPIPS("alex"), tmp_path / "alex.safetensors"
    save_lpips(model, path, {"note": "random"})
    loaded = load_lpips(path)
    assert loaded.backbone == "alex"
    a, b = images()
    assert torch.equal(loaded(a, b), model(a, b))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(LdmError, match="exists"):
        save_lpips(model, path, {})


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "alex.safetensors"
    with pytest.raises(LdmError, match="alex.safetensors cannot be read"):
        load_lpips(path)
    model = LPIPS("alex")
    del model.trunk[4].bias
    save_lpips(model, path, {})
    with pytest.raises(LdmError, match=r"does not hold the weights of LPIPS: trunk\.4\.bias .*fetch_weights"):
        load_lpips(path)
    save_lpips(LPIPS("alex"), path, {}, overwrite=True)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(LdmError, match="has changed since it was written"):
        load_lpips(path)
    with pytest.raises(LdmError, match="choose vgg16 or alex"):
        LPIPS("squeeze")


def test_a_backbone_stands_for_its_file_in_the_weights_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_WEIGHTS", str(tmp_path))
    with pytest.raises(LdmError, match=r"lpips-alex.safetensors is missing; .*fetch_weights.py lpips"):
        load_lpips("alex")
    save_lpips(LPIPS("alex"), tmp_path / "lpips-alex.safetensors", {})
    assert load_lpips("alex").backbone == "alex"
