"""Image prompts: cross-attention that also reads the tokens of images (IP-Adapter).

Ye et al. 2023 (arXiv 2308.06721), equation 5: the result of attention on image tokens, times a weight, is added to that
on text tokens; the queries are the same. Tokens and weights are inputs of a run.

B batch, N image tokens of the U-Net, Q tokens of the image prompt, T text channels, C channels of a layer
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from ldm.models.image_prompt import ImageKeysValues, ImagePromptAdapter, attentions
from ldm.models.layers import CrossAttention
from ldm.models.surgery import rebuilt
from ldm.models.unet import UNet
from ldm.runtime.precomputing import RunInput


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """What one image prompt adds to a U-Net; its inputs in `Conditioning.more` are named after it."""

    name: str
    adapter: ImagePromptAdapter
    regional: bool = False  # whether each level of the U-Net has weights of its own, for each of its tokens

    @property
    def tokens(self) -> str:
        """The name of the image's tokens: (B, Q, T)."""
        return f"{self.name}.tokens"

    def weights(self, level: int) -> str:
        """The name of the weights for a level of the U-Net: (B, N, 1) if they are regional, else (B, 1, 1)."""
        return f"{self.name}.weights.{level}" if self.regional else f"{self.name}.weights"


def read_images(unet: UNet, prompts: tuple[ImageTokens, ...]) -> UNet:
    """A U-Net whose cross-attentions add attention on the tokens of images."""
    places = {id(layer): (number, level) for number, (layer, level) in enumerate(attentions(unet))}

    def replacements(module: nn.Module) -> dict[str, nn.Module]:
        return {
            name: ImageAttention(part, [ImageLayer(prompt, *places[id(part)]) for prompt in prompts])
            for name, part in module.named_children()
            if isinstance(part, CrossAttention)
        }

    return rebuilt(unet, replacements)


class ImageLayer(nn.Module):
    """The part of one image prompt in one cross-attention; it works once keys, values and weights are precomputed."""

    def __init__(self, prompt: ImageTokens, number: int, level: int) -> None:
        super().__init__()
        layer: ImageKeysValues = prompt.adapter.layers[number]  # type: ignore[assignment]
        self.to_k_ip, self.to_v_ip = layer.to_k_ip, layer.to_v_ip
        self.weights = RunInput(prompt.weights(level))
        self.precomputable = {"to_k_ip": prompt.tokens, "to_v_ip": prompt.tokens}

    def forward(self, q: Tensor, attention: CrossAttention) -> Tensor:
        """What is added to the result for queries (B, N, C)."""
        return self.weights() * attention.attend(q, self.to_k_ip(q), self.to_v_ip(q))


class ImageAttention(nn.Module):
    """A cross-attention of image tokens on text tokens and on the tokens of image prompts."""

    def __init__(self, attention: CrossAttention, prompts: Iterable[ImageLayer]) -> None:
        super().__init__()
        self.attention = attention
        self.prompts = nn.ModuleList(prompts)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        a = self.attention
        q = a.to_q(x)
        h = a.attend(q, a.to_k(text), a.to_v(text))
        for prompt in self.prompts:
            h = h + prompt(q, a)
        return a.to_out(h)
