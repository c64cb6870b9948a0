"""Captions that are lists of tags, separated by commas: shuffled and thinned out anew at each visit.

What comes of a caption depends on the seed, the image and the epoch alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ldm.data.keyed import uniform


def holds(text: str, words: str) -> bool:
    """Whether a text holds words as whole words: "sks" is not in "masks"."""
    return words in text and bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text))


@dataclass(frozen=True)
class Tags:
    """How a caption's tags change from visit to visit."""

    shuffle: bool = False  # whether they come in a new order
    keep: int = 0  # how many at the front stay as they are
    drop: float = 0.0  # part of the others that is left out
    trigger: str = ""  # words that stay in front; a tag that holds them is never left out

    @property
    def vary(self) -> bool:
        """Whether a caption has several forms."""
        return self.shuffle or self.drop > 0

    def of(self, caption: str, seed: int, key: str, epoch: int) -> str:
        """A caption at a visit."""
        if not self.vary or not caption:
            return caption
        begun = self.trigger and caption.startswith(self.trigger)
        rest = caption[len(self.trigger) :] if begun else caption
        if begun and rest.strip() and not rest.lstrip().startswith(","):  # the trigger words begin a longer tag
            begun, rest = False, caption
        tags = [tag.strip() for tag in rest.split(",") if tag.strip()]
        first, others = tags[: self.keep], list(enumerate(tags[self.keep :]))
        kept = [
            (number, tag)
            for number, tag in others
            if (self.trigger and holds(tag, self.trigger)) or uniform(seed, "drop tag", key, epoch, number) >= self.drop
        ]
        if self.shuffle:
            kept.sort(key=lambda pair: uniform(seed, "shuffle tag", key, epoch, pair[0]))
        return ", ".join([*([self.trigger] if begun else []), *first, *(tag for _, tag in kept)])


NO_TAGS = Tags()
