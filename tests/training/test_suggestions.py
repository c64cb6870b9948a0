"""Suggestions for unknown keys of a configuration."""

from __future__ import annotations

import pytest

from ldm.errors import LdmError
from ldm.training.config import describe, load
from ldm.training.suggestions import ANSWERS, WORDS


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base.learning_rate=1e-5", "base.learning_rate is not known; did you mean base.optimizer.learning_rate?"),
        ("refiner.learning_rate=1e-5", "did you mean refiner.optimizer.learning_rate?"),
        ("learning_rate=1e-5", "did you mean base.optimizer.learning_rate?"),
        ("base.learning_rat=1e-5", "did you mean base.optimizer.learning_rate?"),
        ("optimizer.name=prodigy", "optimizer is not known; did you mean base.optimizer?"),
        ("batch=4", "did you mean base.batch?"),
        ("base.flip=true", "did you mean data.flip?"),
        ("max_train_steps=100", "max_train_steps is not known; did you mean base.steps?"),
        ("autoencoder.max_train_steps=100", "did you mean autoencoder.steps?"),
        ("base.train_batch_size=4", "did you mean base.batch?"),
        ("mixed_precision=bf16", "did you mean precision?"),
        ("base.train_data_dir=x", "did you mean data.source?"),
        ("autoencoder.snr_gamma=5", "did you mean base.min_snr?"),
        ("resolution=512", "resolution is not known; write base.sizes=[{size: 512}]"),
        ("network_dim=32", "network_dim is not known; did you mean adapter.rank?"),
        ("conditioning_data_dir=x", "did you mean data.beside.condition?"),
        ("network_module=networks.lora", "are the stage adapter"),
        ("initializer_token=cat", "write textual-inversion.words={'<cat>': {initial: cat, vectors: 4}}"),
        ("learnable_property=style", "did you mean textual-inversion.templates?"),
        ("base.stpes=3", "base.stpes is not known; did you mean steps?"),
    ],
)
def test_what_was_meant(override: str, message: str) -> None:
    with pytest.raises(LdmError) as caught:
        load(None, [override])
    assert message in str(caught.value)


def test_every_suggested_key_exists() -> None:
    known = {name for name, _, _ in describe()}
    assert set(WORDS.values()) <= known
    leaves = {name.rpartition(".")[2] for name in known}
    assert not leaves & (WORDS.keys() | ANSWERS.keys())  # such a word is found as a key
    assert not WORDS.keys() & ANSWERS.keys()
    assert load(None, ["base.sizes=[{size: 512}]"]).base.sizes[0].size == 512
    words = getattr(load(None, ["textual-inversion.words={'<cat>': {initial: cat, vectors: 4}}"]), "textual-inversion")
    assert words.words["<cat>"].vectors == 4
