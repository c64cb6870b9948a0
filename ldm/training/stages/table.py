"""The kinds of stages, one row each, in the order in which a run trains them.

A new kind is a file beside this one, with its stage and the functions of its row, a row here, and its section in
`sections.py`: CONTRIBUTING shows one. No other file lists the kinds.
"""

from __future__ import annotations

from typing import Any

from ldm.training.layout import ADAPTER
from ldm.training.stages import (
    adapter,
    adapter_file,
    attached,
    autoencoder,
    control,
    controlnet,
    denoiser,
    ip_adapter,
    t2i_adapter,
    text,
    textual_inversion,
    textual_inversion_file,
    trial,
)
from ldm.training.stages.stage import StageKind

KINDS: tuple[StageKind[Any], ...] = (
    StageKind(
        "autoencoder",
        build=autoencoder.build,
        learners=autoencoder.learners,
        helpers=autoencoder.helpers,
        passes=autoencoder.passes,
        captions=False,
        trial={
            "adversarial_start": 1, "kl_weight": 1e-2, "perceptual_weight": 0,
            "discriminator": {"channels": 8, "layers": 1, "groups": 4},
        },
    ),
    StageKind(
        "text",
        build=text.build,
        learners=text.learners,
        passes=text.passes,
        trial={"image_width": 32, "image_layers": 1, "image_heads": 2, "patch": 8},
    ),
    StageKind(
        "base",
        build=denoiser.build,
        learners=denoiser.learners,
        passes=denoiser.passes,
        cached=denoiser.cached,
        spreads=True,
        evaluation=denoiser.evaluation,
        prior=denoiser.prior,
        copied=lambda found: 0,
        trial={"drop_caption": [0.1, 0.1]},
    ),
    StageKind(
        "refiner",
        build=denoiser.build,
        learners=denoiser.learners,
        passes=denoiser.passes,
        cached=denoiser.cached,
        spreads=True,
        evaluation=denoiser.evaluation,
        makes_images=False,
        own_model=denoiser.refiner_model,
        adopt=denoiser.refiner_on_base,
        trial={"model": trial.REFINER},
    ),
    StageKind(
        "adapter",
        build=adapter.build,
        learners=adapter.learners,
        passes=adapter.passes,
        cached=denoiser.cached,
        evaluation=denoiser.evaluation,
        prior=denoiser.prior,
        frozen=True,
        shown=adapter.AdapterStage.shown,
        copied=adapter.copied,
        result=ADAPTER,
        write=adapter_file.write,
        trial={"layers": ["attention", "convolutions"], "rank": 4, "rank_dropout": 0.2, "max_norm": 1.0},
    ),
    StageKind(
        "textual-inversion",
        build=textual_inversion.build,
        learners=textual_inversion.learners,
        passes=textual_inversion.passes,
        cached=textual_inversion.cached,
        check=textual_inversion.check,
        prior=denoiser.prior,
        evaluation=denoiser.evaluation,
        frozen=True,
        shown=textual_inversion.TextualInversionStage.shown,
        copied=textual_inversion.copied,
        result=textual_inversion_file.RESULT,
        write=textual_inversion_file.write,
        trial={"words": {"number": {"vectors": 2}}},
    ),
    StageKind(
        "controlnet",
        build=controlnet.build,
        learners=controlnet.learners,
        passes=control.passes,
        cached=denoiser.cached,
        evaluation=denoiser.evaluation,
        makes_images=False,
        frozen=True,
        copied=attached.copied,
        result=controlnet.NAME,
        write=control.write,
        trial={"drop_condition": 0.2},
    ),
    StageKind(
        "t2i-adapter",
        build=t2i_adapter.build,
        learners=t2i_adapter.learners,
        passes=control.passes,
        cached=denoiser.cached,
        evaluation=denoiser.evaluation,
        makes_images=False,
        frozen=True,
        copied=attached.copied,
        result=t2i_adapter.NAME,
        write=control.write,
        trial={"drop_condition": 0.2},
    ),
    StageKind(
        "ip-adapter",
        build=ip_adapter.build,
        learners=ip_adapter.learners,
        helpers=ip_adapter.helpers,
        passes=ip_adapter.passes,
        cached=ip_adapter.cached,
        evaluation=denoiser.evaluation,
        makes_images=False,
        frozen=True,
        copied=attached.copied,
        result=ip_adapter.RESULT,
        write=ip_adapter.write,
        trial={"encoder": trial.ENCODER, "kind": "plus"},
    ),
)  # fmt: skip


def kind_named(name: str) -> StageKind[Any]:
    """The row of a kind, by a name that is in the table."""
    return next(kind for kind in KINDS if kind.name == name)
