"""Streamed text: whole characters only, stop strings withheld, and equal to decoding everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moe_export.runtime.text import TextStream, load_tokenizer
from tests.helpers import tiny_model as tiny
from tests.helpers.tiny_bundle import write_tiny_tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder)
    return load_tokenizer(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def metaspace() -> Tokenizer:
    """As Llama's: words begin with a space sign, unknown characters become byte tokens."""
    words = ["▁hello", "▁world", "lo", "!", "é"]
    vocabulary = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}}
    vocabulary.update({word: 257 + i for i, word in enumerate(words)})
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _pieces(stream: TextStream, tokens: list[int]) -> list[str]:
    return [stream.push(token) for token in tokens] + [stream.finish()]


def test_characters_come_out_whole(byte_level: Tokenizer) -> None:
    pieces = _pieces(TextStream(byte_level, []), list("aé€😀b".encode()))
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_bytes_that_cannot_become_a_character_are_let_out(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, [])
    assert [stream.push(b) for b in b"\xe2\x82"] == ["", ""]
    assert stream.push(ord("a")) == "\ufffda"
    assert "".join(_pieces(TextStream(byte_level, []), [0xE2, 0x82])) == "\ufffd"


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_give_the_text_of_decoding_them_at_once(byte_level: Tokenizer, data: bytes) -> None:
    pieces = _pieces(TextStream(byte_level, []), list(data))
    assert "".join(pieces) == byte_level.decode(list(data))


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_no_piece_of_valid_text_is_broken(byte_level: Tokenizer, text: str) -> None:
    stream = TextStream(byte_level, [])
    pieces = [stream.push(b) for b in text.encode()]
    assert "".join(pieces) == text
    assert stream.finish() == ""
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_endless_broken_bytes_stay_cheap_and_come_out(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, [])
    out = "".join(stream.push(0x80) for _ in range(1000))
    assert len(out) >= 990
    assert out + stream.finish() == "\ufffd" * 1000
    stream = TextStream(byte_level, [])
    assert "".join(_pieces(stream, [0x80] * 200 + list("€".encode()))) == "\ufffd" * 200 + "€"


def test_a_character_that_began_in_the_prompt_is_completed(byte_level: Tokenizer) -> None:
    euro = list("€".encode())
    assert _pieces(TextStream(byte_level, [65, *euro[:2]]), [euro[2], 66]) == ["€", "B", ""]


def test_special_tokens_give_no_text(byte_level: Tokenizer) -> None:
    assert _pieces(TextStream(byte_level, [tiny.BOS]), [tiny.BOS, 65, tiny.PAD, 66]) == ["", "A", "", "B", ""]


def test_a_first_word_keeps_its_space(metaspace: Tokenizer) -> None:
    hello, world = metaspace.token_to_id("▁hello"), metaspace.token_to_id("▁world")
    assert _pieces(TextStream(metaspace, [hello]), [world, world]) == [" world", " world", ""]
    assert _pieces(TextStream(metaspace, []), [hello, world]) == ["hello", " world", ""]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="aé€😀\n", max_size=20))
def test_byte_fallback_tokens_give_whole_characters(metaspace: Tokenizer, text: str) -> None:
    hello = metaspace.token_to_id("▁hello")
    stream = TextStream(metaspace, [hello])
    pieces = [stream.push(b + 1) for b in text.encode()]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("stop", "text", "want"),
    [
        (["END"], "abENDcd", "ab"),
        (["END"], "abENENDcd", "abEN"),
        (["END"], "abEN", "abEN"),
        (["aab"], "aaaab", "aa"),
        (["xx", "b"], "abxx", "a"),
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo"),
        (["€"], "5€", "5"),
        ([], "plain", "plain"),
    ],
)
def test_stop_strings(byte_level: Tokenizer, stop: list[str], text: str, want: str) -> None:
    stream = TextStream(byte_level, [], stop)
    out = ""
    for byte in text.encode():
        piece = stream.push(byte)
        out += piece
        # What may still become a stop string has not been let out.
        assert want.startswith(out)
        if stream.stopped:
            break
    assert out + stream.finish() == want
    assert stream.stopped == (want != text)


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("[PAD]", special=True)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9, pad_id=2, pad_token="[PAD]")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path / "tokenizer.json").encode("a a a a").ids) == 4
