"""Suggestions for unknown keys of a configuration: the same word elsewhere in it, then the words of other programs.

The other programs are diffusers' training scripts, kohya's sd-scripts and OneTrainer.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from ldm.errors import suggestion

WORDS = {  # another program's word -> our key
    **dict.fromkeys(("max_train_steps", "max_steps", "num_train_steps", "train_steps"), "base.steps"),
    **dict.fromkeys(("train_batch_size", "batch_size", "effective_batch_size"), "base.batch"),
    **dict.fromkeys(("lr", "unet_lr", "unet_learning_rate"), "base.optimizer.learning_rate"),
    **dict.fromkeys(("text_encoder_lr", "text_encoder_learning_rate"), "base.text_learning_rate"),
    "train_text_encoder": "base.train_text",
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "learning_rate_scheduler"), "base.optimizer.schedule"),
    **dict.fromkeys(("lr_warmup_steps", "warmup_steps", "learning_rate_warmup_steps"), "base.optimizer.warmup"),
    **dict.fromkeys(("lr_decay_steps", "decay_steps"), "base.optimizer.cooldown"),
    **dict.fromkeys(("optimizer_type", "use_8bit_adam", "optimizer_name"), "base.optimizer.name"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), "base.optimizer.betas"),
    "adam_weight_decay": "base.optimizer.weight_decay",
    **dict.fromkeys(("adam_epsilon", "eps"), "base.optimizer.epsilon"),
    **dict.fromkeys(("max_grad_norm", "clip_grad_norm", "gradient_clip_val"), "base.optimizer.clip"),
    **dict.fromkeys(("use_ema", "ema_decay"), "base.ema.decay"),
    "gradient_checkpointing": "base.checkpointing",
    "torch_compile": "base.compile",
    **dict.fromkeys(("snr_gamma", "min_snr_gamma"), "base.min_snr"),
    **dict.fromkeys(("offset_noise", "offset_noise_weight"), "base.noise_offset"),
    **dict.fromkeys(("min_timestep", "max_timestep"), "base.timestep_range"),
    **dict.fromkeys(
        ("proportion_empty_prompts", "caption_dropout_rate", "conditioning_dropout_prob"), "base.drop_caption"
    ),
    **dict.fromkeys(("enable_xformers_memory_efficient_attention", "xformers", "sdpa"), "base.attention"),
    **dict.fromkeys(("validation_prompt", "validation_prompts", "sample_prompts"), "base.prompts"),
    **dict.fromkeys(("validation_steps", "sample_every_n_steps", "sample_after"), "base.preview_every"),
    **dict.fromkeys(("checkpointing_steps", "save_every_n_steps", "save_steps"), "base.save_every"),
    **dict.fromkeys(("checkpoints_total_limit", "save_last_n_steps", "save_total_limit"), "base.keep"),
    **dict.fromkeys(("network_dim", "lora_rank", "lora_r"), "adapter.rank"),
    **dict.fromkeys(("network_alpha", "lora_alpha"), "adapter.alpha"),
    **dict.fromkeys(("use_dora", "dora_wd", "weight_decompose"), "adapter.dora"),
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_unet_lr_ratio"), "adapter.up_rate"),
    "scale_weight_norms": "adapter.max_norm",
    **dict.fromkeys(("class_prompt", "with_prior_preservation"), "adapter.prior.prompt"),
    **dict.fromkeys(("prior_loss_weight",), "adapter.prior.weight"),
    **dict.fromkeys(("class_data_dir", "reg_data_dir"), "adapter.prior.source"),
    "num_class_images": "adapter.prior.images",
    "target_modules": "adapter.layers",
    **dict.fromkeys(("learnable_property", "use_object_template", "use_style_template"), "textual-inversion.templates"),
    **dict.fromkeys(("train_text_encoder_ti", "pivotal_tuning"), "textual-inversion.pivotal"),
    **dict.fromkeys(("controlnet_model_name_or_path", "control_net_weights"), "controlnet.source"),
    **dict.fromkeys(("conditioning_image_column", "conditioning_data_dir"), "data.beside.condition"),
    "mixed_precision": "precision",
    **dict.fromkeys(("output_dir", "output_name", "workspace_dir"), "output"),
    **dict.fromkeys(("report_to", "log_with"), "trackers"),
    **dict.fromkeys(("pretrained_model_name_or_path", "base_model_name", "ckpt"), "model.source"),
    **dict.fromkeys(("vae", "pretrained_vae_model_name_or_path"), "model.components"),
    **dict.fromkeys(("prediction_type", "v_parameterization", "zero_terminal_snr"), "model.schedule"),
    **dict.fromkeys(
        ("train_data_dir", "dataset_name", "instance_data_dir", "image_dir", "data_dir", "dataset"), "data.source"
    ),
    **dict.fromkeys(("random_flip", "flip_aug"), "data.flip"),
    **dict.fromkeys(("num_repeats", "dataset_repeats", "class_tokens", "loss_weight"), "data.folders"),
    **dict.fromkeys(("shuffle_caption", "tag_shuffling", "enable_tag_shuffling"), "data.shuffle_tags"),
    **dict.fromkeys(("keep_tokens", "keep_tags_count"), "data.keep_tags"),
    **dict.fromkeys(("caption_tag_dropout_rate", "tag_dropout", "tag_dropout_probability"), "data.drop_tags"),
    **dict.fromkeys(("caption_prefix", "instance_prompt", "instance_token"), "data.trigger"),
    **dict.fromkeys(("masked_loss", "masked_training", "alpha_mask", "mask_dir"), "data.beside.mask"),
    "unmasked_weight": "base.outside_mask",
    **dict.fromkeys(("original_image_column", "input_image_column"), "data.beside.before"),
    "edited_image_column": "data.image_column",
    "edit_prompt_column": "data.caption_column",
    **dict.fromkeys(("center_crop", "random_crop"), "data.crop"),
    **dict.fromkeys(("enable_bucket", "aspect_ratio_bucketing"), "data.buckets"),
    "bucket_reso_steps": "data.bucket_step",
    **dict.fromkeys(
        ("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "latent_caching"), "data.cache"
    ),
    **dict.fromkeys(("dataloader_num_workers", "max_data_loader_n_workers", "num_workers"), "data.workers"),
}
ANSWERS = {  # a word that is not just another name for a key -> what to do
    **dict.fromkeys(("resolution", "image_size"), "write base.sizes=[{size: 512}]"),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "gradient_accumulation"),
        "base.batch is the whole update; base.micro_batch says how many of its images are computed at a time",
    ),
    **dict.fromkeys(
        ("num_train_epochs", "max_train_epochs", "epochs", "max_epochs"),
        "base.steps counts updates of the weights: epochs × images / base.batch",
    ),
    **dict.fromkeys(
        ("resume_from_checkpoint", "resume", "continue_last_backup"), "the same command again continues a run"
    ),
    **dict.fromkeys(
        ("network_module", "network_args", "lora", "peft_type"),
        "LoRA and its kin are the stage adapter: stages=[adapter], and adapter.kind, adapter.layers, adapter.rank",
    ),
    **dict.fromkeys(
        (
            "placeholder_token",
            "token_string",
            "token_abstraction",
            "initializer_token",
            "initializer_concept",
            "init_word",
            "num_vectors",
            "num_vectors_per_token",
            "num_new_tokens_per_abstraction",
        ),
        "write textual-inversion.words={'<cat>': {initial: cat, vectors: 4}}, with stages=[textual-inversion]",
    ),
}


def hint(place: Sequence[int | str], section: list[str], known: Sequence[str]) -> str:
    """What was probably meant by the unknown key at a place.

    Args:
        place: the key and those above it.
        section: the known keys beside it.
        known: the full names of all keys.
    """
    word = str(place[-1])
    leaves: dict[str, list[str]] = {}
    for key in known:
        leaves.setdefault(key.rpartition(".")[2], []).append(key)
    if word in leaves:
        return f"did you mean {_nearest(str(place[0]), leaves[word])}?"
    if word in WORDS:
        own = f"{place[0]}.{WORDS[word].partition('.')[2]}"
        return f"did you mean {own if WORDS[word].startswith('base.') and own in known else WORDS[word]}?"
    if word in ANSWERS:
        return ANSWERS[word]
    near = difflib.get_close_matches(word, leaves, 1, 0.85)
    if near and near[0] not in section and not difflib.get_close_matches(word, section, 1, 0.85):
        return f"did you mean {_nearest(str(place[0]), leaves[near[0]])}?"
    return suggestion(word, section)


def _nearest(top: str, keys: Sequence[str]) -> str:
    """One of several keys: in the same section as the unknown one, else in the usual stage's, else the first."""
    return next((key for section in (top, "base") for key in keys if key.startswith(f"{section}.")), keys[0])
