"""Weights and chunks of prompts against worked examples."""

from __future__ import annotations

import threading
import time

import pytest
import tiny
import torch

from ldm.errors import LdmError
from ldm.models.prompts import PromptReader, encode_prompts, parse_weights, split_into_chunks
from ldm.models.tokenizer import clip_tokenizer


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("a (cat) here", [("a ", 1), ("cat", 1.1), (" here", 1)]),
        ("a ((cat))", [("a ", 1), ("cat", 1.21)]),
        ("a (cat:1.5) [dog]", [("a ", 1), ("cat", 1.5), (" ", 1), ("dog", 1 / 1.1)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1), (" c", 0.5)]),
        (r"\(literal\) \[too\]", [("(literal) [too]", 1)]),
        ("an (open one", [("an ", 1), ("open one", 1.1)]),
        ("a closed) one]", [("a closed) one]", 1)]),
        ("ratio 16:9", [("ratio 16:9", 1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("(x:-1)", [("x", -1)]),
        ("(a [b) c] d", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1), (" d", 1)]),  # each kind of bracket by itself
        ("", []),
    ],
)
def test_weights(prompt: str, parts: list[tuple[str, float]]) -> None:
    found = parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


def chunk_sizes(prompt: str) -> list[int]:
    return [len(chunk.ids) for chunk in split_into_chunks(clip_tokenizer(), parse_weights(prompt), 75)]


def test_chunks() -> None:
    assert chunk_sizes("") == [0]
    assert chunk_sizes("cat " * 75) == [75]
    assert chunk_sizes("cat " * 76) == [75, 1]
    assert chunk_sizes("cat " * 60 + ", " + "dog " * 30) == [61, 30]  # after the comma, which is among the last 20
    assert chunk_sizes("cat " * 55 + ", " + "dog " * 20) == [56, 20]  # the comma is the 20th from the end
    assert chunk_sizes("cat " * 54 + ", " + "dog " * 21) == [75, 1]
    assert chunk_sizes("cat " * 60 + ", " + "dog " * 14 + ", a") == [75, 2]  # a comma itself may start a chunk
    assert chunk_sizes("cat " * 40 + ", " + "dog " * 50) == [75, 16]  # the comma is too far back
    assert chunk_sizes("a cat BREAK a dog") == [2, 2]
    assert chunk_sizes("cat " * 1000) == [75] * 13 + [25]


def test_a_short_prompt_without_weights_is_encoded_as_ever() -> None:
    encoders = tiny.model("sdxl").text_encoders
    with torch.no_grad():
        cond, reports = encode_prompts(encoders, [["a cat", "a dog"]] * 2)
        plain = encoders(["a cat", "a dog"])
    assert torch.equal(cond.text, plain.text)
    assert torch.equal(cond.pooled, plain.pooled)
    assert [report.encoder for report in reports] == ["text_encoder"] * 2 + ["text_encoder_2"] * 2


def test_weights_scale_token_vectors_and_keep_the_mean() -> None:
    encoders = tiny.model("sd15").text_encoders
    with torch.no_grad():
        plain = encoders(["a cat"]).text
        weighted = encode_prompts(encoders, [["a (cat:1.5)"]])[0].text
        literal = encode_prompts(encoders, [["a (cat:1.5)"]], reader=PromptReader(weights=False))[0].text
    count = len(encoders.tokenizers[0].encode(["a"])[0])
    cat = len(encoders.tokenizers[0].encode([" cat"])[0])
    expected = plain.clone()
    expected[:, 1 + count : 1 + count + cat] *= 1.5
    expected *= plain.mean() / expected.mean()
    torch.testing.assert_close(weighted, expected)
    assert not torch.equal(literal, plain)


def test_one_prompt_does_not_change_another_in_the_batch() -> None:
    encoders = tiny.model("sdxl").text_encoders
    with torch.no_grad():
        both = encode_prompts(encoders, [["a (cat:2)", "a dog"]] * 2)[0].text
        alone = encode_prompts(encoders, [["a dog"]] * 2)[0].text
    torch.testing.assert_close(both[1:], alone, atol=1e-6, rtol=0)


def test_long_prompts_are_chunked_or_cut_with_a_report() -> None:
    encoders = tiny.model("sd15").text_encoders
    prompt = "a cat " * 60 + "the end"
    with torch.no_grad():
        chunked, reports = encode_prompts(encoders, [[prompt]])
        cut, cut_reports = encode_prompts(encoders, [[prompt]], chunks=False)
    assert chunked.text.shape[1] == 77 * -(-reports[0].tokens // 75)
    assert reports[0].cut == ""
    assert cut.text.shape[1] == 77
    assert cut_reports[0].cut.endswith("the end")
    assert (cut_reports[0].tokens, cut_reports[0].room) == (reports[0].tokens, 75)
    torch.testing.assert_close(chunked.text[:, :77], cut.text)


def test_a_short_prompt_fills_up_to_a_longer_one() -> None:
    encoders = tiny.model("sd15").text_encoders
    with torch.no_grad():
        cond, _ = encode_prompts(encoders, [["bad", "a cat " * 60]])
        empty = encoders([""]).text
    assert cond.text.shape[1] == 3 * 77
    torch.testing.assert_close(cond.text[:1, 77:154], empty)


def test_threads_share_a_tokenizer() -> None:
    """One that cuts prompts does not make others cut theirs."""
    encoders = tiny.model("sd15").text_encoders
    prompt = "a dog runs " * 60
    expected = len(encoders.tokenizers[0].encode([prompt])[0])
    stop = threading.Event()

    def cut() -> None:
        while not stop.is_set():
            encoders.tokenize(["a cat " * 100])

    thread = threading.Thread(target=cut)
    thread.start()
    chunks = [split_into_chunks(encoders.tokenizers[0], [(prompt, 1.0)], 75) for _ in range(300)]
    stop.set()
    thread.join()
    assert {sum(len(chunk.ids) for chunk in row) for row in chunks} == {expected}


def test_absurd_prompts_are_refused() -> None:
    with pytest.raises(LdmError, match="a prompt of 100001 characters"):
        encode_prompts(tiny.model("sd15").text_encoders, [["x" * 100_001]])
    for prompt in ("(a cat:9999)", "(" * 1000 + "a cat" + ")" * 1000):
        with pytest.raises(LdmError, match="a weight of .* for 'a cat'; at most 1000"):
            parse_weights(prompt)


def test_the_longest_prompts_are_read_at_once() -> None:
    """Each of these took minutes with an algorithm that looks back."""
    start = time.process_time()
    with pytest.raises(LdmError, match="a weight of"):
        parse_weights("(a[a" * 25_000)
    assert chunk_sizes(" " * 100_000) == [0]
    assert time.process_time() - start < 60  # CPU time; it would be minutes
