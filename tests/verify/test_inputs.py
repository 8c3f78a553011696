"""Which inputs a verification runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_export.bundle.manifest import read_manifest
from moe_export.errors import InputError
from moe_export.schema import Limits, Manifest, ModelIO, SourceInfo, TensorSpec, TextInfo
from moe_export.verify.inputs import Case, make_cases, output_mask, valid_masks
from tests.helpers.tiny_bundle import tiny_io
from tests.verify import engines


def manifest(
    limits: Limits | None = None, *, io: ModelIO | None = None, vocab: int = 259, **text: int
) -> Manifest:
    source = SourceInfo("module", None, "tiny", "Tiny", "0" * 64)
    return Manifest(
        source,
        "text-generation",
        "onnxruntime",
        "float32",
        20,
        io or tiny_io(),
        limits or Limits(),
        (),
        text=TextInfo(vocab_size=vocab, **text),
    )


def encode(text: str) -> list[int]:
    return list(text.encode())


def by_name(cases: list[Case]) -> dict[str, Case]:
    return {c.name: c for c in cases}


def test_a_text_model_gets_every_kind_of_case() -> None:
    cases, notes = make_cases(manifest(), encode=encode)
    assert set(by_name(cases)) == {
        "prose",
        "code",
        "random",
        "one token",
        "maximum",
        "padded left",
        "padded right",
        "decode",
        "token by token",
        "chunks",
        "decode padded",
    }
    shapes = {c.name: c.inputs["input_ids"].shape for c in cases}
    assert shapes["one token"] == (1, 1) and shapes["random"] == (3, 13) and shapes["prose"][1] > 400
    assert any("unlimited" in n for n in notes)
    chunks = {c.name: c.chunks for c in cases if c.chunks}
    assert chunks["decode"] == (58, 1, 1, 1) and chunks["chunks"] == (5, 7, 49)
    assert chunks["token by token"] == (1,) * 9
    assert all(sum(c.chunks) == c.inputs["input_ids"].shape[1] for c in cases if c.chunks)
    assert all((c.seed is None) == c.is_text for c in cases)


def test_padding_is_where_it_says(tmp_path: Path) -> None:
    cases = by_name(make_cases(manifest(pad_token_id=258))[0])
    left, right = cases["padded left"], cases["padded right"]
    for case, side in ((left, slice(0, 1)), (right, slice(-1, None))):
        mask, ids = case.inputs["attention_mask"], case.inputs["input_ids"]
        assert sorted(mask.sum(axis=1).tolist()) == [5, 11, 17]
        assert (mask[:, side] == 0).sum() == 2 and (np.abs(np.diff(mask, axis=1)).sum(axis=1) <= 1).all()
        assert (ids[mask == 0] == 258).all()


def test_the_same_seed_gives_the_same_cases_and_another_gives_others() -> None:
    one, two, other = (by_name(make_cases(manifest(), seed=s)[0]) for s in (3, 3, 4))
    for name, case in one.items():
        assert (case.inputs["input_ids"] == two[name].inputs["input_ids"]).all()
    assert (one["random"].inputs["input_ids"] != other["random"].inputs["input_ids"]).any()
    assert one["random"].seed is not None
    drawn = np.random.default_rng(one["random"].seed).integers(0, 259, (3, 13))
    assert (one["random"].inputs["input_ids"] == drawn).all()


@settings(max_examples=60, deadline=None)
@given(
    batch=st.one_of(st.none(), st.integers(1, 9)),
    length=st.one_of(st.none(), st.integers(1, 80)),
    vocab=st.sampled_from([2, 259, 32_000, 250_000]),
    text=st.booleans(),
)
def test_limits_and_vocabulary_are_respected(
    batch: int | None, length: int | None, vocab: int, text: bool
) -> None:
    wanted = manifest(Limits(batch, length), vocab=vocab)
    cases, _notes = make_cases(wanted, encode=encode if text and vocab >= 259 else None)
    assert {"random", "one token", "maximum"} <= set(by_name(cases))
    for case in cases:
        ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
        assert ids.shape == mask.shape and ids.dtype == np.int64 and ids.size
        assert ids.shape[0] <= (batch or 9) and ids.shape[1] <= (length or 512)
        assert ids.min() >= 0 and ids.max() < vocab
        assert mask.any(axis=1).all()
        assert not case.chunks or (sum(case.chunks) == ids.shape[1] and min(case.chunks) > 0)
        assert ids.size * vocab <= 4 * (1 << 24) or ids.shape[1] <= 32


def test_without_a_tokenizer_it_says_so_and_refuses_a_text() -> None:
    cases, notes = make_cases(manifest())
    assert not any(c.is_text for c in cases) and any("no tokenizer" in n for n in notes)
    with pytest.raises(InputError, match="no tokenizer"):
        make_cases(manifest(), text="hello there")


def test_a_given_text_replaces_the_default_ones() -> None:
    cases, notes = make_cases(manifest(Limits(4, 10)), encode=encode, text="Hello, world of experts")
    texts = [c for c in cases if c.is_text and not c.chunks]
    assert [c.name for c in texts] == ["given text"]
    assert bytes(texts[0].inputs["input_ids"][0].tolist()) == b"Hello, wor"
    assert any("the first 10 were used" in n for n in notes)
    with pytest.raises(InputError, match="at least 2"):
        make_cases(manifest(), encode=encode, text="x")


def test_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="does not belong"):
        make_cases(manifest(vocab=50), encode=encode)


def test_engines_without_cache_get_no_chunks() -> None:
    io = tiny_io()
    plain = ModelIO(
        tuple(t for t in io.inputs if t.role != "cache"), tuple(t for t in io.outputs if t.role != "cache")
    )
    assert not any(c.chunks for c in make_cases(manifest(io=plain), encode=encode)[0])


def test_encoder_decoder_gets_decoder_ids_of_another_length() -> None:
    io = ModelIO(
        (
            TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
            TensorSpec("attention_mask", "int64", ("batch", "sequence"), "mask"),
            TensorSpec("decoder_input_ids", "int64", ("batch", "decoder_sequence"), "token_ids"),
        ),
        (TensorSpec("logits", "float32", ("batch", "decoder_sequence", 259), "logits"),),
    )
    for limit in (None, 1, 2, 7, 30):
        cases, _ = make_cases(manifest(Limits(None, limit), io=io, decoder_start_token_id=257), encode=encode)
        for case in cases:
            ids, decoder = case.inputs["input_ids"], case.inputs["decoder_input_ids"]
            assert len(ids) == len(decoder) and (decoder[:, 0] == 257).all()
            assert decoder.shape[1] <= (limit or 512)
            if limit != 1:
                assert decoder.shape[1] != ids.shape[1]
            masks = valid_masks(case)
            assert [m.shape for m in masks] == [decoder.shape, ids.shape] and masks[0].all()
    padded = by_name(cases)["padded left"]
    mask = output_mask((*padded.inputs["decoder_input_ids"].shape, 259), valid_masks(padded))
    assert mask is not None and mask.all()


def test_module_inputs_vary_every_symbol(tmp_path: Path) -> None:
    described = read_manifest(engines.module_bundle(tmp_path / "m"))
    cases, notes = make_cases(described, seed=2)
    assert [c.name for c in cases] == ["ones", "primes", "other primes", "maximum"]
    sizes = [c.inputs["x"].shape[:2] for c in cases]
    assert sizes[0] == (1, 1) and len({s[0] for s in sizes}) == 4 and sizes[3][0] == 9
    for case in cases:
        assert case.inputs["x"].dtype == np.float32 and case.inputs["index"].dtype == np.int64
        assert len(case.inputs["x"]) == len(case.inputs["index"])
        assert set(case.inputs["index"].tolist()) <= {0, 1}
    assert any("'index'" in n and "only 0 and 1" in n for n in notes)
    fixed = dataclasses.replace(
        described, io=ModelIO((TensorSpec("x", "float16", (2, 6)),), described.io.outputs)
    )
    cases, _ = make_cases(fixed)
    assert [c.inputs["x"].shape for c in cases] == [(2, 6), (2, 6)] and cases[0].inputs[
        "x"
    ].dtype == np.float16
