"""The fields of AUTOMATIC1111's requests as settings of a job: each one means something, is harmless, or is refused.

What a request leaves out has the defaults of `ldm generate`, but for the schedule type of a sampler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ldm.errors import LdmError, suggestion
from ldm.images import load_image
from ldm.sampling.scheduler_names import A1111_NAMES, plain, scheduler_named
from ldm.server.a1111_masks import MaskedPart, MaskSettings, inpainting, resized
from ldm.server.limits import check_most
from ldm.server.reading import image_text, uploaded
from ldm.server.service import Service
from ldm.server.uploads import RequestUploads
from pipelines.a1111 import AUTOMATIC, SPACING_NAMES, USUAL
from pipelines.settings import is_whole, shown

LATENT = ("Latent", "Latent (bicubic antialiased)")  # names of the enlargement of latents
LARGER = ("None", "Lanczos")  # names of that of images
SCRIPT = "controlnet"  # the only script
BALANCED = (0, "Balanced")  # the control mode in which both halves of guidance are steered
RESIZING = ("Just Resize", "Crop and Resize", "Resize and Fill")  # modes of resizing, by number
TAKEN = {  # fields that mean something here
    "prompt", "negative_prompt", "seed", "steps", "cfg_scale", "width", "height", "sampler_name", "sampler_index",
    "scheduler", "batch_size", "n_iter", "denoising_strength", "eta", "override_settings", "alwayson_scripts",
    "send_images", "force_task_id", "refiner_checkpoint", "refiner_switch_at",
}  # fmt: skip
OF_TEXT = {  # of txt2img alone
    "enable_hr", "hr_scale", "hr_upscaler", "hr_resize_x", "hr_resize_y", "hr_second_pass_steps", "hr_checkpoint_name",
    "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt",
}  # fmt: skip
OF_IMAGES = {  # of img2img alone
    "init_images", "resize_mode", "image_cfg_scale", "mask", "mask_blur", "mask_blur_x", "mask_blur_y",
    "inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding", "inpainting_mask_invert", "include_init_images",
}  # fmt: skip
WITHOUT_EFFECT = {  # fields whose every value changes nothing: nothing is saved here, and no override is kept
    "do_not_save_samples", "do_not_save_grid", "override_settings_restore_afterwards", "subseed", "script_args",
}  # fmt: skip
HARMLESS: dict[str, tuple[Any, ...]] = {  # values of other fields that change nothing
    "styles": ([],), "restore_faces": (False,), "tiling": (False,), "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1), "seed_resize_from_w": (0, -1), "s_churn": (0,), "s_tmin": (0,), "s_tmax": (0,),
    "s_noise": (1,), "s_min_uncond": (0,), "script_name": ("",), "save_images": (False,), "infotext": ("",),
    "comments": ({},), "disable_extra_networks": (False,), "firstphase_width": (0,), "firstphase_height": (0,),
    "initial_noise_multiplier": (1,), "latent_mask": ("",), "mask_round": (True,), "firstpass_image": ("",),
}  # fmt: skip
REMEDY = {  # what to do in place of a field that is refused, if not to leave it out
    "styles": "write their words into the prompt",
    "subseed_strength": "variations of a seed do not exist here",
    "script_name": "scripts do not run here; to outpaint, send margins to /v1/jobs",
    "save_images": "the server keeps no images; take those of the answer",
    "infotext": "give the settings themselves",
}
SAME_PASS = {  # fields of the second pass, which has the values of the first: what says so
    "hr_checkpoint_name": "Use same checkpoint", "hr_sampler_name": "Use same sampler",
    "hr_scheduler": "Use same scheduler",
}  # fmt: skip
LIKE_FIRST = {  # field of the second pass -> of the first
    "hr_sampler_name": "sampler_name", "hr_scheduler": "scheduler", "hr_prompt": "prompt",
    "hr_negative_prompt": "negative_prompt", "hr_second_pass_steps": "steps",
}  # fmt: skip
PLAIN = ("prompt", "negative_prompt", "steps", "width", "height")  # fields that jobs have by the same names
ETA = ("ddim", "tcd")  # schedulers that read eta
ANCESTRAL = ("euler-a", "dpm2-a")  # whose eta is 1 here


@dataclass(frozen=True)
class ImageRequest:
    """A request of AUTOMATIC1111's API as settings of a job, and what is done with its images."""

    settings: dict[str, Any]
    per_batch: int = 1  # images that the client calls a batch
    task: str = ""  # the name that the client gave it
    send: bool = True  # whether the answer has the images
    inpainting: MaskedPart | None = None  # where the made images belong


def image_request(given: Mapping[str, Any], service: Service, share: RequestUploads, images: bool) -> ImageRequest:
    """A request of img2img (`images`) or txt2img; its images are counted in a share while they are read.

    Raises:
        LdmError: a field is not known, not possible here, or its value is not allowed.
        NotTakenError: as `RequestUploads.take`.
    """
    found = {name: value for name, value in given.items() if value is not None}
    _check_fields(found, images)
    for name in ("prompt", "negative_prompt"):
        if not isinstance(found.get(name, ""), str):
            raise LdmError(f"{name}: a text is needed; send a request for each prompt")
    settings: dict[str, Any] = {"prompt": ""}
    settings |= {name: found[name] for name in PLAIN if name in found}
    if "cfg_scale" in found:
        settings["guidance"] = found["cfg_scale"]
    if found.get("seed", -1) != -1:
        settings["seed"] = found["seed"]
    settings |= _sampling(found) | _overrides(found, service) | _refiner(found, service)
    _size(found, service)  # before images are resized
    per_batch, rounds = (_whole(found, name, 1, 1) for name in ("batch_size", "n_iter"))
    settings["n"] = per_batch * rounds
    area = None
    if images:
        start, area = _start(found, service, share)
        settings |= start
    elif _flag(found, "enable_hr"):
        settings |= _second_pass(found, service)
    settings |= _control(found, service, share, settings)
    task = found.get("force_task_id", "")
    if not isinstance(task, str) or len(task) > 100:
        raise LdmError("force_task_id: a text of at most 100 characters is needed")
    return ImageRequest(settings, per_batch, task, _flag(found, "send_images", True), area)


def _check_fields(found: Mapping[str, Any], images: bool) -> None:
    """Raise unless each field is known here and none asks for what does not exist."""
    own, other = (OF_IMAGES, OF_TEXT) if images else (OF_TEXT, OF_IMAGES)
    for name, value in found.items():
        if name in TAKEN or name in own or name in WITHOUT_EFFECT:
            continue
        if name in other:
            if name not in ("enable_hr", "init_images", "mask") or not value:
                continue  # means nothing without those
            raise LdmError(f"{name}: it belongs to {'txt2img' if images else 'img2img'}")
        if name not in HARMLESS:
            known = suggestion(name[:100], sorted({*TAKEN, *own, *HARMLESS}))
            raise LdmError(f"field {name[:100]} is not known; {known}")
        if value not in HARMLESS[name]:
            raise LdmError(f"{name} {shown(value):.100} is not possible here; {REMEDY.get(name, 'leave it out')}")


def _whole(found: Mapping[str, Any], name: str, usual: int, least: int = 0, most: int = 2**20) -> int:
    value = found.get(name, usual)
    if not is_whole(value) or not least <= value <= most:
        raise LdmError(f"{name} {shown(value):.100}: a whole number from {least} to {most} is needed")
    return int(value)


def _number(found: Mapping[str, Any], name: str, usual: float) -> float:
    value = found.get(name, usual)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise LdmError(f"{name} {shown(value):.100}: a number is needed")
    return float(value)


def _flag(found: Mapping[str, Any], name: str, usual: bool = False) -> bool:
    value = found.get(name, usual)
    if value not in (True, False):
        raise LdmError(f"{name} {shown(value):.100}: true or false is needed")
    return bool(value)


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name, "")
    if not isinstance(value, str) or len(value) > 4000:
        raise LdmError(f"{name}: a text is needed")
    return value


def _size(found: Mapping[str, Any], service: Service) -> tuple[int, int]:
    """Width and height of a request, by default the model's."""
    usual = service.engine.pipeline.model.family.size
    width, height = _whole(found, "width", usual, 1), _whole(found, "height", usual, 1)
    check_most(("pixels", width * height, service.limits.pixels))
    return width, height


# --- sampling ---------------------------------------------------------------------------------------------------------


def _sampling(found: Mapping[str, Any]) -> dict[str, Any]:
    """Scheduler, spacing and eta."""
    name, schedule = _text(found, "sampler_name") or _text(found, "sampler_index"), _text(found, "scheduler")
    scheduler, spacing = scheduler_named(name) if name else (None, None)
    chosen = _spacing(schedule, scheduler) if name or schedule else None
    settings: dict[str, Any] = {"scheduler": scheduler} if scheduler else {}
    if spacing and plain(schedule) not in ("", "automatic") and chosen != spacing:
        raise LdmError(f"sampler_name {name!r} and scheduler {schedule!r} name two schedule types; leave one out")
    if spacing or chosen:
        settings["spacing"] = spacing or chosen
    if "eta" in found:
        eta = _number(found, "eta", 0.0)
        if scheduler in ETA:
            settings["eta"] = eta
        elif scheduler in ANCESTRAL and eta != 1:
            raise LdmError(f"eta {eta:g}: the noise of {name} is not scaled here; give 1, or leave it out")
    return settings


def _spacing(schedule: str, scheduler: str | None) -> str:
    """Our spacing for a schedule type: by its label or by its name in the API."""
    if plain(schedule) in map(plain, USUAL):
        automatic = AUTOMATIC.get(A1111_NAMES.get(scheduler or "", ""), "default")
        return "default" if plain(schedule) == "uniform" else automatic
    found = {plain(label): ours for label, ours in SPACING_NAMES.items()}
    if plain(schedule) not in found:
        raise LdmError(f"scheduler {schedule[:100]!r}: {suggestion(schedule[:100], [*USUAL[1:], *SPACING_NAMES])}")
    return found[plain(schedule)]


def _overrides(found: Mapping[str, Any], service: Service) -> dict[str, Any]:
    """Settings that a request overrides for itself."""
    given = found.get("override_settings", {})
    if not isinstance(given, Mapping):
        raise LdmError("override_settings: an object is needed")
    settings = {}
    for name, value in given.items():
        if name == "CLIP_stop_at_last_layers":
            settings["clip_skip"] = _whole({name: value}, name, 1, 1, 100) - 1
        elif name == "token_merging_ratio":
            settings["merge"] = value
        else:
            check_option(name, value, service)
    return settings


def check_option(name: str, value: Any, service: Service) -> None:
    """Raise unless an option has the value that it has here.

    Raises:
        LdmError: it has another one, or does not exist.
    """
    own = options(service)
    if name not in own:
        raise LdmError(f"option {name[:100]}: it does not exist here; there are {', '.join(own)}")
    if name == "sd_model_checkpoint" and isinstance(value, str):
        model, title = str(service.about["model"]), own[name]
        if value in (model, title, own["sd_checkpoint_hash"]) or value.rpartition(".")[0] == model:
            return
        raise LdmError(f"sd_model_checkpoint {value[:100]!r}: this server has one model, {title}")
    if value is not None and value != own[name]:
        raise LdmError(
            f"option {name}: it stays {own[name]!r}, since one client's option would change the images of others; "
            "CLIP_stop_at_last_layers and token_merging_ratio are taken in override_settings of a request"
        )


def options(service: Service) -> dict[str, Any]:
    """The options that mean something here, with their values."""
    return {
        "sd_model_checkpoint": title_of(service), "sd_checkpoint_hash": service.about["model_hash"],
        "sd_vae": "Automatic", "CLIP_stop_at_last_layers": 1, "token_merging_ratio": 0.0, "samples_format": "png",
        "eta_noise_seed_delta": 0, "show_progress_every_n_steps": 1,
    }  # fmt: skip


def title_of(service: Service) -> str:
    """The title of the model: its name, and the digest of its weights."""
    return f"{service.about['model']} [{service.about['model_hash']}]"


def _refiner(found: Mapping[str, Any], service: Service) -> dict[str, Any]:
    name = _text(found, "refiner_checkpoint")
    if name in ("", "None"):
        return {}
    if not service.refiner or name not in (service.refiner, f"{service.refiner}.safetensors"):
        has = f"the server has {service.refiner}" if service.refiner else "the server has none (ldm serve --refiner)"
        raise LdmError(f"refiner_checkpoint {name[:100]!r}: {has}")
    part = _number(found, "refiner_switch_at", 1.0)
    return {"refiner_at": part} if part < 1 else {}


# --- a second pass ----------------------------------------------------------------------------------------------------


def _second_pass(found: Mapping[str, Any], service: Service) -> dict[str, Any]:
    """The settings of hires fix."""
    for name in (*SAME_PASS, "hr_prompt", "hr_negative_prompt", "hr_second_pass_steps"):
        same = ("", 0, SAME_PASS.get(name), found.get(LIKE_FIRST.get(name, "")))
        if found.get(name, "") not in same:
            raise LdmError(f"{name} {shown(found[name]):.100}: the second pass is made like the first; leave it out")
    upscaler = _text(found, "hr_upscaler") or LATENT[0]
    if upscaler not in (*LATENT, *LARGER):
        raise LdmError(f"hr_upscaler {upscaler[:100]!r} does not exist here; there are {', '.join(LATENT + LARGER)}")
    width, height = _size(found, service)
    wide, high = (_whole(found, name, 0) for name in ("hr_resize_x", "hr_resize_y"))
    factor = wide / width if wide else high / height if high else _number(found, "hr_scale", 2.0)
    if wide and high and round(height * factor) != high:
        raise LdmError(f"hr_resize_x {wide} and hr_resize_y {high}: the shape must be that of {width}×{height}")
    settings: dict[str, Any] = {"hires": factor, "hires_latents": upscaler in LATENT}
    if "denoising_strength" in found:
        settings["hires_strength"] = found["denoising_strength"]
    return settings


# --- images -----------------------------------------------------------------------------------------------------------


def _start(
    found: Mapping[str, Any], service: Service, share: RequestUploads
) -> tuple[dict[str, Any], MaskedPart | None]:
    """The image to start from and its mask, as settings; with a mask, where the made images belong."""
    given = found.get("init_images")
    if not isinstance(given, list) or len(given) != 1 or not isinstance(given[0], str):
        raise LdmError("init_images: a list of one image in base64 is needed; send a request for each image")
    image = load_image(uploaded(given[0], "init_images", share))
    mode = _mode(found.get("resize_mode", 0))
    settings: dict[str, Any] = {}
    if "denoising_strength" in found:
        settings["strength"] = found["denoising_strength"]
    if "image_cfg_scale" in found and service.engine.pipeline.model.family.task == "edit":
        settings["image_guidance"] = found["image_cfg_scale"]
    sized = "width" in found or "height" in found
    if not found.get("mask"):
        return settings | {"image": resized(image, _size(found, service), mode) if sized else image}, None
    mask = load_image(uploaded(image_text(found, "mask"), "mask", share), "L")
    blurs = [_number(found, name, _number(found, "mask_blur", 4)) for name in ("mask_blur_x", "mask_blur_y")]
    fill = _whole(found, "inpainting_fill", 0, 0, 3)
    if fill > 1:
        raise LdmError(f"inpainting_fill {fill}: latents are not filled here; give 0 (colours around) or 1 (original)")
    if min(blurs) < 0 or max(blurs) > 256:
        raise LdmError("mask_blur: a number from 0 to 256 is needed")
    asked = MaskSettings(
        (blurs[0], blurs[1]), fill == 0, bool(_whole(found, "inpainting_mask_invert", 0, 0, 1)),
        _whole(found, "inpaint_full_res_padding", 0) if _flag(found, "inpaint_full_res", True) else None, mode,
    )  # fmt: skip
    size = _size(found, service) if sized or asked.padding is not None else None
    part, hidden, area = inpainting(image, mask, asked, size)
    settings |= {"image": part, "mask": hidden}
    return settings | (dict(zip(("width", "height"), size, strict=True)) if size else {}), area


def _mode(value: Any) -> int:
    """A mode of resizing by its number or name: 0 stretches, 1 crops, 2 fills."""
    mode = RESIZING.index(value) if value in RESIZING else value
    if not is_whole(mode) or not 0 <= mode <= 2:
        raise LdmError(f"resize_mode {shown(value):.100}: 0 (stretch), 1 (crop) or 2 (fill) is needed")
    return int(mode)


def _control(
    found: Mapping[str, Any], service: Service, share: RequestUploads, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The condition images of a request, with their settings."""
    scripts = found.get("alwayson_scripts", {})
    if not isinstance(scripts, Mapping):
        raise LdmError("alwayson_scripts: an object is needed")
    units: list[Any] = []
    for name, own in scripts.items():
        arguments = own.get("args", []) if isinstance(own, Mapping) else own
        if not isinstance(arguments, list):
            raise LdmError(f"alwayson_scripts {name[:100]}: an object with a list of args is needed")
        if name.lower() == SCRIPT:
            units += arguments
        elif arguments not in ([], [False]):
            raise LdmError(f"script {name[:100]!r} does not run here; there is {SCRIPT} alone")
    active = [unit for unit in units if isinstance(unit, Mapping) and unit.get("enabled", True)]
    if not active:
        return {}
    if not service.control_models:
        raise LdmError("controlnet: the server has no control model (ldm serve --control-model)")
    ordered = sorted(active, key=lambda unit: _model(unit, service))
    places = [_model(unit, service) for unit in ordered]
    if places != list(range(len(places))):
        raise LdmError(f"controlnet: one unit for each model, from the first: {', '.join(service.control_models)}")
    size = settings.get("width"), settings.get("height")
    return {
        "control": [{"image": _condition(unit, size, share)} for unit in ordered],
        "control_scale": [unit.get("weight", 1.0) for unit in ordered],
        "control_begin": [unit.get("guidance_start", 0.0) for unit in ordered],
        "control_end": [unit.get("guidance_end", 1.0) for unit in ordered],
    }


def _model(unit: Mapping[str, Any], service: Service) -> int:
    """The number of the control model of a unit; the first if it names none."""
    names, model = service.control_models, unit.get("model", "None")
    if model in (None, "", "None"):
        return 0
    if model not in names:
        raise LdmError(f"controlnet: model {shown(model):.100} is not there; there are {', '.join(names)}")
    return names.index(model)


def _condition(unit: Mapping[str, Any], size: tuple[Any, Any], share: RequestUploads) -> Image.Image:
    """The condition image of a unit, of the size of the images to make if that is known."""
    for name, allowed, remedy in (
        ("module", ("none", "None", ""), "give the condition image itself (module none)"),
        ("control_mode", BALANCED, "control models act alike on both halves of guidance (Balanced)"),
        ("hr_option", ("Both", "HiResFixOption.BOTH"), "control models act in both passes (Both)"),
        ("mask", ("",), "masks of condition images are not read"),
    ):
        if unit.get(name) is not None and unit[name] not in allowed:
            raise LdmError(f"controlnet: {name} {shown(unit[name]):.100} is not possible here; {remedy}")
    given = unit.get("image") or unit.get("input_image")
    given = given.get("image") if isinstance(given, Mapping) else given
    if not isinstance(given, str):
        raise LdmError("controlnet: the unit has no image in base64")
    image = load_image(uploaded(given, "controlnet", share))
    width, height = size
    known = is_whole(width) and is_whole(height)
    return resized(image, (width, height), _mode(unit.get("resize_mode", 1))) if known else image
