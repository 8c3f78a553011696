"""The hand-written bundle is what it says: right without a defect, wrong in the stated way with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.helpers import tiny_model as tiny
from tests.helpers.tiny_bundle import BROKEN, TinyReference, build_tiny_model, make_tiny_bundle, tiny_io
from tests.helpers.tiny_model import TinyWeights


def _session(broken: str | None) -> ort.InferenceSession:
    model = build_tiny_model(TinyWeights.make(), broken)
    extra = [
        v for v in onnx.shape_inference.infer_shapes(model).graph.value_info if v.name.startswith("moe.")
    ]
    model.graph.output.extend(extra)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _feed(
    ids: np.ndarray, mask: np.ndarray, cache: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
    empty = np.zeros((len(ids), tiny.KV_HEADS, 0, tiny.HEAD_DIM), np.float32)
    caches = cache or {t.name: empty for t in tiny_io().cache_inputs}
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **caches}


def _run(session: ort.InferenceSession, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feed), strict=True))


def _two_steps(session: ort.InferenceSession, ids: np.ndarray, mask: np.ndarray, first: int) -> np.ndarray:
    one = _run(session, _feed(ids[:, :first], mask[:, :first]))
    cache = {t.name: one[str(t.pair)] for t in tiny_io().cache_inputs}
    two = _run(session, _feed(ids[:, first:], mask, cache))
    return np.concatenate([one["logits"], two["logits"]], 1)


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(1).integers(0, 256, (3, 11))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


def test_matches_the_reference_in_one_piece_and_in_two(batch: tuple[np.ndarray, np.ndarray]) -> None:
    ids, mask = batch
    session, real = _session(None), mask.astype(bool)
    want = TinyReference().run({"input_ids": ids, "attention_mask": mask})
    got = _run(session, _feed(ids, mask))
    np.testing.assert_allclose(got["logits"][real], want.outputs["logits"][real], atol=2e-5)
    for layer in want.layers:
        rows = real.ravel()
        ids_got = got[f"moe.{layer.index}.expert_ids"]
        assert ids_got.dtype == np.int32
        np.testing.assert_array_equal(ids_got[rows], layer.expert_ids[rows])
        for kind in ("hidden", "logits", "weights", "output"):
            np.testing.assert_allclose(
                got[f"moe.{layer.index}.{kind}"][rows], getattr(layer, kind)[rows], atol=1e-5, err_msg=kind
            )
    np.testing.assert_allclose(_two_steps(session, ids, mask, 6)[real], got["logits"][real], atol=2e-5)


@pytest.mark.parametrize("broken", BROKEN)
def test_each_defect_shows_in_the_logits(broken: str, batch: tuple[np.ndarray, np.ndarray]) -> None:
    ids, mask = batch
    session, real = _session(broken), mask.astype(bool)
    want = TinyReference().run({"input_ids": ids, "attention_mask": mask}).outputs["logits"]
    whole = np.abs(_run(session, _feed(ids, mask))["logits"] - want)[real].max()
    steps = np.abs(_two_steps(session, ids, mask, 6) - want)[real].max()
    assert steps > 0.05
    assert whole < 2e-5 if broken == "cache_shifted" else whole > 0.05


def test_unknown_defect_is_refused() -> None:
    with pytest.raises(ValueError, match="expert_swapped"):
        build_tiny_model(TinyWeights.make(), "expert_swaped")


def test_files_on_disk(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "b")
    assert {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()} == {
        "model.onnx",
        "model.onnx.data",
        "manifest.json",
        "tokenizer/tokenizer.json",
    }
    ort.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])


def test_tokenizer_gives_bytes_back(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    bundle = make_tiny_bundle(tmp_path / "b")
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer" / "tokenizer.json"))
    text = "Grüße, 世界 🎉\n"
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id("<eos>") == tiny.EOS and tokenizer.token_to_id("<pad>") == tiny.PAD
