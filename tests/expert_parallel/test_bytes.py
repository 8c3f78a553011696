"""Bytes that ranks exchange: what the plugin counts in a real run is what the cost model's formula says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_export.backends.onnxruntime.plugin import cpu_plugin_problem
from moe_export.bundle.manifest import read_manifest
from moe_export.config import BuildConfig
from tests.expert_parallel.mpi import mpiexec, needs_mpi, script
from tests.helpers.tiny_bundle import write_tiny_tokenizer

RANKS, EXPERTS, TOP_K, HIDDEN = 3, 8, 2, 32
RUN = f"""
import json, sys
import numpy as np
from moe_export.backends.onnxruntime.exchange import exchange_use
from moe_export.costs import bytes_sent
from moe_export.runtime import launched, load, serve_rank

bundle = sys.argv[1]
if launched().rank:
    serve_rank(bundle, threads=1)
    sys.exit()


def fullest(layer, placement):
    # Rows of the fullest block: each rank sends a token once to every rank that has one of its experts.
    homes = [[r for r, held in enumerate(placement.experts) if e in held] for e in range({EXPERTS})]
    most = 0
    for own in np.split(layer.expert_ids, {RANKS}):
        went = [{{homes[e][t % len(homes[e])] for e in row}} for t, row in enumerate(own)]
        most = max(most, *(sum(rank in ranks for ranks in went) for rank in range({RANKS})))
    return most


with load(bundle, threads=1) as session:
    ids = np.random.default_rng(0).integers(0, 256, (6, 11))
    inputs = {{"input_ids": ids, "attention_mask": np.ones_like(ids)}}
    layers = session.run_traced(inputs).layers
    before = exchange_use()
    session.run(inputs)
    after = exchange_use()
    plan = session.manifest.expert_parallel
    sent = [
        bytes_sent(
            plan.mode, ranks={RANKS}, hidden={HIDDEN}, top_k={TOP_K}, tokens=ids.size,
            capacity=fullest(layer, placement),
        )
        for layer, placement in zip(layers, plan.layers, strict=True)
    ]
    print(json.dumps({{
        "layers": len(layers),
        "measured": {{name: after[name] - before[name] for name in after}},
        "reduced": sum(p.reduced for p in sent),
        "moved": sum(p.moved for p in sent),
    }}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Mixtral as a model folder."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=259, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K,
        max_position_embeddings=128, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return folder


@needs_mpi
@pytest.mark.slow
@pytest.mark.skipif(bool(cpu_plugin_problem()), reason="needs the CPU plugin")
@pytest.mark.parametrize("mode", ["allreduce", "alltoall"])
def test_measured_bytes_are_the_formulas(source: Path, tmp_path: Path, mode: str) -> None:
    import moe_export

    layer = {"counts": [100, 40, 20, 10, 10, 10, 5, 5], "dropped": 0}
    (tmp_path / "trace.json").write_text(json.dumps({"tokens": 100, "layers": [layer, layer]}))
    config = BuildConfig(
        ep=RANKS, ep_mode=mode, placement="balanced", trace=str(tmp_path / "trace.json"), redundant_experts=4,
        verify=False, bench=False, threads=1,
    )  # fmt: skip
    moe_export.build(source, tmp_path / "bundle", config)
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest.expert_parallel is not None
    assert sum(map(len, manifest.expert_parallel.layers[0].experts)) > EXPERTS
    assert [d.choice for d in manifest.decisions if d.subject.endswith(": placement")] == ["balanced"] * 2

    done = mpiexec(RANKS, *script(tmp_path, "run", RUN), tmp_path / "bundle")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    measured = told["measured"]
    assert measured["all_reduce_bytes"] == told["reduced"] > 0
    assert measured["all_to_all_bytes"] == told["moved"]
    exchanges = {"allreduce": (1, 0), "alltoall": (1, 3)}[mode]
    calls = measured["all_reduce_calls"], measured["all_to_all_calls"]
    assert calls == tuple(n * told["layers"] for n in exchanges)
    assert (told["moved"] > 0) == (mode == "alltoall")
