"""The small networks that the selftest trains: fields of a model and of the stages' sections."""

from __future__ import annotations

from typing import Any

SIDE = 32  # pixels of the images, which are squares
UNET = {
    "channels": [32, 64], "depth": [0, 1], "mid_depth": 1, "heads": [2, 2], "layers": 1, "groups": 8,
    "pooled_dim": 32, "size_dim": 16, "sample_size": 8,
}  # fmt: skip
AUTOENCODER = {
    "channels": [16, 32, 32], "attention": [False, False, False], "mid_attention": False, "layers": 1, "groups": 8,
    "sample_size": SIDE,
}  # fmt: skip
TOWER = {"width": 32, "layers": 2, "heads": 2, "hidden": 64, "vocab_size": 1000, "context": 16}
MODEL: dict[str, Any] = {
    "family": "sdxl", "unet": {**UNET, "text_dim": 64}, "autoencoder": AUTOENCODER,
    "text": [TOWER, {**TOWER, "projection": 32}],
}  # fmt: skip
REFINER: dict[str, Any] = {
    "unet": {**UNET, "text_dim": 32}, "autoencoder": AUTOENCODER, "text": [{**TOWER, "projection": 32}],
}  # fmt: skip
ENCODER: dict[str, Any] = {  # the image encoder, whose folder takes its place in a section
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 8, "projection_dim": 24,
}  # fmt: skip
