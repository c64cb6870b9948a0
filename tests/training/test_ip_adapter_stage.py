"""The stage `ip-adapter`: what is trained, beside diffusers; its file; after a stop; bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import image_prompts
import pytest
import runs
import torch
from PIL import Image
from runs import DEEP, check_golden, interrupted, losses, noting, on_top, whole_and_parts
from runs import _fresh_accelerator as _fresh_accelerator
from safetensors.torch import load_file

from ldm.errors import LdmError
from ldm.images import to_tensor
from ldm.models.image_prompt import attentions
from ldm.training.checks import check_bounds, check_paths
from ldm.training.config import Config
from ldm.training.loop import Training
from ldm.training.run import train
from ldm.training.stages.ip_adapter import ImagePromptStage, write
from ldm.weights.image_encoder import prepared, prepared_pixels
from ldm.weights.image_prompt import open_image_prompt
from ldm.weights.tensors import LINEAGE, read_header

IP = [
    "stages=[ip-adapter]", DEEP, "ip-adapter.steps=6", "ip-adapter.batch=8", "ip-adapter.sizes=[{size: 32}]",
    "ip-adapter.log_every=1", "ip-adapter.save_every=3", "ip-adapter.validate_every=6",
    "ip-adapter.preview_every=100", "ip-adapter.optimizer.learning_rate=1e-3", "ip-adapter.dtype=fp32",
]  # fmt: skip
ALL = ["ip-adapter.drop_image=0.3", "ip-adapter.drop_both=0.2", "ip-adapter.ema.decay=0.9"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an image encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    image_prompts.encoder().save_pretrained(folder)
    return folder


def settings(shapes: Path, encoder: Path, output: Path, *overrides: str) -> Config:
    return on_top(shapes, output, [*IP, f"ip-adapter.encoder={encoder}"], *overrides)


def ready(chosen: Config) -> tuple[Training, ImagePromptStage]:
    """The stage, ready to train."""
    training = runs.ready(chosen)
    assert isinstance(training.stage, ImagePromptStage)
    return training, training.stage


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_the_loss_and_the_gradients_are_those_of_diffusers(
    shapes: Path, encoder: Path, tmp_path: Path, kind: str
) -> None:
    """One step of diffusers' U-Net with the written file, on the same latents, noise, text and image features."""
    dropped = [f"ip-adapter.{name}=0" for name in ("drop_image", "drop_both")]
    training, stage = ready(settings(shapes, encoder, tmp_path / "r", f"ip-adapter.kind={kind}",
                                     "ip-adapter.drop_caption=[0]", *dropped))  # fmt: skip
    write(stage, tmp_path, "{}")
    stage.model.save_pretrained(tmp_path / "model")
    batch = next(training.batches(0))[0]
    assert batch.pixels is not None
    loss = next(iter(stage.losses(batch, 0)))
    loss.values.mean().backward()
    latents = stage.latents(batch, "posterior")
    draw = stage.loss.draw(latents.shape[1:], stage.seed, batch.keys, batch.epochs)
    text = stage.model.encode_prompt(batch.captions).text
    features = stage.encoder.features(batch.pixels, kind == "plus")
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
    state = image_prompts.groups(load_file(tmp_path / "ip-adapter.safetensors"))
    unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    made = unet(
        stage.loss.noisy(latents, draw), draw.timestep, encoder_hidden_states=text,
        added_cond_kwargs={"image_embeds": [features[:, None]]},
    ).sample  # fmt: skip
    theirs = torch.nn.functional.mse_loss(made, draw.noise)
    theirs.backward()
    assert loss.values.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    own = dict(stage.network.named_parameters())
    layers = [one for one in unet.attn_processors.values() if hasattr(one, "to_k_ip")]
    for number, layer in enumerate(layers):
        for name in ("to_k_ip", "to_v_ip"):
            found = getattr(layer, name)[0].weight.grad
            assert torch.allclose(own.pop(f"layers.{number}.{name}.weight").grad, found, rtol=1e-3, atol=1e-6)
    projection = dict(unet.encoder_hid_proj.image_projection_layers[0].named_parameters())
    for name, parameter in own.items():
        found = projection.pop(name.removeprefix("projection.")).grad
        assert torch.allclose(parameter.grad, found, rtol=1e-3, atol=1e-6), name  # type: ignore[arg-type]
    assert not projection


def test_the_model_stays_and_the_file_holds_the_adapter(shapes: Path, encoder: Path, tmp_path: Path) -> None:
    """Keys and values begin as those of the text; the loss falls."""
    chosen = settings(shapes, encoder, tmp_path / "r", "ip-adapter.steps=60", "ip-adapter.save_every=60",
                      "ip-adapter.optimizer.learning_rate=1e-2")  # fmt: skip
    training, stage = ready(chosen)
    for own, (layer, _) in zip(stage.network.layers, attentions(stage.model.unet), strict=True):
        assert torch.equal(own.to_k_ip.weight, layer.to_k.weight)  # type: ignore[union-attr, arg-type]
    before = {name: one.detach().clone() for name, one in stage.model.unet.named_parameters()}
    training.run()
    assert all(torch.equal(before[name], one) for name, one in stage.model.unet.named_parameters())
    curve = losses(tmp_path / "r", "ip-adapter")
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    train(chosen)  # resumes at the end and writes
    file = tmp_path / "r" / "ip-adapter" / "ip-adapter.safetensors"
    found = open_image_prompt(file, stage.model.family).load(torch.float32)
    assert all(torch.equal(stage.network.state_dict()[name], one) for name, one in found.state_dict().items())
    lineage = json.loads(read_header(file)[1][LINEAGE])
    assert (lineage["stage"], lineage["parents"]) == ("ip-adapter", ["sd15"])


def test_an_interrupted_run_ends_in_the_same_bytes(shapes: Path, encoder: Path, tmp_path: Path) -> None:
    whole, parts = whole_and_parts(lambda output: settings(shapes, encoder, output, *ALL), tmp_path)
    file = Path("ip-adapter") / "ip-adapter.safetensors"
    assert (parts / file).read_bytes() == (whole / file).read_bytes()
    check_golden("ip-adapter", losses(whole, "ip-adapter"))
    curve = losses(whole, "ip-adapter")
    for name, extra in {"b": "ip-adapter.checkpointing=true", "c": "data.cache=true"}.items():
        train(settings(shapes, encoder, tmp_path / name, *ALL, extra, "ip-adapter.steps=2"))
        assert losses(tmp_path / name, "ip-adapter") == pytest.approx(curve[:2], rel=0.1 if name == "c" else 1e-4)


def test_what_must_stay(shapes: Path, encoder: Path, tmp_path: Path) -> None:
    """The image encoder may move, but another one does not fit what was learned."""
    short = ["ip-adapter.steps=2", "ip-adapter.save_every=1"]
    interrupted(settings(shapes, encoder, tmp_path / "r", *short), after=2)
    other = image_prompts.encoder()
    with torch.no_grad():
        other.visual_projection.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    for override, message in {
        "ip-adapter.tokens=8": "ip-adapter.tokens is 8, not None",
        "ip-adapter.kind=plus": "ip-adapter.kind is plus, not base",
        f"ip-adapter.encoder={tmp_path / 'other'}": r"ip-adapter.encoder \(digest of its weights\) is \w+, not \w+;",
    }.items():
        with pytest.raises(LdmError, match=message):
            train(settings(shapes, encoder, tmp_path / "r", *short, override))
    shutil.copytree(encoder, tmp_path / "moved")
    train(settings(shapes, tmp_path / "moved", tmp_path / "r", *short))


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_what_is_dropped(shapes: Path, encoder: Path, tmp_path: Path, kind: str) -> None:
    """An image is dropped alone, or together with its caption; it has then no features, or the patches of no image."""
    training, stage = ready(settings(shapes, encoder, tmp_path / "r", f"ip-adapter.kind={kind}",
                                     "ip-adapter.drop_image=0", "ip-adapter.drop_caption=[0]",
                                     "ip-adapter.drop_both=0.5"))  # fmt: skip
    batch = next(training.batches(0))[0]
    said = stage.said(batch, stage.dropout)
    none = stage.encoder.blank_patches() if kind == "plus" else torch.zeros(())
    gone = (said.more["image features"] == none).flatten(1).all(dim=1)
    assert 0 < gone.sum() < len(gone)
    assert torch.equal(gone, said.dropped[:, 0])


def test_images_are_prepared_as_in_pipelines() -> None:
    """Up to the rounding of pixels, twice by 1/255 of the colours' spread of about 0.27."""
    for width, height in ((64, 64), (72, 48), (40, 100), (32, 32)):
        noise = (128 + 30 * torch.randn(40, 24, 3)).clamp(0, 255).byte()  # no colour is clipped between two passes
        image = Image.fromarray(noise.numpy()).resize((width, height), Image.Resampling.BICUBIC)
        found = prepared_pixels(to_tensor([image], width, height), 32)
        assert torch.allclose(found[0], prepared(image, 32), atol=0.05)


def test_previews_show_image_prompt_and_none(
    shapes: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each prompt that is configured; the stage's own image encoder serves them."""
    monkeypatch.delattr("pipelines.image_prompts.load_image_encoder")
    seen: list[list[str]] = []

    train(settings(shapes, encoder, tmp_path / "r", "ip-adapter.steps=1", "precision=bf16",
                   "ip-adapter.prompts=[a, b, c, d, e]"), noting(seen))  # fmt: skip
    assert seen == [["batch", "image_encoder", "image_prompt", "ip_adapter", "steps"], ["batch", "steps"]] * 5
    assert (tmp_path / "r" / "ip-adapter" / "previews" / "step-00000001.png").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ip-adapter.encoder=null", "ip-adapter.encoder is not set: image encoder"),
        ("ip-adapter.encoder=nowhere", "nowhere"),
        ("ip-adapter.source=OTHER", "ip-adapter.source: OTHER is no IP-Adapter"),
        ("ip-adapter.source=ink", "adapters/ink.safetensors is no IP-Adapter"),
        ("ip-adapter.train_text=true", "the text encoders stay as they are here"),
    ],
)
def test_bad_input(shapes: Path, encoder: Path, tmp_path: Path, override: str, message: str) -> None:
    other = encoder / "model.safetensors"
    with pytest.raises(LdmError) as caught:
        chosen = settings(shapes, encoder, tmp_path / "r", override.replace("OTHER", str(other)))
        check_bounds(chosen)
        check_paths(chosen)
        train(chosen)
    assert message.replace("OTHER", str(other)) in str(caught.value)
