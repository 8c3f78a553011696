"""The cost model: kernels, rooflines, exchanges and expert load, each against an independent count."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_export.costs import (
    FORMATS,
    GPUS,
    Assumptions,
    Popularity,
    Time,
    Work,
    all_reduce,
    all_to_all,
    bytes_sent,
    exchange_layer,
    find_gpu,
    fullest_block,
    grouped_matmul,
    matmul,
    predict,
    rank_loads,
    sample_counts,
    weight_format,
)
from moe_export.costs.routing import draw_tokens
from moe_export.errors import UsageError
from moe_export.placement import contiguous, rank_shares

IDEAL = Assumptions(compute=1, memory=1, link=1, kernel_s=0, exchange_s=0)


def test_every_gpu_is_cited_and_plausible() -> None:
    assert {"a100-40", "a100-80", "h100", "h200", "l4", "l40s", "rtx-4090", "rtx-5090", "b200"} == set(GPUS)
    for gpu in GPUS.values():
        assert "NVIDIA" in gpu.source
        assert 20e9 <= gpu.memory <= 200e9
        assert gpu.peaks["float32"] < gpu.peaks["bfloat16"] < gpu.peak("float8") * 1.01
        assert gpu.network < gpu.link < gpu.bandwidth
        assert 50 < gpu.peaks["bfloat16"] / gpu.bandwidth < 500  # operations per byte
    assert GPUS["a100-80"].peak("float8") == GPUS["a100-80"].peak("bfloat16")


def test_sparse_peaks_did_not_slip_in() -> None:
    """Tensor peaks go with the number of SMs, the clock and the generation: ratios that sheets agree on."""
    peak = {name: gpu.peaks["bfloat16"] / 1e12 for name, gpu in GPUS.items()}
    assert peak["h100"] / peak["a100-80"] == pytest.approx(3.17, rel=0.01)
    assert peak["b200"] / peak["h100"] == pytest.approx(2.27, rel=0.01)
    for name, gpu in GPUS.items():
        if "float8" in gpu.peaks:
            assert gpu.peaks["float8"] / gpu.peaks["bfloat16"] == pytest.approx(2, rel=0.02), name


@pytest.mark.parametrize("name", ["H100", "rtx 4090", "RTX_4090", "rtx4090"])
def test_gpu_names(name: str) -> None:
    assert find_gpu(name).name in ("h100", "rtx-4090")


def test_unknown_names() -> None:
    with pytest.raises(UsageError, match="no GPU 'h1000'; nearest: h100"):
        find_gpu("h1000")
    with pytest.raises(UsageError, match="no weight format 'int3'; nearest: int"):
        weight_format("int3")
    assert weight_format("FP8") is FORMATS["float8"]


def test_matmul_counts() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(7, 5)), rng.normal(size=(5, 3))
    multiplications = sum(1 for _ in range(x.shape[0]) for _ in range(w.shape[1]) for _ in range(w.shape[0]))
    work = matmul(7, 5, 3, 16)
    assert work.flops == 2 * multiplications
    assert (work.weights, work.activations) == (2 * w.size, 2 * (x.size + 7 * 3))
    assert matmul(0, 5, 3, 16) == Work()
    experts = grouped_matmul(7, 2, ((5, 3), (5, 3), (3, 5)), 4)
    assert (experts.flops, experts.weights) == (3 * work.flops, 2 * 3 * 15 / 2)


def test_roofline() -> None:
    gpu = GPUS["h100"]
    slow_memory = predict(Work(flops=1e9, weights=3.35e9), gpu, "bfloat16", IDEAL)
    assert (slow_memory.seconds, slow_memory.bound) == (pytest.approx(1e-3), "memory")
    arithmetic = predict(Work(flops=989.5e9, weights=1e6), gpu, "bfloat16", IDEAL)
    assert (arithmetic.seconds, arithmetic.bound) == (pytest.approx(1e-3), "compute")
    assert predict(Work(flops=989.5e9), gpu, "float8", IDEAL).seconds == pytest.approx(0.5e-3)
    started = predict(Work(flops=1.0), gpu, "bfloat16", Assumptions(kernel_s=1e-6), launches=3)
    assert (started.seconds, started.bound) == (pytest.approx(3e-6, rel=1e-3), "overhead")
    half = predict(Work(weights=3.35e9), gpu, "bfloat16", Assumptions(memory=0.5, kernel_s=0))
    assert half.seconds == pytest.approx(2e-3)


def test_times_add_up() -> None:
    time = Time(memory=1, compute=2) + Time(exchange=4, overhead=0.5) * 2
    assert (time.seconds, time.bound) == (12, "exchange")
    assert time.to_dict() == {
        "seconds": 12.0, "bound": "exchange", "memory_s": 1.0, "compute_s": 2.0, "exchange_s": 8.0,
        "overhead_s": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("field", ["compute", "memory", "link", "usable_memory"])
@pytest.mark.parametrize("value", [0, -1, 1.01])
def test_shares_are_shares(field: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{field} is"):
        Assumptions(**{field: value})


def test_ring_all_reduce_by_simulation() -> None:
    """A ring of n ranks on n blocks: n-1 steps of reduce-scatter and n-1 of all-gather, one block each."""
    ranks, size = 4, 4 * 100
    values = [np.arange(ranks) * 10.0 + rank for rank in range(ranks)]
    sent = [0] * ranks
    for phase in ("reduce", "gather"):
        for step in range(ranks - 1):
            shift = 0 if phase == "reduce" else 1
            moves = [((rank - step + shift) % ranks, rank) for rank in range(ranks)]
            blocks = [values[rank][block] for block, rank in moves]
            for (block, rank), value in zip(moves, blocks, strict=True):
                target = (rank + 1) % ranks
                values[target][block] = values[target][block] + value if phase == "reduce" else value
                sent[rank] += size // ranks
    assert all((v == values[0]).all() for v in values)
    one = all_reduce(size, ranks, GPUS["h100"], IDEAL)
    assert [one.link_bytes] * ranks == sent
    assert one.network_bytes == 0
    assert one.time.seconds == pytest.approx(sent[0] / 450e9)


def test_exchanges_over_nodes() -> None:
    gpu, size = GPUS["h100"], 32e6
    two = all_reduce(size, 32, gpu, IDEAL)
    assert two.link_bytes == 2 * 7 / 8 * size
    assert two.network_bytes == 2 * 3 / 4 * size / 8
    assert two.time.seconds == pytest.approx(two.link_bytes / 450e9 + two.network_bytes / 50e9)
    wide = all_to_all(size, 32, gpu, IDEAL)
    assert (wide.link_bytes, wide.network_bytes) == (size * 7 / 32, size * 24 / 32)
    assert wide.bytes == size * 31 / 32
    assert wide.time.seconds == pytest.approx(wide.network_bytes / 50e9)
    for exchange in (all_reduce, all_to_all):
        assert exchange(size, 1, gpu, Assumptions()).time.seconds == 0
        assert exchange(0, 2, gpu, Assumptions()).time.seconds == pytest.approx(10e-6)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_zipf_chances(exponent: float) -> None:
    popularity = Popularity.zipf(16, 4, exponent)
    assert popularity.top_k == pytest.approx(4)
    assert popularity.max_over_mean == pytest.approx(1.0) if exponent == 0 else popularity.max_over_mean > 1.2
    other = Popularity.zipf(16, 4, exponent, seed=5)
    assert sorted(popularity.chances) == pytest.approx(sorted(other.chances))


def _drawn(weights: Sequence[float], top_k: int, tokens: int) -> np.ndarray:
    """Shares of tokens that choose each expert, drawn one after the other without replacement."""
    rng = np.random.default_rng(1)
    shares = np.asarray(weights) / sum(weights)
    counts = np.zeros(len(weights))
    for _ in range(tokens):
        counts[rng.choice(len(weights), top_k, replace=False, p=shares)] += 1
    return counts / tokens


def test_chances_are_those_of_drawing_without_replacement() -> None:
    weights = [1 / (r + 1) for r in range(32)]
    ours = sorted(Popularity.zipf(32, 4, 1.0).chances, reverse=True)
    np.testing.assert_allclose(ours, _drawn(weights, 4, 6000), atol=0.03)


@pytest.mark.parametrize(("tokens", "samples"), [(3, 3000), (5000, 40)])
def test_sampled_load_has_the_popularity(tokens: int, samples: int) -> None:
    popularity = Popularity.zipf(16, 4, 1.0)
    counts = sample_counts(popularity, tokens, samples)
    assert counts.shape == (samples, 16)
    np.testing.assert_allclose(counts.mean(axis=0) / tokens, popularity.chances, atol=0.03)
    if tokens == 3:
        assert (counts.sum(axis=1) == 12).all()
        assert counts.max() <= 3
        used = (counts > 0).sum(axis=1).mean()
        assert used == pytest.approx(popularity.touched(tokens), rel=0.03)


def test_one_token_uses_k_experts() -> None:
    assert (sample_counts(Popularity.uniform(8, 2), 1, 50) > 0).sum(axis=1).tolist() == [2] * 50
    assert Popularity.uniform(8, 2).touched(1) == pytest.approx(2)
    assert Popularity.uniform(8, 2).touched(10_000) == pytest.approx(8)


def shares(ranks: int, experts: int) -> NDArray[np.float64]:
    return rank_shares(contiguous([experts], ranks)[0], experts)


def test_rank_loads_follow_the_placement() -> None:
    counts = np.array([[5, 0, 1, 2, 0]])
    rows, used = rank_loads(counts, shares(2, 5))
    assert (rows.tolist(), used.tolist()) == ([[5, 3]], [[1, 2]])
    assert rank_loads(counts, shares(5, 5))[0].tolist() == counts.tolist()
    assert rank_loads(counts, shares(1, 5))[0].tolist() == [[8]]
    halves = np.array([[0.5, 0.5], [1, 0], [0, 1], [0, 1], [0, 1]])
    rows, used = rank_loads(counts, halves)
    assert rows.tolist() == [[2.5, 5.5]]
    assert used[0] == pytest.approx([1 - 0.5**5, 3 - 0.5**5 - 0])  # five tokens, each to either replica


@pytest.mark.parametrize(("ranks", "exponent"), [(2, 0.0), (4, 0.0), (4, 1.0), (8, 1.5)])
def test_blocks_hold_each_token_once(ranks: int, exponent: float) -> None:
    """Against tokens that are drawn one by one and sent to the ranks that have their experts."""
    popularity, tokens = Popularity.zipf(8, 2, exponent), 40
    owner = shares(ranks, 8).argmax(axis=1)
    fullest = []
    for batch in range(60):
        went = owner[draw_tokens(popularity, ranks * tokens, seed=100 + batch)].reshape(ranks, tokens, 2)
        blocks = [[(own == to).any(axis=1).sum() for to in range(ranks)] for own in went]
        fullest.append(np.max(blocks))
    found = fullest_block(popularity, shares(ranks, 8), tokens, 32)
    assert found == pytest.approx(np.mean(fullest), rel=0.06)
    assert found <= tokens


def test_one_token_fills_one_row() -> None:
    assert fullest_block(Popularity.uniform(8, 2), shares(4, 8), 1, 8) == 1.0
    assert fullest_block(Popularity.uniform(2, 2), shares(2, 2), 7, 8) == 7.0  # every token uses every expert


def test_bytes_sent_by_a_rank() -> None:
    """Counted on arrays that are cut and sent as the engine's collectives are."""
    ranks, hidden, top_k, tokens, capacity = 4, 6, 2, 10, 7
    rows = np.zeros((ranks * capacity, hidden), np.float16)
    route = np.zeros((ranks * capacity, 2 * top_k), np.float32)
    away = (ranks - 1) * capacity
    there, back = rows[:away].nbytes + route[:away].nbytes, rows[:away].nbytes
    sized = bytes_sent("alltoall", ranks=ranks, hidden=hidden, top_k=top_k, capacity=capacity, each=2)
    assert (sized.moved, sized.reduced) == (there + back, 8)
    full = bytes_sent(
        "alltoall", ranks=ranks, hidden=hidden, top_k=top_k, capacity=capacity, each=2, load_known=False
    )
    assert (full.moved, full.sent) == (there + back, there + back)
    summed = bytes_sent("allreduce", ranks=ranks, hidden=hidden, top_k=top_k, tokens=tokens)
    assert summed.reduced == np.zeros((tokens, hidden), np.float32).nbytes
    assert summed.sent == 2 * 3 / 4 * summed.reduced
    assert bytes_sent("alltoall", ranks=1, hidden=6, top_k=2, capacity=7).sent == 0
    with pytest.raises(UsageError, match="choices: allreduce, alltoall"):
        bytes_sent("ring", ranks=2, hidden=6, top_k=2)  # type: ignore[arg-type]  # wrong on purpose
    for payload in (sized, full, summed):
        assert exchange_layer(payload, GPUS["h100"], IDEAL).bytes == pytest.approx(payload.sent)
    assert exchange_layer(sized, GPUS["h100"], Assumptions()).time.seconds > 4 * Assumptions().exchange_s
    two_machines = bytes_sent("alltoall", ranks=32, hidden=6, top_k=2, capacity=1)
    assert exchange_layer(two_machines, GPUS["h100"], IDEAL).network_bytes > 0


def test_popularity_from_counts() -> None:
    assert Popularity.from_counts([4, 2, 2, 0], 4).chances == (1.0, 0.5, 0.5, 0.0)
    counts = sample_counts(Popularity.from_counts([4, 2, 2, 0], 4), 2, 100)
    assert (counts[:, 0] == 2).all()
    assert (counts[:, 3] == 0).all()
    for wrong in ([5, 3], [-1, 2], []):
        with pytest.raises(UsageError, match="expert counts"):
            Popularity.from_counts(wrong, 4)
    with pytest.raises(UsageError, match="expected 0 or more"):
        Popularity.zipf(8, 2, float("nan"))


def test_the_cost_model_needs_only_the_standard_library() -> None:
    import subprocess
    import sys

    script = "import sys, moe_export.costs; print([m for m in ('numpy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
