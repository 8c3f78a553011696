"""Engines other than a decoder with float32 KV cache: states, bfloat16, encoder-decoder, modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto

from moe_export.errors import InputError
from moe_export.runtime.session import load
from moe_export.schema import (
    Limits,
    Manifest,
    ModelIO,
    SourceInfo,
    TensorSpec,
    TextInfo,
)
from tests.helpers.tiny_bundle import GraphBuilder, write_manifest

VOCAB, EOS = 12, 11
TABLE = np.random.default_rng(4).standard_normal((VOCAB, VOCAB)).astype(np.float32)


def _bundle(folder: Path, model: onnx.ModelProto, io: ModelIO, text: TextInfo | None, most: int = 32) -> Path:
    folder.mkdir()
    onnx.save(model, str(folder / "model.onnx"))
    manifest = Manifest(
        source=SourceInfo("module", None, "test", "Test", "0" * 64),
        task="module" if text is None else "text-generation",
        target="portable",
        dtype="float32",
        opset=20,
        io=io,
        limits=Limits(4, most),
        moe_layers=(),
        text=text,
    )
    write_manifest(folder, manifest)
    return folder


def _state_model(folder: Path, dtype: str) -> Path:
    """Logits are the sum of the table's rows of all tokens so far; the sum is the state."""
    kind = getattr(TensorProto, "FLOAT" if dtype == "float32" else dtype.upper())
    g = GraphBuilder()
    rows = g("Gather", TABLE, "input_ids")
    before = g("Unsqueeze", g("Cast", "past.0.recurrent", to=TensorProto.FLOAT), np.array([1]))
    sums = g("Add", g("CumSum", rows, np.array(1)), before)
    g("Cast", sums, to=kind, out="logits")
    last = g("Squeeze", g("Slice", sums, np.array([-1]), np.array([2**31]), np.array([1])), np.array([1]))
    g("Cast", last, to=kind, out="present.0.recurrent")
    io = ModelIO(
        (
            TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
            TensorSpec("past.0.recurrent", dtype, ("batch", VOCAB), "cache", "present.0.recurrent"),
        ),
        (
            TensorSpec("logits", dtype, ("batch", "sequence", VOCAB), "logits"),
            TensorSpec("present.0.recurrent", dtype, ("batch", VOCAB), "cache", "past.0.recurrent"),
        ),
    )
    return _bundle(folder, g.model(io), io, TextInfo(VOCAB))


def _expected(prompt: Sequence[int], count: int, cast: Any) -> list[int]:
    """What the state model generates: the state passes through the engine's dtype at every step."""
    state = np.zeros(VOCAB, cast)
    ids, new = list(prompt), []
    for _ in range(count):
        sums = TABLE[ids].cumsum(0)[-1] + state.astype(np.float32)
        state = sums.astype(cast)
        new.append(int(state.argmax()))
        ids = [new[-1]]
    return new


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_states_of_every_dtype_carry_over(tmp_path: Path, dtype: str) -> None:
    cast = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    with load(_state_model(tmp_path / "b", dtype), threads=1) as session:
        outputs = session.run({"input_ids": [[1, 2, 3]]})
        assert outputs["logits"].dtype == cast and outputs["logits"].shape == (1, 3, VOCAB)
        np.testing.assert_array_equal(outputs["logits"][0], TABLE[[1, 2, 3]].cumsum(0).astype(cast))
        np.testing.assert_array_equal(outputs["present.0.recurrent"][0], outputs["logits"][0, -1])
        again = session.run({"input_ids": [[4]], "past.0.recurrent": outputs["present.0.recurrent"]})
        whole = session.run({"input_ids": [[1, 2, 3, 4]]})["logits"][:, -1:]
        np.testing.assert_allclose(
            again["logits"].astype(np.float32),
            whole.astype(np.float32),
            atol=0 if dtype == "float32" else 0.05,
        )
        result = session.generate([[1, 2, 3], [5, 6, 7]], max_new_tokens=8)
        assert result.token_ids == [_expected(p, 8, cast) for p in ([1, 2, 3], [5, 6, 7])]
        chunked = session.chunked_logits([[1, 2, 3, 4]], [[1] * 4], [1, 2, 1])
        assert chunked.layers == () and chunked.outputs["logits"].dtype == cast
        np.testing.assert_array_equal(chunked.outputs["logits"][0, :1], outputs["logits"][0, :1])


def test_without_a_mask_prompts_must_have_one_length(tmp_path: Path) -> None:
    with load(_state_model(tmp_path / "b", "float32"), threads=1) as session:
        with pytest.raises(InputError, match="no attention mask"):
            session.generate([[1, 2], [3]])
        assert session.run_traced({"input_ids": [[1]]}).layers == ()
        with pytest.raises(InputError, match="this bundle has no MoE layer"):
            session.run_traced({"input_ids": [[1]]}, force_routing=[])


def _encoder_decoder(folder: Path, start: int | None, most: int = 32) -> Path:
    """Logits: sum of the source's rows (masked) plus the running sum of the target's."""
    g = GraphBuilder()
    mask = g("Unsqueeze", g("Cast", "attention_mask", to=TensorProto.FLOAT), np.array([2]))
    source = g("ReduceSum", g("Mul", g("Gather", TABLE, "input_ids"), mask), np.array([1]), keepdims=1)
    target = g("CumSum", g("Gather", TABLE, "decoder_input_ids"), np.array(1))
    g("Add", source, target, out="logits")
    io = ModelIO(
        (
            TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
            TensorSpec("attention_mask", "int64", ("batch", "sequence"), "mask"),
            TensorSpec("decoder_input_ids", "int64", ("batch", "decoder_sequence"), "token_ids"),
        ),
        (TensorSpec("logits", "float32", ("batch", "decoder_sequence", VOCAB), "logits"),),
    )
    return _bundle(folder, g.model(io), io, TextInfo(VOCAB, (EOS,), decoder_start_token_id=start), most)


def test_encoder_decoder_generates_from_its_start_token(tmp_path: Path) -> None:
    def greedy(source: list[int], count: int) -> list[int]:
        target = [2]
        for _ in range(count):
            target.append(int((TABLE[source].sum(0) + TABLE[target].sum(0)).argmax()))
            if target[-1] == EOS:
                break
        return target[1:]

    with load(_encoder_decoder(tmp_path / "b", 2), threads=1) as session:
        sources = [[1, 3, 5], [4, 6, 7, 8, 9]]
        result = session.generate(sources, max_new_tokens=6)
        assert result.token_ids == [greedy(source, 6) for source in sources]
        assert result.finish_reasons == ["eos", "length"]
        assert result.prompt_tokens == 8
        assert "no KV cache" in session.notes[0]
        with pytest.raises(InputError, match="encoder-decoder has no stepper"):
            session.stepper()
        with pytest.raises(InputError, match="sequence of 33 tokens is beyond the bundle's maximum 32"):
            session.generate([[1] * 33])
    with load(_encoder_decoder(tmp_path / "short", 2, most=5), threads=1) as session:
        short = session.generate([sources[1]], max_new_tokens=6)
        assert (short.token_ids, short.finish_reasons) == ([result.token_ids[1][:4]], ["limit"])


def test_encoder_decoder_without_a_start_token_is_refused(tmp_path: Path) -> None:
    with (
        load(_encoder_decoder(tmp_path / "b", None), threads=1) as session,
        pytest.raises(InputError, match="decoder_start_token_id"),
    ):
        session.generate([[1]])


def test_a_module_runs_with_zero_tokens(tmp_path: Path) -> None:
    g = GraphBuilder()
    g("MatMul", "x", TABLE, out="y")
    io = ModelIO(
        (TensorSpec("x", "float32", ("tokens", VOCAB)),), (TensorSpec("y", "float32", ("tokens", VOCAB)),)
    )
    with load(_bundle(tmp_path / "b", g.model(io), io, None), threads=1) as session:
        assert session.run({"x": np.zeros((0, VOCAB), np.float32)})["y"].shape == (0, VOCAB)
        with pytest.raises(InputError, match="dtype float64; expected float32"):
            session.run({"x": np.zeros((1, VOCAB))})


def test_an_input_that_generation_cannot_supply(tmp_path: Path) -> None:
    g = GraphBuilder()
    rows = g("Gather", TABLE, "input_ids")
    g("Mul", rows, "scale", out="logits")
    io = ModelIO(
        (
            TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
            TensorSpec("scale", "float32", (1,)),
        ),
        (TensorSpec("logits", "float32", ("batch", "sequence", VOCAB), "logits"),),
    )
    with load(_bundle(tmp_path / "b", g.model(io), io, TextInfo(VOCAB)), threads=1) as session:
        assert session.run({"input_ids": [[1]], "scale": [2.0]})["logits"].shape == (1, 1, VOCAB)
        with pytest.raises(InputError, match="cannot supply the input 'scale'"):
            session.generate([1])
