"""Token merging: self-attention computes similar tokens as one."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from ldm.errors import LdmError
from ldm.models.layers import Attention
from ldm.models.unet import Conditioning, UNet
from ldm.patches.deepcache import reuse_inner_levels
from ldm.patches.token_merging import MergeTargets, MergingAttention, gathered, merge_tokens, merged
from ldm.runtime.fused_cpu import fuse
from ldm.runtime.precomputing import precomputed
from ldm.sampling.guidance import Guidance
from pipelines import Pipeline

TIME = torch.tensor(500)


def inputs(unet: UNet, height: int, width: int) -> tuple[Tensor, Conditioning]:
    """Noise for two images and what they show."""
    c = unet.config
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pooled, size = (noise(2, side) if side else None for side in (c.pooled_dim, c.size_ids))
    return noise(2, c.in_channels, height, width), Conditioning(noise(2, 9, c.text_dim), pooled, size)


def targets(height: int, width: int, device: str = "cpu") -> MergeTargets:
    result = MergeTargets()
    result.fit(height, width, torch.device(device))
    return result


@pytest.mark.parametrize(
    "rows", [("#...#", "...#.", "..#..", ".#..#"), ("#...#", "...#.", ".##.#"), ("#..##",), ("#", ".", "#"), ("#",)]
)
def test_targets(rows: tuple[str, ...]) -> None:
    """One in each cell of 2×2, top left and bottom right in turns, also where a cell lacks a row or a column."""
    found = targets(len(rows), len(rows[0]))
    drawn = "".join(rows)
    assert found.order.tolist() == [i for kind in "#." for i, mark in enumerate(drawn) if mark == kind]
    assert found.count == drawn.count("#")


def test_a_small_map() -> None:
    """2×4 tokens of two channels; the targets are the first and the last."""
    rows = [[[1.0, 0.0], [0.0, 2.0], [-1.0, 0.5], [1.0, 2.0]], [[1.0, -1.0], [2.0, 2.1], [3.0, 0.0], [0.0, 1.0]]]
    tokens = torch.tensor(rows)
    fewer, places = merged(tokens.view(1, 8, 2), targets(2, 4), 0.25)
    assert fewer.shape == (1, 6, 2)
    wanted = tokens.clone()
    wanted[0, 0] = wanted[1, 2] = torch.tensor([2.0, 0.0])
    wanted[0, 1] = wanted[1, 3] = torch.tensor([0.0, 1.5])
    assert torch.equal(gathered(fewer, places).view(2, 4, 2), wanted)
    fewer, _ = merged(tokens.view(1, 8, 2), targets(2, 4), 0.75)
    assert torch.allclose(fewer, torch.tensor([[[5 / 3, -1 / 3], [2 / 5, 7.6 / 5]]]))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75])
@pytest.mark.parametrize("height, width", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 5), (7, 4)])
def test_any_size(height: int, width: int, ratio: float) -> None:
    tokens = torch.randn(2, height * width, 4)
    cells = -(-height // 2) * -(-width // 2)
    gone = min(int(ratio * height * width), height * width - cells)
    fewer, places = merged(tokens, targets(height, width), ratio)
    assert fewer.shape == (2, height * width - gone, 4)
    for row in places:
        assert sorted(set(row.tolist())) == list(range(fewer.shape[1]))
    kept = (gathered(fewer, places) == tokens).all(-1).sum(dim=1)
    assert (kept >= height * width - 2 * gone).all()  # all but those that are merged and their targets
    for index, places_alone in enumerate(places):
        alone = merged(tokens[index : index + 1], targets(height, width), ratio)
        torch.testing.assert_close(alone[0][0], fewer[index])
        assert torch.equal(alone[1][0], places_alone)


def test_shapes_depend_on_no_number() -> None:
    """Tensors without numbers will do, so that it can be compiled and recorded."""
    fewer, places = merged(torch.empty(2, 35, 8, device="meta"), targets(5, 7, "meta"), 0.5)
    assert fewer.shape == (2, 18, 8)
    assert places.shape == (2, 35)


def test_cells_of_equal_tokens_lose_nothing() -> None:
    attention = Attention(32, 4)
    x = torch.randn(2, 3, 4, 32).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(MergingAttention(attention, 0.75, targets(6, 8))(x, x), attention(x, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thousands_of_equal_tokens(dtype: torch.dtype) -> None:
    fewer, places = merged(torch.full((1, 4096, 3), 40.0, dtype=dtype), targets(64, 64), 0.75)
    assert fewer.dtype == dtype
    torch.testing.assert_close(gathered(fewer, places).float(), torch.full((1, 4096, 3), 40.0), atol=0, rtol=1e-2)


@pytest.mark.parametrize("name, level", [("sd15", 0), ("sdxl", 1), ("emoji", 1)])
def test_only_the_level_with_the_most_tokens(name: str, level: int) -> None:
    """A ratio of 0 changes nothing but roundings; the weights stay the U-Net's, and the tokens of all other levels."""
    unet = tiny.model(name).unet
    seen: dict[str, int] = {}

    def watch(key: str) -> Any:
        return lambda module, given, made: seen.update({key: given[0].shape[1]})

    for key, module in unet.named_modules():
        if key.endswith("attn1"):
            module.register_forward_hook(watch(key))
    x, cond = inputs(unet, 8, 6)
    with torch.no_grad():
        plain = unet(x, TIME, cond)
        before = dict(seen)
        model = merge_tokens(unet, 0.5)
        made = model(x, TIME, cond)
        torch.testing.assert_close(merge_tokens(unet, 0.0)(x, TIME, cond), plain, atol=1e-5, rtol=1e-4)
        assert torch.equal(unet(x, TIME, cond), plain)
        model(x, TIME, cond)
    assert made.shape == plain.shape
    assert not torch.allclose(made, plain, atol=1e-3)
    last = len(unet.config.channels) - 1
    places = (f"down_blocks.{level}.", f"up_blocks.{last - level}.")
    assert before.keys() == seen.keys()
    for key, tokens in before.items():
        assert seen[key] == (tokens // 2 if key.startswith(places) else tokens)
    assert {id(weight) for weight in model.parameters()} == {id(weight) for weight in unet.parameters()}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "emoji"])
def test_beside_the_other_wrappers(name: str) -> None:
    """With the text's keys and values known, inner levels reused, fused layers, and each image alone."""
    unet = tiny.model(name).unet
    x, cond = inputs(unet, 7, 5)
    with torch.inference_mode():
        model = merge_tokens(unet, 0.5)
        made = model(x, TIME, cond)
        kept = precomputed(merge_tokens(unet, 0.5), cond)
        assert torch.equal(kept(x, TIME, cond), made)
        assert torch.equal(kept(-x, TIME, cond), model(-x, TIME, cond))
        reused = precomputed(reuse_inner_levels(merge_tokens(unet, 0.5), 2), cond)
        assert torch.equal(reused(x, TIME, cond), made)
        assert torch.equal(reused(x, TIME, cond), made)
        assert not torch.equal(reused(-x, TIME, cond), reused(x, TIME, cond))
        for row in (slice(0, 1), slice(1, 2)):
            torch.testing.assert_close(model(x[row], TIME, cond.rows(row)), made[row], atol=1e-5, rtol=1e-4)
        fuse(unet)
        torch.testing.assert_close(merge_tokens(unet, 0.5)(x, TIME, cond), made, atol=1e-4, rtol=1e-3)


def test_images() -> None:
    pipeline = Pipeline(tiny.model("sd15"))

    def make(**settings: Any) -> Tensor:
        result = pipeline(["a fox", "a cat"], seed=1, steps=4, scheduler="euler", output="latents", **settings)
        assert [row["merge"] for row in result.settings] == [settings.get("merge", 0.0)] * 2
        return torch.stack(result.latents)

    plain = make()
    assert torch.equal(make(merge=0), plain)
    half = make(merge=0.5)
    assert not torch.allclose(half, plain, atol=1e-2)
    torch.testing.assert_close(make(merge=0.5, batch=2), half, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(make(merge=0.5, reuse=2), half, atol=1e-2)
    perturbed = {"merge": 0.5, "guidance": Guidance(5.0, interval=(0.0, 0.5), perturbed=2.0)}
    torch.testing.assert_close(make(**perturbed, batch=2), make(**perturbed), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("value", [-0.1, 0.76, 1, float("nan"), True, "half"])
def test_absurd_numbers(value: Any) -> None:
    with pytest.raises(LdmError, match=r"merge .*: a number from 0 to 0.75 is needed"):
        Pipeline(tiny.model("sd15"))("a fox", steps=2, merge=value)


def test_models_without_transformers_are_refused() -> None:
    refiner = tiny.model("emoji-refiner")
    for pipeline in (Pipeline(refiner), Pipeline(tiny.model("emoji"), refiner=refiner)):
        with pytest.raises(LdmError, match="merge: no level of a custom model has a transformer"):
            pipeline.stream("a fox", steps=4, merge=0.5)
        pipeline.stream("a fox", steps=4)
