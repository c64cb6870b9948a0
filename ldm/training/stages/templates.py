"""Sentences around a new word, for images that have no captions of their own: {} stands for the word.

Gal et al. 2022 (arXiv 2208.01618), section 4.2, train on sentences of this kind, which CLIP was tested with.
"""

from __future__ import annotations

from collections.abc import Sequence

TEMPLATES = {
    "object": (
        "{}", "a photo of {}", "a photo of the {}", "a photo of one {}", "a close-up of {}", "a cropped photo of {}",
        "a bright photo of {}", "a dark photo of {}", "a sharp photo of {}", "a blurry photo of {}",
        "a small photo of {}", "a large photo of {}", "an image of {}", "a view of {}", "{}, seen from the front",
        "{}, seen from the side",
    ),
    "style": (
        "in the style of {}", "an image in the style of {}", "a work in the style of {}", "{} style",
        "a drawing in the style of {}", "a painting in the style of {}", "a rendering in the style of {}",
        "a close-up in the style of {}", "a detail in the style of {}", "a scene in the style of {}",
        "a bright image in the style of {}", "a dark image in the style of {}",
    ),
}  # fmt: skip


def sentences(templates: Sequence[str]) -> list[str]:
    """The sentences of groups, by name, and those that are written out."""
    return [sentence for entry in templates for sentence in TEMPLATES.get(entry, (entry,))]
