"""The result of the stage `adapter`: files with kohya's names and with diffusers', and what their headers say."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from ldm.training.layout import ADAPTER
from ldm.training.stages.adapter import AdapterStage
from ldm.weights.adapters import Adapter
from ldm.weights.adapters.writing import write_adapter
from ldm.weights.tensors import FLOATS, LINEAGE

log = logging.getLogger(__name__)
DIFFUSERS = "diffusers/pytorch_lora_weights.safetensors"
TAGS = 1000  # most tags of the captions that the header lists
WORDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}


@torch.no_grad()
def write(stage: AdapterStage, folder: Path, lineage: str) -> None:
    """Write the adapter with kohya's names and, where diffusers' format can hold it, with diffusers'."""
    section, file = stage.section, folder / ADAPTER
    stage.updated(section.steps)  # the averages of the factors may give larger changes than `max_norm`
    kind = WORDS[section.kind]
    if section.dora:
        kind = "DoRA" if kind == "LoRA" else f"{kind} (DoRA)"
    told = {LINEAGE: lineage}
    adapter = Adapter(stage.output, file, kind, "kohya", stage.adapter.stored(), metadata(stage) | told)
    dtype = FLOATS[section.dtype]
    write_adapter(adapter, stage.model, file, "kohya", dtype=dtype, overwrite=True)
    if section.kind != "lora":
        log.warning("no file with diffusers' names, which hold LoRA and DoRA alone; %s has kohya's", file)
        return
    other = folder / DIFFUSERS
    other.parent.mkdir(exist_ok=True)
    plain = Adapter(stage.output, other, kind, "diffusers", adapter.changes, told)
    write_adapter(plain, stage.model, other, "diffusers", dtype=dtype, overwrite=True)


def metadata(stage: AdapterStage) -> dict[str, str]:
    """What kohya's scripts say of a training, in their words."""
    section, optimizer = stage.section, stage.section.optimizer
    told: dict[str, Any] = {
        "ss_output_name": stage.output,
        "ss_sd_model_name": stage.model.family.name,
        "ss_seed": stage.seed,
        "ss_steps": section.steps,
        "ss_max_train_steps": section.steps,
        "ss_total_batch_size": section.batch,
        "ss_resolution": ", ".join(str(part.size) for part in section.sizes),
        "ss_optimizer": optimizer.name,
        "ss_learning_rate": stage.unet_rate,
        "ss_unet_lr": stage.unet_rate,
        "ss_text_encoder_lr": section.text_learning_rate if section.train_text else None,
        "ss_lr_scheduler": optimizer.schedule,
        "ss_lr_warmup_steps": optimizer.warmup,
        "ss_max_grad_norm": optimizer.clip,
        "ss_mixed_precision": stage.accelerator.mixed_precision,
        "ss_gradient_checkpointing": section.checkpointing,
        "ss_noise_offset": section.noise_offset or None,
        "ss_min_snr_gamma": section.min_snr or None,
        "ss_caption_dropout_rate": section.drop_caption[0],
        "ss_scale_weight_norms": section.max_norm or None,
    }
    if stage.data.images is not None:
        rows = stage.data.rows[0]
        tags = Counter[str]()
        for row in rows:
            for caption in stage.data.images.example(int(row)).captions:
                tags.update(tag for word in caption.split(",") if (tag := word.strip()))
        told["ss_num_train_images"] = len(rows)
        told["ss_tag_frequency"] = json.dumps({"images": dict(tags.most_common(TAGS))})
    return {key: str(value) for key, value in told.items()}
