"""The model that training starts from: read from disk or built with random weights, with the configured changes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from ldm.errors import LdmError, suggestion
from ldm.families import Family, family_named, recognised
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.surgery import replaced, widened
from ldm.training.sections import ModelSection
from ldm.weights.sources import open_source

T = TypeVar("T")


def starting_model(section: ModelSection, seed: int, place: str = "model") -> LatentDiffusion:
    """The model that a section of the configuration describes, in fp32 on the CPU.

    Args:
        section: `source` is loaded, if there is one, and its `fresh` parts are built anew; else `family` is built with
            random weights.
        seed: of random weights.
        place: the section's name, for messages.

    Raises:
        LdmError: neither source nor family is named, a field is not known, or the parts do not fit together.
    """
    family = starting_family(section, place)
    if section.source is None:
        return LatentDiffusion.from_family(family, seed)
    options: dict[str, Any] = {"family": section.family, "components": section.components}
    model = LatentDiffusion.from_pretrained(section.source, dtype=torch.float32, **options)
    if section.fresh:
        random = LatentDiffusion.from_family(family, seed)
        for name in section.fresh:
            part = {"text": "text_encoders"}.get(name, name)
            model.networks[part] = random.networks[part]
    if family.unet.in_channels > model.unet.config.in_channels:
        wide = replaced(model.unet, conv_in=widened(model.unet.conv_in, family.unet.in_channels))
        wide.config = family.unet
        model.networks["unet"] = wide
    model.family = family
    return model


def starting_family(section: ModelSection, place: str = "model") -> Family:
    """The family of `starting_model`, without its weights; errors are the same."""
    name = section.family or section.usual
    if section.source is None and name is None:
        raise LdmError(f"{place}: name a source to start from, or a family to build (sd15, sdxl, …)")
    if section.source is None:
        if section.components or section.fresh:
            raise LdmError(f"{place}.components and {place}.fresh need a source for the rest")
        assert name
        return _changed(family_named(name), section, place)
    wider = section.unet.keys() == {"in_channels"} and "unet" not in section.fresh
    shapes = [
        name
        for name in ("unet", "autoencoder", "text")
        if getattr(section, name) and name not in section.fresh and not (name == "unet" and wider)
    ]
    if shapes:
        raise LdmError(
            f"{place}.{shapes[0]}: the networks of {section.source} cannot change shape; leave it out, or begin anew: "
            f"{place}.fresh=[{shapes[0]}]"
        )
    opened = open_source(section.source, family=section.family, components=section.components, verify=False)
    family = _changed(opened.family, section, place)
    return recognised(_checked_wider(family, opened.family, section, place)) if wider else family


def _checked_wider(family: Family, before: Family, section: ModelSection, place: str) -> Family:
    """The family of a U-Net that reads more channels than before, unless it reads fewer."""
    if family.unet.in_channels < before.unet.in_channels:
        raise LdmError(
            f"{place}.unet.in_channels is {family.unet.in_channels}: the U-Net of {section.source} reads "
            f"{before.unet.in_channels}; leave it out, or give it more"
        )
    return family


def _changed(family: Family, section: ModelSection, place: str) -> Family:
    """A family with the fields that a section names; "custom" if its networks differ."""
    texts = section.text or [{} for _ in family.text]
    if len(texts) != len(family.text):
        raise LdmError(f"{place}.text: {len(texts)} entries, but {family.name} has {len(family.text)} text encoders")
    schedule = with_changes(family.schedule, section.schedule, f"{place}.schedule")
    if schedule.zero_terminal_snr and not schedule.parametrisation.defined_at_zero_snr:
        raise LdmError(
            f"{place}.schedule: {schedule.prediction_type} cannot be learned from pure noise, which zero_terminal_snr "
            "begins with; set prediction_type to v_prediction"
        )
    different = bool(section.unet or section.autoencoder or any(texts))
    silent = family.zero_empty_prompt if section.zero_empty_prompt is None else section.zero_empty_prompt
    return replace(
        family,
        name="custom" if different else family.name,
        unet=with_changes(family.unet, section.unet, f"{place}.unet"),
        autoencoder=with_changes(family.autoencoder, section.autoencoder, f"{place}.autoencoder"),
        text=tuple(
            with_changes(config, change, f"{place}.text") for config, change in zip(family.text, texts, strict=True)
        ),
        schedule=schedule,
        zero_empty_prompt=silent,
        preview=() if section.autoencoder else family.preview,
    )


def with_changes(config: T, changes: dict[str, Any], place: str) -> T:
    """A configuration with some fields changed, all of them checked.

    Raises:
        LdmError: a field is not known, has another type, or a value that the configuration refuses.
    """
    known = [field.name for field in fields(config)]  # type: ignore[arg-type]
    for name in changes:
        if name not in known:
            raise LdmError(f"{place}.{name} is not known; {suggestion(name, known)}")
    merged = {name: getattr(config, name) for name in known} | changes
    try:
        return TypeAdapter(type(config)).validate_python(merged)
    except ValidationError as error:
        problem = error.errors()[0]
        if problem["type"] == "value_error":  # raised by the configuration itself
            raise LdmError(f"{place}: {problem['ctx']['error']}") from None
        where = ".".join(str(part) for part in (place, *problem["loc"]))
        raise LdmError(f"{where} is {problem['input']!r}: {problem['msg']}") from None
