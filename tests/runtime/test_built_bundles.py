"""Bundles from the exporter: generation equals that of ``transformers``; padding, chunks, forced routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_export.runtime.session import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHARED = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 99,
}


def _model(family: str) -> Any:
    torch.manual_seed(0)
    if family == "mixtral":
        config = transformers.MixtralConfig(**SHARED, num_hidden_layers=2, num_local_experts=4)
        return transformers.MixtralForCausalLM(config).eval()
    hybrid = {"expert_layer_period": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    sizes = {"num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4}
    config = transformers.JambaConfig(**SHARED, **hybrid, **sizes, num_hidden_layers=2)
    return transformers.JambaForCausalLM(config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "jamba"])
def test_generation_equals_transformers(tmp_path: Path, family: str) -> None:
    from moe_export.api import build

    model = _model(family)
    bundle = tmp_path / "bundle"
    build(model, bundle, target="onnxruntime", verify=False, bench=False)
    ids = np.array([[5, 6, 7, 8, 1], [0, 0, 9, 3, 1]])
    mask = (ids != 0).astype(np.int64)
    with torch.no_grad():
        tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        rows = model.generate(**tensors, max_new_tokens=20, do_sample=False)[:, 5:].tolist()
        want = [row[: row.index(99) + 1] if 99 in row else row for row in rows]
        logits = model(**tensors).logits.numpy()
    with load(bundle, threads=1) as session:
        got = session.generate([[5, 6, 7, 8, 1], [9, 3, 1]], max_new_tokens=20)
        assert got.token_ids == want
        inputs = {"input_ids": ids, "attention_mask": mask}
        traced = session.run_traced(inputs)
        forced = session.run_traced(inputs, force_routing=traced.layers)
        chunked = session.chunked_logits(ids, mask, [2, 1, 2])
    real = mask.astype(bool)
    for run in (traced, forced, chunked):
        np.testing.assert_allclose(run.outputs["logits"][real], logits[real], atol=1e-5)
    assert len(traced.layers) == len(chunked.layers) == (2 if family == "mixtral" else 1)
