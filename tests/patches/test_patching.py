"""The patches of a U-Net: one list, in one order, applied in one place."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from ldm.models.unet import Conditioning
from ldm.patches import patching
from ldm.patches.patching import PATCHES, Patch, patched
from ldm.sampling.guidance import join

ROOT = Path(__file__).parents[2]
VALUES: dict[str, Any] = {"embedded_guidance": 2.0, "merge": 0.5, "reuse": 2, "perturbed_groups": 2}


def test_each_file_holds_one_patch_which_only_the_list_applies() -> None:
    """No other code calls, or even imports, a patch's function."""
    files = {f"ldm.patches.{path.stem}" for path in (ROOT / "ldm" / "patches").glob("*.py")}
    parts = ("__init__", "patching", "low_rank", "trained", "call_inputs")  # weights alone, and what patches are given
    others = {f"ldm.patches.{name}" for name in parts}
    assert {patch.apply.__module__ for patch in PATCHES} == files - others
    assert len({patch.apply.__module__ for patch in PATCHES}) == len(PATCHES)
    functions = {patch.apply.__name__ for patch in PATCHES}
    for path in (path for top in ("ldm", "pipelines", "tools") for path in (ROOT / top).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not used & functions or path == ROOT / "ldm/patches/patching.py", path


def test_in_the_order_of_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of the values; names that are no patch's, and values that ask for nothing, do nothing."""
    seen: list[tuple[str, Any]] = []

    def noting(name: str) -> Any:
        return lambda unet, value: seen.append((name, value)) or unet

    monkeypatch.setattr(patching, "PATCHES", tuple(Patch(row.name, row.off, noting(row.name)) for row in PATCHES))
    unet = tiny.model("sd15").unet
    assert patched(unet, dict(reversed(VALUES.items())) | {"steps": 20}) is unet
    assert seen == list(VALUES.items())
    seen.clear()
    assert patched(unet, {"merge": 0.0, "reuse": 1, "perturbed_groups": 0}) is unet
    assert patched(unet, {}) is unet
    assert not seen


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_together(name: str) -> None:
    """All of them on one network: each changes its part of the result, and the network stays as it was."""
    unet = tiny.model(name).unet
    c = unet.config
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pooled, size = (noise(1, side) if side else None for side in (c.pooled_dim, c.size_ids))
    one = Conditioning(noise(1, 9, c.text_dim), pooled, size)
    twice = join(one, one)
    x, later = (noise(1, c.in_channels, 16, 16).expand(2, -1, -1, -1) for _ in range(2))

    def run(model: torch.nn.Module, x: Tensor) -> Tensor:
        return model(x, torch.tensor(500), twice)

    with torch.no_grad():
        before = run(unet, x)[0]
        merged = patched(unet, {"merge": 0.5})
        model = patched(unet, VALUES)
        first, perturbed = run(model, x)
        torch.testing.assert_close(first, run(merged, x)[0], atol=1e-5, rtol=1e-4)  # merged, not perturbed
        assert not torch.allclose(first, before, atol=1e-3)
        assert not torch.allclose(perturbed, first, atol=1e-4)  # the second of two groups
        second = run(model, later)[0]
        assert not torch.allclose(second, run(merged, later)[0], atol=1e-4)  # inner levels are reused
        third = run(model, later)[0]
        torch.testing.assert_close(third, run(merged, later)[0], atol=1e-5, rtol=1e-4)  # and run again
        assert torch.equal(run(unet, x)[0], before)
    assert {id(parameter) for parameter in model.parameters()} == {id(parameter) for parameter in unet.parameters()}
