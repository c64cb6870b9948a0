"""Learned words in prompts: where they are found, in which chunk they stand, and which vectors they become."""

from __future__ import annotations

import pytest
import tiny
import torch

from ldm.models.prompts import PromptReader, encode_prompts, parse_weights, split_into_chunks
from ldm.models.text import TextEncoders
from ldm.models.textual_inversion import LearnedWord, WordTokenizer, with_words
from ldm.models.tokenizer import clip_tokenizer

CAT, DOG, BAD = range(50_000, 50_003), range(50_003, 50_004), range(50_004, 50_005)
TOKENIZER = WordTokenizer(
    clip_tokenizer(), [(("<cat-toy>", "My Cat"), CAT), (("dog",), DOG), (("bad-hands", "bad-hands-5"), BAD)]
)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode([text])[0]


def plain(text: str) -> list[int]:
    return clip_tokenizer().encode([text])[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <cat-toy>, red", [*plain("a"), *CAT, *plain(", red")]),
        ("a<CAT-TOY>red", [*plain("a"), *CAT, *plain("red")]),
        ("my   CAT's tail", [*CAT, *plain("'s tail")]),
        ("DOG dogs dog_1 hotdog dog", [*DOG, *plain("dogs dog_1 hotdog"), *DOG]),
        ("bad-hands-5 bad-hands bad-hands-50", [*BAD, *BAD, *BAD, *plain("-50")]),
        ("ſ İ my cat", [*plain("ſ İ"), *CAT]),
        ("red Embedding:dog, embedding:fox", [*plain("red"), *DOG, *plain(", embedding:fox")]),
        ("nothing of it", plain("nothing of it")),
        ("", []),
    ],
)
def test_where_a_word_is_found(text: str, expected: list[int]) -> None:
    assert ids(text) == expected


def test_words_are_told_apart_and_back() -> None:
    assert TOKENIZER.learned("a MY cat and dogs, bad-hands") == ["<cat-toy>", "bad-hands"]
    assert TOKENIZER.decode(ids("a my cat, dog red")) == "a <cat-toy> , dog red"


def chunks(prompt: str) -> list[list[int]]:
    return [chunk.ids for chunk in split_into_chunks(TOKENIZER, parse_weights(prompt), 75)]


def test_the_vectors_of_a_word_stay_in_one_chunk() -> None:
    assert [len(chunk) for chunk in chunks("red " * 72 + "my cat")] == [75]
    assert [len(chunk) for chunk in chunks("red " * 73 + "my cat")] == [73, 3]
    assert chunks("red " * 74 + "my cat")[1] == [*CAT]
    after_comma = chunks("red " * 60 + ", " + "blue " * 13 + "my cat")  # AUTOMATIC1111 looks for a comma if it is full
    assert [len(chunk) for chunk in after_comma] == [74, 3]
    assert [len(chunk) for chunk in chunks("red " * 60 + ", " + "blue " * 14 + "my cat")] == [61, 17]


@pytest.fixture(scope="module")
def encoders() -> TextEncoders:
    return tiny.model("sdxl").text_encoders


def words(encoders: TextEncoders) -> list[LearnedWord]:
    tables = [tower.get_submodule(name).weight for tower, name in zip(encoders.towers, TABLES, strict=True)]
    first = [encoders.tokenizers[0].encode([text])[0] for text in ("red fox", "love")]
    return [
        LearnedWord((name,), tuple(table[tokens].detach().clone() for table in tables))
        for name, tokens in zip(("<fox>", "kugel"), first, strict=True)
    ]


TABLES = ("embeddings.token_embedding", "text_model.embeddings.token_embedding")


def test_vectors_equal_to_a_words_own_give_its_encoding(encoders: TextEncoders) -> None:
    learned = with_words(encoders, words(encoders))
    with torch.no_grad():
        for ours, theirs in (("a <fox>, (KUGEL:1.3)", "a red fox, (love:1.3)"), ("kugel " * 90, "love " * 90)):
            found, _ = encode_prompts(learned, [[ours]] * 2)
            wanted, _ = encode_prompts(encoders, [[theirs]] * 2)
            assert torch.equal(found.text, wanted.text) and found.pooled is not None
            assert torch.equal(found.pooled, wanted.pooled)
        literal, _ = encode_prompts(learned, [["a <fox>"]] * 2, reader=PromptReader(weights=False))
        assert torch.equal(literal.text, encoders(["a red fox"]).text)


def test_the_encoders_given_stay_as_they_are_and_share_their_weights(encoders: TextEncoders) -> None:
    before = encoders(["a <fox>"]).text
    learned = with_words(encoders, words(encoders))
    assert torch.equal(encoders(["a <fox>"]).text, before)
    assert not torch.equal(learned(["a <fox>"]).text, before)
    ours, theirs = dict(learned.named_parameters()), dict(encoders.named_parameters())
    assert ours.keys() == theirs.keys() and all(ours[name] is theirs[name] for name in theirs)
    assert learned.state_dict().keys() == encoders.state_dict().keys()
    assert learned.double().towers[0].embeddings.token_embedding.vectors.dtype == torch.float64
    encoders.float()
