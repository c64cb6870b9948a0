"""Settings that mean something else in other programs: translated into ours, or answered with what to give in place.

`names` in `pipelines.settings` holds the names whose values mean the same here. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import index
from typing import Any

from ldm.errors import LdmError
from ldm.sampling.scheduler_names import scheduler_named, spacing_named

Values = dict[str, Any]  # settings by our names


def _answer(name: str, remedy: str) -> Callable[[Any], Values]:
    """What raises the remedy for a setting that does not exist here."""

    def answered(value: Any) -> Values:
        raise LdmError(f"{name}: {remedy}")

    return answered


def _flag(name: str, harmless: bool, remedy: str) -> Callable[[Any], Values]:
    """What leaves out a flag that changes nothing, and raises the remedy for its other value."""

    def answered(value: Any) -> Values:
        if value is not harmless:
            raise LdmError(f"{name} {value!r}: {remedy}")
        return {}

    return answered


def _less(first: int, sign: int) -> Callable[[Any], Values]:
    """The number of left-out layers from the number of a layer, counted from `first` in the direction of `sign`."""

    def counted(value: Any) -> Values:
        try:
            return {"clip_skip": sign * index(value) - first}
        except TypeError:
            return {"clip_skip": value}  # refused by its bounds

    return counted


def _spaced(spacing: str) -> Callable[[Any], Values]:
    return lambda wanted: {"spacing": spacing} if wanted else {}


def _seed(generator: Any) -> Values:
    """The seed of a torch generator, or of several; numbers stay as they are."""
    if isinstance(generator, (list, tuple)):
        return {"seed": tuple(_seed(one)["seed"] for one in generator)}
    if not hasattr(generator, "initial_seed"):
        return {"seed": generator}
    seed = generator.initial_seed()
    fresh = type(generator)(device=generator.device).manual_seed(seed)
    if not (generator.get_state() == fresh.get_state()).all():
        raise LdmError(
            "generator: numbers were drawn from it already, and an image depends on its seed alone; give a new "
            "generator for each call, or seed="
        )
    return {"seed": seed}


def generators(value: Any) -> Iterator[Any]:
    """The torch generators in a value of `generator`."""
    for one in value if isinstance(value, (list, tuple)) else (value,):
        if hasattr(one, "initial_seed"):
            yield one


def _levels(sigmas: Any) -> Values:
    """Noise levels without the zero at their end, which diffusers wants and we add; they give the number of steps."""
    if not isinstance(sigmas, (list, tuple)):
        return {"spacing": sigmas}
    levels = tuple(sigmas[:-1] if sigmas and sigmas[-1] == 0 else sigmas)
    return {"spacing": levels, "steps": len(levels)}


def _output(kind: Any) -> Values:
    if kind == "latent":
        raise LdmError("output_type 'latent': give output='latents', and take the latents of the result")
    if kind != "pil":
        raise LdmError(f"output_type {kind!r}: images are PIL images; numpy.asarray(image) is one as an array")
    return {}


_STEP = "give on_step=, a function of one ldm.sampling.loop.Step (index, count, time, latents), called after each step"
_TEXT = "prompts are encoded here; give prompt, negative and the like as texts"
_PARTS = "name a file or folder: components={'vae': PATH}"
_ANSWERS = {
    "denoising_start": "the refiner takes over within one call: give Pipeline a refiner=, and the call refiner_at=0.8",
    "batch_size": "give n, the images of each prompt, or batch, how many are made at a time",
    "latents": "noise depends on seed; rng='diffusers' draws that of diffusers",
    "timesteps": "give noise levels, such as spacing=(14.6, 7, 3, 1, 0.1), or the name of a spacing",
    "padding_mask_crop": "crop image and mask first",
    **dict.fromkeys(
        ("callback_on_step_end", "callback_on_step_end_tensor_inputs", "callback", "callback_steps"), _STEP
    ),
    **dict.fromkeys(
        ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"), _TEXT
    ),
    "cross_attention_kwargs": "LoRA and the like are named with their weights: adapters={'style.safetensors': 0.8}",
    "ip_adapter_image_embeds": "images are encoded here; give them as image_prompt",
    **dict.fromkeys(("vae", "unet", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"), _PARTS),
    "device_map": "give device= and offload=",
    "subfolder": "name the model's own folder as source",
}
TRANSLATED: dict[str, Callable[[Any], Values]] = {  # name in other programs -> our settings for its value
    **{name: _answer(name, remedy) for name, remedy in _ANSWERS.items()},
    "generator": _seed,
    "sigmas": _levels,
    "stop_at_clip_layer": _less(1, -1),  # ComfyUI: -1 is the last layer
    "CLIP_stop_at_last_layers": _less(1, 1),  # AUTOMATIC1111: 1 is the last layer
    "use_karras_sigmas": _spaced("karras"),
    "use_exponential_sigmas": _spaced("exponential"),
    "use_beta_sigmas": _spaced("beta"),
    "output_type": _output,
    "return_dict": _flag("return_dict", True, "a Result is returned; its images are result.images"),
    "use_safetensors": _flag("use_safetensors", True, "give allow_pickle=True to read .ckpt and .bin"),
    "low_cpu_mem_usage": _flag("low_cpu_mem_usage", True, "files are mapped into memory; leave it out"),
    "requires_safety_checker": _flag("requires_safety_checker", False, "name a safety checker: safety="),
}


def with_own_scheduler(values: Values) -> Values:
    """Settings with our names of scheduler and spacing; a spacing in the scheduler's name becomes a setting.

    Raises:
        LdmError: the scheduler does not exist here, or its name and the spacing contradict each other.
    """
    found = dict(values)
    if isinstance(found.get("spacing"), str):
        found["spacing"] = spacing_named(found["spacing"])
    scheduler = found.get("scheduler")
    if isinstance(scheduler, str):
        found["scheduler"], spacing = scheduler_named(scheduler)
        if spacing and found.setdefault("spacing", spacing) != spacing:
            raise LdmError(
                f"scheduler {scheduler!r} has the spacing {spacing}, and spacing {found['spacing']!r} is given too; "
                "leave one out"
            )
    return found
