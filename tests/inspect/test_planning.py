"""Plans: what fits, times that follow from the data sheets, load imbalance, dense models to compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_export.costs import GPUS, Assumptions, Popularity, weight_format
from moe_export.errors import UsageError
from moe_export.inspect.architecture import Architecture
from moe_export.inspect.config_summary import describe
from moe_export.inspect.needs import Workload, sequence_bytes
from moe_export.planning import (
    Layout,
    Plan,
    Routing,
    layouts,
    make_plan,
    predict_step,
    read_trace,
    uniform_routing,
    zipf_routing,
)
from moe_export.planning.plot import plot_plan
from moe_export.planning.steps import Machine

IDEAL = Assumptions(compute=1, memory=1, link=1, kernel_s=0, exchange_s=0)
BF16 = weight_format("bfloat16")


def plan(name: str, gpu: str = "h100", gpus: int = 8, **options: Any) -> Plan:
    settings: dict[str, Any] = {"context": 4096, "batch": 32, "weights": BF16, **options}
    return make_plan(describe(name), GPUS[gpu], gpus, **settings)


def arch_of(name: str) -> Architecture:
    return describe(name).architecture


def test_one_gpu_decodes_at_memory_speed() -> None:
    """Batch 1, ideal kernels: the time to read the active weights, little else."""
    arch = arch_of("mixtral-8x7b")
    load = Workload(BF16, context=16, batch=1)
    machine = Machine(GPUS["h200"], IDEAL)
    step = predict_step(arch, Layout("single", 1, 1), "decode", load, uniform_routing(arch), machine)
    read = 2 * (sum(arch.active_parameters().values()) - arch.parameters()["embeddings"])
    assert step.time.seconds == pytest.approx(read / 4.8e12, rel=0.01)
    assert step.time.bound == "memory"
    assert step.time.exchange == step.exchange_bytes == 0


def test_prefill_runs_at_arithmetic_speed() -> None:
    arch = arch_of("mixtral-8x7b")
    load = Workload(BF16, context=8192, batch=1)
    machine = Machine(GPUS["h200"], IDEAL)
    step = predict_step(arch, Layout("single", 1, 1), "prefill", load, uniform_routing(arch), machine)
    counts = arch.active_parameters()
    matrices = sum(counts.values()) - counts["embeddings"] - counts["output_head"]
    scores = sum(a.prefill_flops(8192) for layer in arch.layers for a in layer.attentions)
    flops = 2 * 8192 * matrices + scores
    assert step.time.seconds == pytest.approx(flops / 989.5e12, rel=0.03)
    assert step.time.bound == "compute"


def test_exchange_bytes_follow_the_formulas() -> None:
    arch = arch_of("mixtral-8x7b")
    load = Workload(BF16, context=100, batch=64)
    machine = Machine(GPUS["h100"], IDEAL)
    uniform = uniform_routing(arch)
    reduced = predict_step(arch, Layout("allreduce", 8, 1), "decode", load, uniform, machine)
    assert reduced.exchange_bytes == pytest.approx(32 * 2 * 7 / 8 * 64 * 4096 * 4)  # summed in float32
    moved = predict_step(arch, Layout("alltoall", 8, 1), "decode", load, uniform, machine)
    row = 2 * 4096 * 2 + 2 * 2 * 4  # there and back, and two slots and weights
    assert 32 * 7 * 2 * row < moved.exchange_bytes < 32 * 7 * 8 * row  # the fullest has more than the mean, 2
    whole = Layout("alltoall", 8, 1, full_blocks=True)
    full = predict_step(arch, whole, "decode", load, uniform, machine)
    assert full.exchange_bytes == pytest.approx(32 * 7 * 8 * row)  # room for the rank's 8 tokens
    assert reduced.parts["exchange"] == reduced.time.exchange
    tensor = predict_step(
        arch.dense_like("total"), Layout("tensor", 8, 1), "decode", load, Routing("uniform", ()), machine
    )
    assert tensor.exchange_bytes == pytest.approx(2 * 32 * 2 * 7 / 8 * 64 * 4096 * 2)


def test_a_token_is_sent_once_to_a_rank_however_many_of_its_experts_are_there() -> None:
    arch, machine = arch_of("mixtral-8x7b"), Machine(GPUS["h100"], IDEAL)
    load = Workload(BF16, context=4096, batch=2)
    two = Layout("alltoall", 2, 1)
    moved = predict_step(arch, two, "prefill", load, uniform_routing(arch), machine).exchange_bytes
    visits = 1 - (4 * 3) / (8 * 7)  # a rank with 4 of 8 experts, two choices
    row = 2 * 4096 * 2 + 2 * 2 * 4
    assert moved == pytest.approx(32 * 4096 * visits * row, rel=0.03)


def test_skew_costs_exchange_and_placement_saves_it() -> None:
    arch, machine = arch_of("qwen3-30b-a3b"), Machine(GPUS["h100"], IDEAL)
    load, way = Workload(BF16, context=4096, batch=8), Layout("alltoall", 8, 1)
    skewed = zipf_routing(arch, 1.0)
    sent = {
        name: predict_step(arch, layout, "prefill", load, routing, machine)
        for name, layout, routing in (
            ("uniform", way, uniform_routing(arch)),
            ("skewed", way, skewed),
            ("placed", way, skewed.placed_by_load()),
            ("replicated", Layout("alltoall", 8, 1, redundant=16), skewed.placed_by_load()),
        )
    }
    assert sent["uniform"].exchange_bytes < sent["placed"].exchange_bytes < sent["skewed"].exchange_bytes
    assert sent["replicated"].waiting < sent["placed"].waiting < sent["skewed"].waiting


def test_ranks_without_a_sequence_repeat_one() -> None:
    arch, machine = arch_of("mixtral-8x7b"), Machine(GPUS["h100"], IDEAL)
    way, uniform = Layout("alltoall", 8, 1), uniform_routing(arch)
    for phase in ("prefill", "decode"):
        one, eight = (
            predict_step(arch, way, phase, Workload(BF16, context=256, batch=batch), uniform, machine)
            for batch in (1, 8)
        )
        assert one == eight


def test_replicas_take_memory() -> None:
    arch, load = arch_of("mixtral-8x7b"), Workload(BF16, context=128)
    more = Layout("allreduce", 8, 1, redundant=8).memory(arch, load)
    one = 2 * arch.parameters()["routed_experts"] / 8
    assert more - Layout("allreduce", 8, 1).memory(arch, load) == one
    assert Layout("allreduce", 8, 1, redundant=8).largest_batch(arch, load, more + 1) >= 1
    assert Layout("allreduce", 8, 1, redundant=8).largest_batch(arch, load, more - one) == 0


def test_parts_sum_to_the_time() -> None:
    arch = arch_of("deepseek-v3")
    load = Workload(weight_format("float8"), context=4096, batch=128)
    machine = Machine(GPUS["h100"], Assumptions())
    for phase in ("decode", "prefill"):
        step = predict_step(arch, Layout("alltoall", 32, 1), phase, load, uniform_routing(arch), machine)
        assert sum(step.parts.values()) == pytest.approx(step.time.seconds)
        assert step.waiting <= step.parts["routed_experts"]
        assert step.times(3).time.seconds == pytest.approx(3 * step.time.seconds)


def test_layouts() -> None:
    arch = arch_of("mixtral-8x7b")
    found = {(way.mode, way.ranks, way.replicas) for way in layouts(arch, 8)}
    assert found == {("single", 1, 8)} | {
        (mode, ranks, 8 // ranks) for mode in ("allreduce", "alltoall") for ranks in (2, 4, 8)
    }
    assert max(way.ranks for way in layouts(arch, 64)) == 8  # not more ranks than experts
    assert {way.mode for way in layouts(arch_of("mistral-7b"), 4)} == {"single", "tensor"}
    assert [way.mode for way in layouts(arch, 7)] == ["single", "allreduce", "alltoall"]


def test_memory_of_layouts() -> None:
    arch, load = arch_of("mixtral-8x7b"), Workload(BF16, context=8192, batch=64)
    whole, cache = 2 * sum(arch.parameters().values()), 64 * sequence_bytes(arch, load)
    experts = 2 * arch.parameters()["routed_experts"]
    assert Layout("single", 1, 8).memory(arch, load) == whole + cache / 8
    assert Layout("allreduce", 4, 2).memory(arch, load) == whole - experts * 3 / 4 + cache / 2
    assert Layout("alltoall", 4, 2).memory(arch, load) == whole - experts * 3 / 4 + cache / 8
    assert Layout("tensor", 4, 2).memory(arch, load) == (whole + cache / 2) / 4


@pytest.mark.parametrize("mode", ["allreduce", "alltoall", "tensor"])
def test_largest_batch_is_the_largest(mode: Any) -> None:
    arch = arch_of("mixtral-8x7b")
    layout, room = Layout(mode, 4, 2), 60e9
    load = Workload(BF16, context=8192)
    most = layout.largest_batch(arch, load, room)
    assert layout.memory(arch, Workload(BF16, context=8192, batch=most)) <= room
    assert layout.memory(arch, Workload(BF16, context=8192, batch=most + 1)) > room
    assert layout.largest_batch(arch, load, 1e9) == 0


def test_plan_of_the_issue() -> None:
    found = plan("mixtral-8x7b", context=8192, batch=64)
    assert found.best is not None
    assert found.best.fits
    values = found.to_dict()
    json.dumps(values, allow_nan=False)
    assert values["predicted"] is True
    assert "predicted" in values["label"]
    assert values["fits"]
    assert values["best"]["decode"]["bound"] in ("memory", "compute", "exchange", "overhead")
    assert values["best"]["decode"]["tokens_per_s"] == pytest.approx(64 / values["best"]["decode"]["seconds"])
    fastest = min(o["decode"]["seconds"] for o in values["options"] if o["fits"])
    assert values["best"]["decode"]["seconds"] == fastest
    assert all(("decode" in o) == o["fits"] == (o["memory_bytes"] <= 72e9) for o in values["options"])
    assert {p["batch"] for p in values["sweep"]} >= {1, 64, 1024}
    assert values["dense"]["same_active"]["parameters"] < values["dense"]["same_total"]["parameters"]


def test_only_the_asked_mode() -> None:
    modes = {o.layout.mode for o in plan("mixtral-8x7b", mode="allreduce").options}
    assert modes == {"single", "allreduce"}
    with pytest.raises(UsageError, match="choices: allreduce, alltoall"):
        plan("mixtral-8x7b", mode="ring")


def test_what_does_not_fit_says_how_much_is_needed() -> None:
    found = plan("deepseek-v3", gpus=8, weights=weight_format("float8"))
    assert found.best is None
    assert not found.to_dict()["fits"]
    assert found.imbalance() is None
    assert any("needs" in note and "GB on a GPU" in note for note in found.notes)
    assert any("with expert parallel" in note for note in found.notes)


def test_dense_models_bound_the_moe_on_one_gpu() -> None:
    """With nothing exchanged it is never faster than its active part, nor much slower than its whole."""
    found = plan("mixtral-8x7b", gpu="h200", gpus=1, context=1024)
    for point in found.sweep:
        if point.model is None:
            continue
        assert point.dense_active is not None and point.dense_total is not None
        assert 0.95 * point.dense_total < point.model < 1.01 * point.dense_active
    rates = [p.model for p in found.sweep if p.model is not None]
    assert rates == sorted(rates)


def test_it_pays_for_one_request_and_not_for_some_on_one_gpu() -> None:
    """One token reads 2 of 8 experts; some tokens together read all of them, as a dense model would."""
    found = plan("mixtral-8x7b", gpu="h200", gpus=1, context=1024)
    ratio = {p.batch: p.model / p.dense_total for p in found.sweep if p.model and p.dense_total}
    assert ratio[1] > 2.5
    assert ratio[32] < 1.1
    text = " ".join(found.verdict)
    assert "pays at batch 1-4" in text
    assert "does not pay at batch 8" in text
    assert "2 of 8 experts" in text


def test_it_pays_at_prefill() -> None:
    (line,) = [line for line in plan("mixtral-8x22b", gpu="h200").verdict if line.startswith("prefill")]
    assert float(line.split(": ")[1].split()[0]) > 2


def test_skew_costs_time_at_prefill() -> None:
    arch = arch_of("qwen3-30b-a3b")
    even = plan("qwen3-30b-a3b", gpu="l4", gpus=8)
    skewed = plan("qwen3-30b-a3b", gpu="l4", gpus=8, routing=zipf_routing(arch, 1.0))
    assert even.best is not None and skewed.best is not None
    assert even.best.prefill is not None and skewed.uniform is not None
    facts = skewed.imbalance()
    assert facts is not None
    assert facts["prefill"]["over_uniform"] > 1
    assert facts["prefill"]["waiting_s"] > 0
    assert facts["prefill"]["without_waiting_s"] < facts["prefill"]["seconds"]
    assert skewed.routing.to_dict()["max_over_mean"] > 2
    assert facts["prefill"]["uniform_routing_s"] < facts["prefill"]["placed_by_load_s"]
    assert facts["prefill"]["placed_by_load_s"] < 0.9 * facts["prefill"]["seconds"]
    assert "placed_by_load_s" not in (even.imbalance() or {})["prefill"]
    more = plan("qwen3-30b-a3b", gpu="l4", gpus=8, routing=zipf_routing(arch, 1.0), redundant_experts=16)
    assert more.placed is not None and skewed.placed is not None
    assert more.placed.memory > skewed.placed.memory
    assert (more.imbalance() or {})["prefill"]["placed_by_load_s"] <= facts["prefill"]["placed_by_load_s"]
    flat = plan("qwen3-30b-a3b", gpu="l4", gpus=8, routing=zipf_routing(arch, 0.0))
    assert flat.best is not None and flat.best.decode is not None and even.best.decode is not None
    assert flat.best.decode.time.seconds == pytest.approx(even.best.decode.time.seconds, rel=0.05)


def _trace(layers: int, counts: list[int], tokens: int = 100) -> dict[str, Any]:
    return {"tokens": tokens, "layers": [{"index": i, "counts": counts, "dropped": 0} for i in range(layers)]}


def test_trace(tmp_path: Path) -> None:
    arch, file = arch_of("mixtral-8x7b"), tmp_path / "trace.json"
    file.write_text(json.dumps(_trace(32, [25] * 8)))
    even = read_trace(file, arch, "mixtral-8x7b")
    assert even.layers == (Popularity.uniform(8, 2),) * 32
    file.write_text(json.dumps(_trace(32, [100, 30, 20, 10, 10, 10, 10, 10])))
    skewed = read_trace(file, arch, "mixtral-8x7b")
    slow = plan("mixtral-8x7b", routing=skewed).imbalance()
    assert slow is not None
    assert slow["prefill"]["over_uniform"] > 1.5
    assert plan("mixtral-8x7b", routing=skewed).to_dict()["routing"]["file"] == "trace.json"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (_trace(4, [25] * 8), "another model: it has 4 MoE layers, mixtral-8x7b has 32"),
        (_trace(32, [20] * 10), "chose 2 of 10 experts per token, mixtral-8x7b chooses 2 of 8"),
        (_trace(32, [50] * 8), "chose 4 of 8 experts"),
        (_trace(32, [25] * 8, 0), "'tokens' is 0"),
        ({"tokens": 3}, "no list 'layers'"),
        ({"tokens": 100, "layers": [{"counts": ["x"]}] * 32}, "layer 0 has no list 'counts'"),
        ([], "no list 'layers'"),
    ],
)
def test_wrong_traces(tmp_path: Path, content: object, match: str) -> None:
    file = tmp_path / "trace.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=match):
        read_trace(file, arch_of("mixtral-8x7b"), "mixtral-8x7b")


def test_missing_and_broken_traces(tmp_path: Path) -> None:
    arch = arch_of("mixtral-8x7b")
    with pytest.raises(UsageError, match="No such file"):
        read_trace(tmp_path / "none.json", arch, "m")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        read_trace(tmp_path / "bad.json", arch, "m")


def test_wrong_numbers() -> None:
    with pytest.raises(UsageError, match="gpus is 0"):
        plan("mixtral-8x7b", gpus=0)
    with pytest.raises(UsageError, match="batch is -1"):
        plan("mixtral-8x7b", batch=-1)
    with pytest.raises(UsageError, match="expected 0 or more"):
        zipf_routing(arch_of("mixtral-8x7b"), -0.1)


def test_dense_model() -> None:
    found = plan("mistral-7b", gpu="l4", gpus=2, batch=4)
    assert found.best is not None
    assert found.dense == {}
    assert found.verdict == ("a dense model: every token uses every parameter",)
    assert [p.dense_active for p in found.sweep] == [None] * len(found.sweep)
    json.dumps(found.to_dict(), allow_nan=False)


def test_encoder_decoder() -> None:
    found = plan("switch-base-8", gpus=2, batch=4, context=512)
    assert found.best is not None and found.best.decode is not None
    assert "routed_experts" in found.best.decode.parts
    assert any("encoder" in note for note in found.notes)
    arch = arch_of("switch-base-8")
    machine, load = Machine(GPUS["h100"], IDEAL), Workload(BF16, context=512, batch=1)
    whole = predict_step(arch, Layout("single", 1, 1), "decode", load, uniform_routing(arch), machine)
    # Decoder only: 6 MoE and 6 dense blocks, 24 attentions of which 12 reuse the encoder's keys, output head.
    matrices = 12 * 2 * 768 * 3072 + 12 * 4 * 768**2 + 12 * 2 * 768**2 + 768 * 32128
    cache = 24 * 2 * 768 * 512
    assert whole.time.seconds == pytest.approx(2 * (matrices + cache) / 3.35e12, rel=0.02)


def test_notes_of_a_plan() -> None:
    long = plan("mixtral-8x7b", context=40000, batch=1)
    assert any("maximum of 32768" in note for note in long.notes)
    old = plan("deepseek-v3", gpu="a100-80", gpus=32, weights=weight_format("float8"))
    assert any("no float8 arithmetic" in note for note in old.notes)
    assert any("latent" in note for note in old.notes)
    assert any("room for all tokens" in note for note in plan("mixtral-8x22b", mode="alltoall").notes)
    assert any("linear attention" in note for note in plan("qwen3-next-80b-a3b").notes)


def test_plot(tmp_path: Path) -> None:
    plot_plan(plan("mixtral-8x7b"), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    plot_plan(plan("mistral-7b", gpus=1), tmp_path / "plan.svg")
    assert "predicted" in (tmp_path / "plan.svg").read_text()
    plot_plan(plan("deepseek-v3", gpu="l4", gpus=1), tmp_path / "nothing.svg")  # nothing fits: axes only
    with pytest.raises(UsageError, match=r"\.png, \.svg"):
        plot_plan(plan("mistral-7b", gpus=1), tmp_path / "plan.gif")
    with pytest.raises(UsageError, match="cannot be written"):
        plot_plan(plan("mistral-7b", gpus=1), tmp_path / "no" / "plan.svg")
