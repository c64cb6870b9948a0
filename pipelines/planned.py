"""Pipelines without weights, by which requests are checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unfilled import unfilled
from ldm.weights.components import Opened, build
from ldm.weights.control_models import open_control_model
from ldm.weights.sources import open_source
from pipelines.pipeline import Pipeline, named

# settings of loading that open what is beside a model
BESIDE = ("lora_dir", "partial_adapters", "embeddings", "ip_adapter", "image_encoder", "allow_pickle")
READING = ("family", "variant", "components", "allow_pickle")  # those that open a model


def planned(loading: Mapping[str, Any]) -> tuple[Opened, Pipeline]:
    """An opened model, and a pipeline of its family without weights.

    Raises:
        LdmError: a source cannot be opened.
    """
    reading = {name: loading[name] for name in READING if name in loading}
    opened = open_source(named(loading.get("source")), **reading, verify=False)
    beside = {"allow_pickle": loading.get("allow_pickle", False), "verify": False}
    refiner = open_source(loading["refiner"], **beside) if "refiner" in loading else None
    controls = [open_control_model(one, opened.family, **beside) for one in loading.get("control_models", ())]
    with unfilled():
        pipeline = Pipeline(
            LatentDiffusion.of(build(opened.family)),
            refiner=refiner and LatentDiffusion.of(build(refiner.family)),
            control_models=[one.network for one in controls],
            **{name: loading[name] for name in BESIDE if name in loading},
        )
    return opened, pipeline
