"""CLIP's text tower: token ids to a hidden state for each token. Attribute names are transformers' state-dict keys.

Radford et al. 2021 (arXiv 2103.00020), section 2.4: a transformer with causal attention.

B texts, M tokens, W channels of the tower, P channels of the pooled text
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import LdmError, check_whole
from ldm.models.tokenizer import END, VOCAB_SIZE


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu}


@dataclass(frozen=True)
class TextEncoderConfig:
    """The shape of a CLIP text tower."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072  # channels inside the feed-forward layers
    activation: str = "quick_gelu"  # OpenAI's CLIP; OpenCLIP has "gelu"
    projection: int = 0  # channels of the pooled text; 0: the tower has no projection and no pooled text
    vocab_size: int = VOCAB_SIZE
    context: int = 77  # tokens of a text
    pad_token: str = END  # "!" (id 0) in the OpenCLIP towers

    def __post_init__(self) -> None:
        for name, high in (
            ("width", 16384), ("layers", 256), ("heads", 1024), ("hidden", 65536), ("vocab_size", 2**24),
            ("context", 4096),
        ):  # fmt: skip
            check_whole("text encoder", name, getattr(self, name), 1, high)
        if self.width % self.heads:
            raise LdmError(f"text encoder: {self.width} channels do not divide into {self.heads} heads")
        if self.activation not in ACTIVATIONS:
            known = " and ".join(map(repr, ACTIVATIONS))
            raise LdmError(f"text encoder: activation {self.activation!r}; known are {known}")
        if not isinstance(self.projection, int) or not 0 <= self.projection <= 65536:
            raise LdmError(f"text encoder: projection is {self.projection!r}; it must be from 0 to 65536")

    @property
    def component(self) -> str:
        """The name of the tower's folder in a diffusers model; the tower with pooled text is `text_encoder_2`."""
        return "text_encoder_2" if self.projection else "text_encoder"

    @property
    def open_clip(self) -> bool:
        """Whether the tower is OpenCLIP's, so that original checkpoints hold it in OpenCLIP's layout."""
        return self.activation == "gelu"


def embedding(count: int, width: int) -> nn.Embedding:
    """An embedding without initial values; `fill` draws them later."""
    return nn.Embedding.from_pretrained(torch.empty(count, width), freeze=False)


class Embeddings(nn.Module):
    """Token embeddings plus position embeddings."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.token_embedding = embedding(config.vocab_size, config.width)
        self.position_embedding = embedding(config.context, config.width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # (B, M, W)


class SelfAttention(nn.Module):
    """Causal self-attention: each token attends to itself and to the tokens before it.

    It is not an `AttentionLayer`, because the exchangeable kernels of `ldm.models.attention` have no causal mask.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, heads, M, W / heads)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class CLIPFeedForward(nn.Module):
    """The feed-forward layer: linear, activation, linear."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class TextLayer(nn.Module):
    """A transformer layer: self-attention and feed-forward, each after a layer norm and with a skip connection."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.width, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.width)
        self.mlp = CLIPFeedForward(config.width, config.hidden, config.activation)
        self.layer_norm2 = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nn.Module):
    """The stack of transformer layers."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.layers))

    def forward(self, x: Tensor, count: int) -> list[Tensor]:
        """`x` (B, M, W) and the hidden states after each of the first `count` layers."""
        states = [x]
        for layer in islice(self.layers, count):
            states.append(layer(states[-1]))
        return states


class TextTower(nn.Module):
    """A tower without projection; the state at the first token `end_id` represents the whole text."""

    def __init__(self, config: TextEncoderConfig, end_id: int) -> None:
        super().__init__()
        self.end_id = end_id
        self.embeddings = Embeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)
        initialise(self, config)

    def forward(self, ids: Tensor, *layers: int) -> list[Tensor]:
        """Token ids (B, M) to the hidden states (B, M, W) after the layers of these numbers; 0 means the embeddings.

        Layers after the highest of these numbers do not run. The final layer norm is not applied.
        """
        states = self.encoder(self.embeddings(ids), max(layers))
        return [states[number] for number in layers]

    def end(self, states: Tensor, ids: Tensor) -> Tensor:
        """The state of each whole text (B, W) after the final layer norm, from the last layer's states (B, M, W)."""
        first = (ids == self.end_id).int().argmax(dim=1)
        return self.final_layer_norm(states[torch.arange(len(ids), device=ids.device), first])


class ProjectedTextTower(nn.Module):
    """A tower with a projection of the state of the whole text."""

    def __init__(self, config: TextEncoderConfig, end_id: int) -> None:
        super().__init__()
        self.text_model = TextTower(config, end_id)
        self.text_projection = nn.Linear(config.width, config.projection, bias=False)
        fill(self.text_projection.weight, config.width**-0.5)

    def forward(self, ids: Tensor, *layers: int) -> list[Tensor]:
        """See `TextTower.forward`."""
        return self.text_model(ids, *layers)

    def end(self, states: Tensor, ids: Tensor) -> Tensor:
        """The pooled text (B, P), from the last layer's states (B, M, W)."""
        return self.text_projection(self.text_model.end(states, ids))


def build_tower(config: TextEncoderConfig, end_id: int) -> TextTower | ProjectedTextTower:
    """A tower with random initial weights.

    `end_id` is the tokenizer's end token; the `eos_token_id` in configurations before 2023 is wrong (2).
    """
    return ProjectedTextTower(config, end_id) if config.projection else TextTower(config, end_id)


def initialise(tower: TextTower, config: TextEncoderConfig) -> None:
    """Random initial weights as in transformers: normal, with standard deviations that fall with the width and, in
    some matrices, with the number of layers; biases are zero."""
    deep = (2 * config.layers * config.width) ** -0.5
    spreads = {
        "token_embedding": 0.02, "position_embedding": 0.02, "q_proj": deep, "k_proj": deep, "v_proj": deep,
        "out_proj": config.width**-0.5, "fc1": (2 * config.width) ** -0.5, "fc2": deep,
    }  # fmt: skip
    for name, module in tower.named_modules():
        if isinstance(module, (nn.Embedding, nn.Linear)):
            fill(module.weight, spreads[name.rpartition(".")[2]])
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def fill(weight: Tensor, std: float) -> None:
    """Draw normal weights, unless they are on the meta device, where PyTorch would import SymPy only to do nothing."""
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)
