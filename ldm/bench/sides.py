"""The sides of a comparison: this package's pipeline, and diffusers' pipeline on the same weights in several ways."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.bench.measuring import Side
from ldm.bench.options import OURS, PROMPT, BenchOptions, Call
from ldm.errors import LdmError
from ldm.families import FAMILIES, Family
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.clip_text import TextEncoderConfig
from ldm.training.stages.denoiser import blank
from ldm.weights.builtin import builtin
from ldm.weights.configs import write_autoencoder, write_schedule, write_text, write_unet
from ldm.weights.tokenizer import write_tokenizer
from pipelines import Pipeline
from pipelines.tuning import Tuning, dtype_named


def make_side(name: str, options: BenchOptions, call: Call, device: torch.device, dtype: torch.dtype) -> Side:
    """The side of a name: ours, or one of `RIVALS`."""
    if name == OURS:
        tuning = Tuning(compile=options.compile, quantize=options.quantize, offload="none")
        return ours(_model(options.source, device, dtype, tuning), call)
    model = _model(options.source, device, dtype, Tuning("sdpa", fused=False, offload="none"))
    if name == "plain":
        return ours(model, call)
    return theirs(model, call, dtype_named(options.rival_dtype) or dtype, name)


def named_family(source: str) -> Family | None:
    """The family that `source` names, or None if `source` is a model."""
    return None if builtin(source) else FAMILIES.get(source)


def _model(source: str, device: torch.device, dtype: torch.dtype, tuning: Tuning) -> LatentDiffusion:
    """The model of a pipeline with this tuning; if `source` names a family, a model with random weights."""
    if family := named_family(source):
        with device:  # a GPU draws random weights faster than the CPU
            model = LatentDiffusion.from_family(family)
        for module in model.modules().values():
            module.to(dtype)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # free the memory of the fp32 weights
        return tuning.apply(model)
    return Pipeline(
        source, device=device, dtype=dtype, attention=tuning.attention, quick=tuning.fused, compile=tuning.compile,
        quantize=tuning.quantize, offload=tuning.offload,
    ).model  # fmt: skip


def ours(model: LatentDiffusion, call: Call, **settings: Any) -> Side:
    """A side that runs this package's pipeline."""
    pipeline = Pipeline(model)

    def make(steps: int, tell: Callable[[], None]) -> None:
        pipeline(
            [PROMPT] * call.batch, batch=call.batch, steps=steps, guidance=call.guidance, width=call.width,
            height=call.height, seed=0, on_step=lambda _: tell(), **settings,
        )  # fmt: skip

    return make


def theirs(model: LatentDiffusion, call: Call, dtype: torch.dtype, name: str = "diffusers") -> Side:
    """A side that runs diffusers' pipeline, sharing the weights if dtype and layout allow; `name` is in `RIVALS`."""
    import diffusers
    from transformers import CLIPTokenizer

    diffusers.utils.logging.set_verbosity_error()
    family = model.family
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(write_unet(family.unet))
        vae = diffusers.AutoencoderKL.from_config(write_autoencoder(family.autoencoder))
    unet.load_state_dict(model.unet.state_dict(), assign=True)
    vae.load_state_dict(model.autoencoder.state_dict(), assign=True)
    scheduler = getattr(diffusers, family.schedule.scheduler).from_config(write_schedule(family.schedule))
    parts: dict[str, Any] = {"unet": unet.to(dtype), "vae": vae.to(dtype), "scheduler": scheduler}
    encoders = model.text_encoders
    for number, (config, tower, tokenizer) in enumerate(
        zip(encoders.configs, encoders.towers, encoders.tokenizers, strict=True)
    ):
        ending = f"_{number + 1}" if number else ""
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(tokenizer, Path(folder))
            parts[f"tokenizer{ending}"] = CLIPTokenizer.from_pretrained(folder)
        parts[f"text_encoder{ending}"] = their_tower(config, tower, tokenizer.end_id).to(dtype)
    if family.xl:
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline(**parts, **none)
    pipeline.set_progress_bar_config(disable=True)
    if name in ("channels-last", "compiled", "compiled-blocks"):
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if name == "openvino":
        pipeline.to(torch.float32)  # NumPy has no bf16; OpenVINO converts to bf16 itself
        run_by_openvino(pipeline, model, call, dtype)
    if name in ("compiled", "compiled-blocks"):
        pipeline.fuse_qkv_projections()
        blocks = name == "compiled-blocks"
        how: Any = {} if blocks or unet.device.type != "cuda" else {"mode": "max-autotune", "fullgraph": True}
        if blocks:
            pipeline.unet.compile_repeated_blocks(fullgraph=True)
        else:
            pipeline.unet = torch.compile(pipeline.unet, **how)
        pipeline.vae.decode = torch.compile(pipeline.vae.decode, **how)

    def make(steps: int, tell: Callable[[], None]) -> None:
        def after(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            tell()
            return values

        pipeline(
            [PROMPT] * call.batch, num_inference_steps=steps, guidance_scale=call.guidance, width=call.width,
            height=call.height, generator=torch.Generator().manual_seed(0), callback_on_step_end=after,
        )  # fmt: skip

    return make


def run_by_openvino(pipeline: Any, model: LatentDiffusion, call: Call, dtype: torch.dtype) -> None:
    """Run the U-Net and the decoder of diffusers' pipeline by OpenVINO, in this dtype and for calls of this shape.

    Raises:
        LdmError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError:
        raise LdmError("--against openvino needs the package openvino: pip install openvino") from None
    factor, channels = model.family.autoencoder.factor, model.family.autoencoder.latent_channels
    x, _, cond = blank(model.family, call.height // factor, call.width // factor)
    parts = [part for part in (x, cond.text, cond.pooled, cond.size) if part is not None]
    latents, *more = (torch.zeros(2 * call.batch, *part.shape[1:]) for part in parts)
    names = ("text_embeds", "time_ids")[: len(more) - 1]
    hint = {"INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32"}
    unet, vae = pipeline.unet.requires_grad_(False), pipeline.vae.requires_grad_(False)

    class Denoiser(nn.Module):
        network = unet

        def forward(self, x: Tensor, t: Tensor, text: Tensor, *added: Tensor) -> Tensor:
            named = dict(zip(names, added, strict=True))
            return self.network(x, t, text, added_cond_kwargs=named, return_dict=False)[0]

    class Decoder(nn.Module):
        network = vae

        def forward(self, z: Tensor) -> Tensor:
            return self.network.decode(z, return_dict=False)[0]

    def compiled(module: nn.Module, *inputs: Tensor) -> Callable[..., Tensor]:
        made = openvino.convert_model(module, example_input=inputs)
        made.reshape({port: list(value.shape) for port, value in zip(made.inputs, inputs, strict=True)})
        network = openvino.Core().compile_model(made, "CPU", hint)
        return lambda *values: torch.from_numpy(network([value.float().numpy() for value in values])[0].copy())

    with torch.no_grad():
        denoise = compiled(Denoiser(), latents, torch.tensor(1.0), *more)
        decode = compiled(Decoder(), latents[: call.batch, :channels])
    unet.forward = lambda x, t, encoder_hidden_states, added_cond_kwargs=None, **_: (
        denoise(x, t, encoder_hidden_states, *((added_cond_kwargs or {})[name] for name in names)),
    )
    vae.decode = lambda z, **_: (decode(z),)


def their_tower(config: TextEncoderConfig, tower: nn.Module, end_id: int) -> nn.Module:
    """transformers' text tower with the weights of our `tower`."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if config.projection else CLIPTextModel
    with torch.device("meta"):
        theirs = kind(CLIPTextConfig(**write_text(config, end_id)))
    theirs.load_state_dict(tower.state_dict(), assign=True)
    embeddings: Any = getattr(theirs, "text_model", theirs).embeddings
    embeddings.position_ids = torch.arange(config.context, device=next(tower.parameters()).device)[None]
    return theirs.eval()
