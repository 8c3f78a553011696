"""Ranks over real MPI against one rank: the same logits, the same routed experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe_export
from moe_export.backends.onnxruntime.plugin import cpu_plugin_problem
from moe_export.verify import verify_bundle
from tests.expert_parallel.mpi import COMMAND, mpiexec, needs_mpi, script
from tests.expert_parallel.rank_models import model_with

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "byte-mixtral"
pytestmark = [
    needs_mpi,
    pytest.mark.skipif(bool(cpu_plugin_problem()), reason="needs the CPU plugin"),
    pytest.mark.timeout(900),
]
FORCED = '''
import dataclasses, sys
import numpy as np
from moe_export.runtime import launched, load, serve_rank

bundle, given, output = sys.argv[1:]
if launched().rank:
    serve_rank(bundle, threads=1)
    sys.exit()
with np.load(given) as file:
    cases = dict(file)
kept = {}
with load(bundle, threads=1) as session:
    inputs = {"input_ids": cases["ids"], "attention_mask": np.ones_like(cases["ids"])}
    shown = session.run_traced(inputs).layers
    for name in [key for key in cases if key.startswith("experts")]:
        chosen = cases[name]
        forced = [dataclasses.replace(l, expert_ids=np.tile(chosen, (len(l.expert_ids), 1)).astype(np.int32))
                  for l in shown]
        kept[name] = session.run_traced(inputs, force_routing=forced).outputs["logits"]
    one = {"input_ids": cases["ids"][:1, :1], "attention_mask": np.ones((1, 1), np.int64)}
    kept["one token"] = session.run(one)["logits"]
np.savez(output, **kept)
'''


def source_of(name: str, folder: Path) -> Path:
    """The shipped model, or a tiny one of a family with 8 experts, as a model folder."""
    if name == "byte-mixtral":
        return EXAMPLE
    model_with(name, 8).save_pretrained(folder)
    return folder


def ranks_of(source: Path, folder: Path, ranks: int, mode: str, **options: Any) -> Path:
    bundle = folder / f"ep{ranks}-{mode}"
    moe_export.build(
        source, bundle, ep=ranks, ep_mode=mode, bench=False, verify=False, threads=1, **options
    )
    return bundle


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A source model, and what it answers, by way of a verified bundle of one rank."""
    folder = tmp_path_factory.mktemp(request.param)
    source = source_of(request.param, folder / "source")
    bundle = moe_export.build(source, folder / "one", bench=False, verify=False, threads=1)
    file = folder / "golden.npz"
    assert verify_bundle(bundle.path, against=source, save_golden=file, threads=1).passed
    return source, file


FAMILIES = ("byte-mixtral", "deepseek_v3", "qwen3_moe", "gpt_oss", "switch_transformers")
USUAL = [
    *(("byte-mixtral", mode, ranks) for mode, ranks in (("allreduce", 2), ("alltoall", 4), ("alltoall", 3))),
    ("deepseek_v3", "allreduce", 4),
    ("qwen3_moe", "alltoall", 2),
    ("gpt_oss", "allreduce", 8),
    ("switch_transformers", "alltoall", 2),
]
"""What CI runs; 3 ranks do not divide 8 experts."""
MORE = [
    (name, mode, ranks)
    for name in FAMILIES
    for mode in ("allreduce", "alltoall")
    for ranks in (2, 3, 4, 8)
    if (name, mode, ranks) not in USUAL
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("golden", "mode", "ranks"),
    [*USUAL, *(pytest.param(*case, marks=pytest.mark.nightly) for case in MORE)],
    indirect=["golden"],
)
def test_ranks_over_mpi_are_equal_to_the_source(
    golden: tuple[Path, Path], tmp_path: Path, mode: str, ranks: int
) -> None:
    source, file = golden
    bundle = ranks_of(source, tmp_path, ranks, mode)
    done = mpiexec(ranks, COMMAND, "verify", bundle, "--against", file, "--json", limit=600)
    assert done.code == 0, done.err + done.out[-2000:]
    summary = json.loads(done.out)["summary"]
    assert summary["passed"] and summary["route_agreement"] == 1.0 and not summary["simulated"]


@pytest.mark.slow
def test_a_wrong_rank_is_seen(tmp_path: Path) -> None:
    """Two experts of rank 1 change places: the ranks run, and verification says that it is wrong."""
    bundle = ranks_of(EXAMPLE, tmp_path, 2, "allreduce", expert_weights="as-is")
    data = bundle / "rank1" / "model.onnx.data"
    swap_experts(bundle / "rank1" / "model.onnx", data)
    done = mpiexec(2, COMMAND, "verify", bundle, "--against", EXAMPLE, "--trust", limit=600)
    assert done.code == 1, done.err
    assert "wrong" in done.out + done.err


def swap_experts(model: Path, data: Path) -> None:
    """Exchange the first two experts of one stack of weights."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    tensor = next(t for t in graph.initializer if len(t.dims) == 3)
    place = {entry.key: entry.value for entry in tensor.external_data}
    size = int(place["length"]) // tensor.dims[0]
    with data.open("r+b") as file:
        file.seek(int(place["offset"]))
        first, second = file.read(size), file.read(size)
        file.seek(int(place["offset"]))
        file.write(second + first)


@pytest.mark.parametrize("mode", ["allreduce", "alltoall"])
def test_routings_that_are_hard_on_ranks(tmp_path: Path, mode: str) -> None:
    """All tokens to one rank, whatever they are; a rank without a token; one token; replicas of an expert."""
    trace = tmp_path / "trace.json"
    model = model_with("mixtral", 8)
    write_trace(trace, layers=2, experts=8, busiest=5, top_k=2)
    one = moe_export.build(model, tmp_path / "one", bench=False, verify=False, threads=1)
    many = moe_export.build(
        model, tmp_path / "many", ep=3, ep_mode=mode, placement="balanced", trace=str(trace),
        redundant_experts=2, bench=False, verify=False, threads=1,
    )  # fmt: skip
    placed = many.manifest.expert_parallel
    assert placed is not None
    copies = [sum(5 in experts for experts in layer.experts) for layer in placed.layers]
    assert max(copies) > 1, "the busiest expert has no replica, so none is tested"
    here = placed.layers[0].experts[0]
    ids = np.random.default_rng(0).integers(3, 100, (2, 9))
    given = tmp_path / "given.npz"
    np.savez(given, ids=ids, experts_one=np.array(here[:2]), experts_hot=np.array([5, here[0]]))
    done = mpiexec(3, *script(tmp_path, "forced", FORCED), many.path, given, tmp_path / "many.npz")
    assert done.code == 0, done.err
    expected = forced_on_one(one.path, given)
    with np.load(tmp_path / "many.npz") as file:
        got = dict(file)
    assert set(got) == set(expected) == {"experts_one", "experts_hot", "one token"}
    for name, logits in expected.items():
        np.testing.assert_allclose(got[name], logits, atol=2e-5, err_msg=name)
    assert np.abs(got["experts_one"] - expected["experts_hot"]).max() > 1e-3


@pytest.mark.slow
def test_a_block_that_is_too_small_ends_the_run_on_all_ranks(tmp_path: Path) -> None:
    """With ``ep_overflow`` error a run gives the right numbers, or none."""
    source = source_of("mixtral", tmp_path / "source")
    ids = np.random.default_rng(0).integers(3, 100, (2, 9))
    np.savez(tmp_path / "in.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    one = moe_export.build(source, tmp_path / "one", bench=False, verify=False, threads=1)
    for factor, code in ((2.0, 0), (0.2, 2)):
        folder = tmp_path / f"factor{factor}"
        folder.mkdir()
        bundle = ranks_of(source, folder, 2, "alltoall", ep_overflow="error", ep_capacity_factor=factor)
        words = ("--inputs", tmp_path / "in.npz", "--outputs", folder / "out.npz", "-q")
        done = mpiexec(2, COMMAND, "run", bundle, *words)
        assert done.code == code, done.err
        if code:
            assert not (folder / "out.npz").exists()
            assert len(done.errors) == 1 and "all ranks: layer" in done.errors[0], done.err
            assert "ep_capacity_factor" in done.errors[0]
            continue
        with moe_export.load(one.path, threads=1) as session, np.load(folder / "out.npz") as got:
            expected = session.run({"input_ids": ids, "attention_mask": np.ones_like(ids)})
            np.testing.assert_allclose(got["logits"], expected["logits"], atol=1e-5)


def write_trace(path: Path, *, layers: int, experts: int, busiest: int, top_k: int) -> None:
    """A trace in which one expert is chosen by every token."""
    tokens = 700
    others = tokens * (top_k - 1)
    counts = [others // (experts - 1)] * experts
    counts[busiest] = tokens
    counts[0] += tokens * top_k - sum(counts)
    found = [{"index": i, "name": f"layer{i}", "counts": counts, "dropped": 0} for i in range(layers)]
    path.write_text(json.dumps({"tokens": tokens, "layers": found}), encoding="utf-8")


def forced_on_one(bundle: Path, given: Path) -> dict[str, Any]:
    """The script's cases on a bundle of one rank."""
    import dataclasses

    from moe_export.runtime import load

    with np.load(given) as file:
        cases = dict(file)
    ids = cases.pop("ids")
    kept = {}
    with load(bundle, threads=1) as session:
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        shown = session.run_traced(inputs).layers
        for name, chosen in cases.items():
            forced = [
                dataclasses.replace(
                    layer, expert_ids=np.broadcast_to(chosen, layer.expert_ids.shape).astype(np.int32)
                )
                for layer in shown
            ]
            kept[name] = session.run_traced(inputs, force_routing=forced).outputs["logits"]
        one = {"input_ids": ids[:1, :1], "attention_mask": np.ones((1, 1), np.int64)}
        kept["one token"] = session.run(one)["logits"]
    return kept
