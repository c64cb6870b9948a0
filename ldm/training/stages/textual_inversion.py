"""The stage `textual-inversion`: token vectors of new words are learned; U-Net and text encoders stay as they are.

Gal et al. 2022 (arXiv 2208.01618). With an adapter in the same run it is pivotal tuning (Roich et al. 2021, arXiv
2106.05744, for GANs).

B batch, C latent channels, h×w height and width of the latents, N vectors of a word, W channels of a text tower
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from ldm.data.keyed import uniform
from ldm.data.loader import Batch
from ldm.errors import LdmError, listing
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.text import TextEncoders
from ldm.models.textual_inversion import (
    LearnedWord,
    WordTokenizer,
    finder,
    plain,
    tables,
    with_vectors,
    with_words,
)
from ldm.training.conditioning import Prompt
from ldm.training.images import TrainingImages
from ldm.training.stages import adapter, denoiser
from ldm.training.stages.adapter import AdapterStage, TrainedAdapter
from ldm.training.stages.denoiser import Joint
from ldm.training.stages.sections import NewWordSection, TextualInversionSection
from ldm.training.stages.stage import Cached, ForwardPasses, Learner, Loss, StageInputs, freeze
from ldm.training.stages.templates import sentences
from ldm.weights.components import Components

log = logging.getLogger(__name__)


class TrainedWords(nn.Module):
    """The trained vectors of new words, and the adapter beside them; the forward pass is that of the changed networks.

    The adapter has no changes where vectors alone are trained. The networks are no sub-modules, so that their frozen
    weights are neither saved nor exchanged between processes.
    """

    def __init__(
        self, words: Mapping[str, int], rows: Sequence[Tensor], changes: TrainedAdapter, keep_norm: bool
    ) -> None:
        """Args:
        words: the number of vectors of each word.
        rows: initial vectors of all words, (all N, W) for each text tower.
        changes: of the model.
        keep_norm: whether vectors stay as long as they were at first.
        """
        super().__init__()
        self.keep_norm = keep_norm
        self.words = dict(words)
        self.adapter = changes
        parts = changes.parts
        towers = [config.component for config in parts.text_encoders.configs]
        self.vectors = nn.ParameterDict(dict(zip(towers, map(nn.Parameter, rows), strict=True)))
        for tower, own in zip(towers, rows, strict=True):
            self.register_buffer(f"norms_{tower}", own.norm(dim=1, keepdim=True))  # of the initial vectors
        named = [((word,), count) for word, count in words.items()]
        encoders = with_vectors(parts.text_encoders, named, list(self.vectors.values()))
        self.around = (Joint(parts.unet.train(), encoders, parts.family),)  # a tuple, which hides it

    def forward(self, *inputs: Any) -> Tensor:
        """Those of `Joint` to the prediction (B, C, h, w)."""
        return self.around[0](*inputs)

    def rows(self) -> dict[str, Tensor]:
        """The vectors as they are used: (all N, W) for each text tower."""
        found = {tower: rows.detach().clone() for tower, rows in self.vectors.items()}
        if not self.keep_norm:
            return found
        return {
            tower: rows * (self.get_buffer(f"norms_{tower}") / rows.norm(dim=1, keepdim=True))
            for tower, rows in found.items()
        }

    @torch.no_grad()
    def rescale(self) -> None:
        """Make each vector as long as it was at first, if they stay so."""
        for tower, rows in self.rows().items():
            self.vectors[tower].copy_(rows)

    def learned(self) -> list[LearnedWord]:
        """The words with their vectors."""
        rows = [tower.split(list(self.words.values())) for tower in self.rows().values()]
        return [LearnedWord((word,), own) for word, own in zip(self.words, zip(*rows, strict=True), strict=True)]


# --- the vectors ------------------------------------------------------------------------------------------------------


def initial(place: str, word: str, section: NewWordSection, encoders: TextEncoders) -> list[Tensor]:
    """The vectors that a word begins with, (N, W) for each text tower, in fp32.

    Embeddings of the initial words, in turn; without any, random ones with the mean and the spread of all embeddings.

    Raises:
        LdmError: there are fewer vectors than tokens of the initial words, or more than a text has tokens.
    """
    found = []
    for table, tokenizer in zip(tables(encoders), encoders.tokenizers, strict=True):
        weight = table.weight.detach().float()
        ids = tokenizer.encode([section.initial])[0]
        count = section.vectors or len(ids) or 1
        if count < len(ids):
            raise LdmError(
                f"{place}.words: {word} has {count} vectors, and its initial words ({section.initial}) are {len(ids)} "
                f"tokens; set vectors={len(ids)}, or choose fewer words"
            )
        if ids:
            found.append(weight[[ids[n % len(ids)] for n in range(count)]])
        else:
            drawn = torch.randn(count, weight.shape[1]).to(weight.device)
            found.append(weight.mean(dim=0) + weight.std(dim=0) * drawn)
    room = min(config.context for config in encoders.configs) - 2
    if len(found[0]) > room:
        raise LdmError(f"{place}.words: {word} has {len(found[0])} vectors; a text has at most {room} tokens")
    return found


def learners(section: TextualInversionSection, parts: Components) -> dict[str, Learner]:
    """The vectors of the new words and, with `pivotal`, an adapter, with initial values from PyTorch's generator."""
    freeze(parts)
    if section.pivotal:
        optimizer = section.optimizer.model_copy(update={"learning_rate": section.adapter_learning_rate})
        beside = adapter.learners(section.model_copy(update={"optimizer": optimizer}), parts)["unet"]
    else:
        beside = Learner(TrainedAdapter(parts, {}, False), [])
    rows = {name: initial(section.place, name, one, parts.text_encoders) for name, one in section.words.items()}
    counts = {name: len(own[0]) for name, own in rows.items()}
    changes = cast("TrainedAdapter", beside.module)
    first = [torch.cat(own) for own in zip(*rows.values(), strict=True)]
    words = TrainedWords(counts, first, changes, section.keep_norm)
    vectors = (list(words.vectors.values()), section.optimizer.learning_rate)
    return {"unet": Learner(words, beside.groups, [vectors, *beside.undecayed], around=words.around[0])}


def passes(
    section: TextualInversionSection, parts: Components, found: Mapping[str, Learner], size: int, cached: bool
) -> ForwardPasses:
    """Those of the denoiser with text encoders that are trained."""
    joint = found["unet"].around
    assert isinstance(joint, Joint)
    own = {"unet": joint.unet, "text_encoders": joint.text_encoders}
    trained = section.model_copy(update={"train_text": True})
    return denoiser.passes(trained, Components(parts.family, {**parts.networks, **own}), found, size, cached)


def copied(found: Mapping[str, Learner]) -> int:
    """The numbers of the weights that the adapter beside the words changes, as in the stage `adapter`."""
    words = found["unet"].module
    assert isinstance(words, TrainedWords)
    return words.adapter.copied()


def cached(section: TextualInversionSection) -> Cached:
    """Latents alone: captions are encoded with the vectors as they are."""
    return Cached(latents=True)


# --- the stage --------------------------------------------------------------------------------------------------------


class TextualInversionStage(AdapterStage):
    """Training of new words on noisy latents."""

    section: TextualInversionSection

    def __init__(self, given: StageInputs[TextualInversionSection]) -> None:
        """Raises:
        LdmError: see `AdapterStage`, `initial` and `check_lengths`.
        """
        super().__init__(given, learners)
        self.sentences = sentences(self.section.templates)
        self.alone = {plain(word) for word in (*self.section.words, given.data.section.trigger)} - {""}
        captions = given.data.images.captions() if given.data.images else []
        longest = max(self.sentences, key=len, default="{}")
        check_lengths([self.in_sentence(longest, caption) for caption in captions], self.words, self.section.place)

    @property
    def words(self) -> TrainedWords:
        """The trained words."""
        module = self.accelerator.unwrap_model(self.players["unet"].module)
        assert isinstance(module, TrainedWords)
        return module

    @property
    def adapter(self) -> TrainedAdapter:
        """The trained changes beside the words."""
        return self.words.adapter

    @property
    def unet_rate(self) -> float:
        """The learning rate of the U-Net's adapter."""
        return self.section.adapter_learning_rate

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """As in `AdapterStage`, of captions in sentences."""
        return super().losses(self.told(batch), step)

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """As in `DenoiserStage`, of captions in sentences."""
        return super().validate(map(self.told, batches))

    def preview(self, batch: Batch, step: int) -> list[Image.Image]:
        """As in `DenoiserStage`, of captions in sentences."""
        return super().preview(self.told(batch), step)

    def told(self, batch: Batch) -> Batch:
        """The batch with sentences in place of captions that are a word alone, chosen by the sample and its epoch."""
        if not self.sentences:
            return batch
        drawn = [
            self.sentences[int(uniform(self.seed, "template", key, epoch) * len(self.sentences))]
            for key, epoch in zip(batch.keys, batch.epochs, strict=True)
        ]
        return replace(batch, captions=list(map(self.in_sentence, drawn, batch.captions)))

    def in_sentence(self, sentence: str, caption: str) -> str:
        """The caption, in the sentence if it is a word alone."""
        return sentence.replace("{}", caption) if plain(caption) in self.alone else caption

    def predict(self, module: nn.Module, x: Tensor, timestep: Tensor, said: Prompt) -> Tensor:
        """The prediction (B, C, h, w), of texts that are encoded with the vectors."""
        return module(x, timestep, said)

    def updated(self, step: int) -> dict[str, float]:
        """Keep the vectors' norms, if asked for, and report their mean."""
        self.words.rescale()
        norms = torch.cat([rows.norm(dim=1) for rows in self.words.rows().values()])
        return {**super().updated(step), "norms/vectors": float(norms.mean())}

    def shown(self) -> LatentDiffusion:
        """A copy of the model that knows the words, with the changes merged in."""
        changed = super().shown()
        return changed.with_networks({"text_encoders": with_words(changed.text_encoders, self.words.learned())})


def check(section: TextualInversionSection, data: TrainingImages) -> None:
    """Check that captions have the new words; those of a stream are not known.

    Raises:
        LdmError: no caption has one of them.
    """
    captions = data.images.captions() if data.images else []
    there = {name for caption in captions for name in finder(section.words).findall(plain(caption))}
    for word in section.words if captions else ():
        if plain(word) not in there:
            raise LdmError(
                f"{section.place}.words: none of {len(captions)} captions has {word}; set data.trigger='{word}' to put "
                "it into each, or name the word that captions have"
            )


def check_lengths(captions: Sequence[str], words: TrainedWords, place: str) -> None:
    """Check that the new words are among the tokens of captions that the text encoders read.

    Raises:
        LdmError: of a word, no caption's tokens are read to its end.
    """
    encoders = words.around[0].text_encoders
    tokenizer, room = cast("WordTokenizer", encoders.tokenizers[0]), min(c.context for c in encoders.configs) - 2
    without, cut, read = 0, 0, set()
    for caption in captions:
        pieces = tokenizer.pieces(caption)
        ends = accumulate(map(len, pieces))
        new = {piece: end <= room for piece, end in zip(pieces, ends, strict=True) if piece in tokenizer.words}
        read |= {tokenizer.words[piece] for piece, whole in new.items() if whole}
        without += not new
        cut += not all(new.values())
    told = listing(list(words.words), 3)
    for word, count in words.words.items() if captions else ():
        if word not in read:
            raise LdmError(
                f"{place}.words: {word} has {count} vectors, and no caption is read to the end of it: a text has at "
                f"most {room} tokens; give it fewer vectors, or shorten the captions before it"
            )
    if without:
        log.warning(
            "%d of %d captions have none of the new words (%s): they teach nothing", without, len(captions), told
        )
    if cut:
        log.warning(
            "%d of %d captions are too long: of the new words (%s) in them, some are cut", cut, len(captions), told
        )


def build(given: StageInputs[TextualInversionSection]) -> TextualInversionStage:
    """The stage of a run."""
    return TextualInversionStage(given)
