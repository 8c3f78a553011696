"""Cost model of the MoE kernels: work from shapes, tiles, lowerings. Every time is predicted."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from moe_export.costs import GPUS, Assumptions, Popularity, sample_counts
from moe_export.costs.moe_kernels import (
    LOWERINGS,
    MoeShapes,
    choose_lowering,
    choose_tiles,
    expected_blocks,
    gpu_for,
    kernel_work,
    layer_tiles,
    native_work,
    predict_kernel,
    predict_layer,
)
from moe_export.costs.tiles import KERNELS, Tile, tiles
from moe_export.errors import UsageError

OLMOE = MoeShapes(1, 64, 8, 2048, 1024)
ALL = ("a100-80", "h100", "h200", "l4", "l40s", "rtx-4090", "rtx-5090", "b200")


def at(tokens: int, shapes: MoeShapes = OLMOE) -> MoeShapes:
    return replace(shapes, tokens=tokens)


def test_one_token_reads_its_experts_weights_once() -> None:
    each = 2048 * 1024 * 2
    for kernel, matrices in (("gate_up", 2), ("down", 1)):
        work = kernel_work(kernel, OLMOE, tiles(kernel, "bfloat16")[0]).work
        assert work.weights == pytest.approx(8 * matrices * each)
        # Sixteen rows are computed for each row there is.
        assert work.flops == pytest.approx(16 * 2 * 8 * matrices * each / 2, rel=1e-6)
    assert kernel_work("combine", OLMOE, Tile(1, 512)).work.activations == (8 + 1) * 2048 * 2 + 8 * 4
    assert kernel_work("router", OLMOE, Tile(1)).work.activations == 64 * 2 + 8 * 8


@pytest.mark.parametrize(("tokens", "rows"), [(3, 16), (40, 16), (200, 32), (1000, 128)])
def test_expected_blocks_are_those_of_drawn_routings(tokens: int, rows: int) -> None:
    counts = sample_counts(Popularity.uniform(16, 4), tokens, 400, seed=1)
    drawn = float((-(-np.asarray(counts) // rows)).sum(axis=1).mean())
    assert expected_blocks(tokens, 4, 16, rows) == pytest.approx(drawn, rel=0.03)


def test_expected_blocks_at_the_edges() -> None:
    assert expected_blocks(0, 2, 8, 16) == 0
    assert expected_blocks(17, 8, 8, 16) == 16
    assert expected_blocks(1, 2, 8, 16) == pytest.approx(2)
    exact, rough = expected_blocks(1023, 2, 8, 16), expected_blocks(2048, 2, 8, 16)
    assert rough / exact == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("gpu", ALL)
def test_no_prediction_beats_the_data_sheet(gpu: str) -> None:
    ideal = Assumptions(compute=1, memory=1, link=1, kernel_s=0, exchange_s=0)
    for tokens in (1, 64, 4096):
        shapes = at(tokens)
        for lowering in LOWERINGS:
            seconds = predict_layer(shapes, gpu, lowering, ideal).seconds
            weights = shapes.touched * shapes.expert_weights * 2
            flops = 2.0 * shapes.assignments * shapes.expert_weights
            assert seconds >= weights / GPUS[gpu].bandwidth * 0.999
            assert seconds >= flops / GPUS[gpu].peaks["bfloat16"] * 0.999


@pytest.mark.parametrize("gpu", ALL)
def test_more_tokens_take_longer_and_faster_memory_less(gpu: str) -> None:
    times = [predict_layer(at(t), gpu).seconds for t in (1, 8, 64, 512, 4096)]
    assert times == sorted(times) and times[0] < times[-1]
    faster = replace(GPUS[gpu], bandwidth=2 * GPUS[gpu].bandwidth)
    assert predict_layer(at(8), faster).seconds < predict_layer(at(8), gpu).seconds


def test_tiles_grow_with_the_rows_of_an_expert() -> None:
    for gpu in ALL:
        rows = [choose_tiles("gate_up", at(t), gpu).rows for t in (1, 8, 256, 8192)]
        assert rows[0] == rows[1] == 16 and rows == sorted(rows) and rows[-1] >= 64, gpu


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tiles_of_a_layer_fit_each_other(dtype: str) -> None:
    for tokens, sm in itertools.product((0, 1, 100, 5000), (80, 86, 89, 90, 100, 120)):
        chosen = layer_tiles(replace(OLMOE, tokens=tokens, dtype=dtype), sm)
        assert set(chosen) == set(KERNELS)
        assert chosen["dispatch"].rows == chosen["gate_up"].rows == chosen["down"].rows
        assert all(tile in tiles(kernel, dtype) for kernel, tile in chosen.items())


def test_no_token_costs_launches_only() -> None:
    prediction = predict_layer(at(0), "h100")
    launches = [t.overhead for t in prediction.times.values()]
    assert launches == [Assumptions().kernel_s] * 5
    assert prediction.seconds < 20e-6 and prediction.label == "predicted"


def test_few_blocks_do_not_use_the_whole_gpu() -> None:
    tile = tiles("gate_up", "bfloat16")[0]
    gpu = GPUS["h100"]
    more = replace(gpu, multiprocessors=10 * gpu.multiprocessors)
    one = MoeShapes(1, 8, 1, 2048, 256)
    assert (
        predict_kernel("gate_up", one, tile, more).seconds > predict_kernel("gate_up", one, tile, gpu).seconds
    )


def test_lowerings_and_refusals() -> None:
    decode = choose_lowering(OLMOE, "rtx-4090")
    assert decode.lowering == "plugin" and decode.label == "predicted"
    assert "not measured" in decode.reason
    assert "not on SM89" in decode.refused["trt_moe"]
    native = choose_lowering(OLMOE, "rtx-4090", ("gather", "buckets", "dense"))
    assert native.lowering == "gather"
    assert native.refused["plugin"] == "not offered by this target"
    prefill = choose_lowering(at(2048), "rtx-4090", ("gather", "buckets", "dense"))
    assert prefill.lowering == "buckets" and "for up to 8 tokens" in prefill.refused["gather"]
    all_of_them = MoeShapes(512, 4, 4, 512, 512)
    assert choose_lowering(all_of_them, "h100", ("buckets", "dense")).lowering == "dense"


def test_trt_moe_only_within_its_limits() -> None:
    assert "trt_moe" in choose_lowering(OLMOE, "b200").predictions
    assert "trt_moe" in choose_lowering(OLMOE, 103).predictions
    for shapes, text in (
        (replace(OLMOE, activation="gelu"), "SiLU-gated"),
        (replace(OLMOE, gated=False), "SiLU-gated"),
        (replace(OLMOE, biased=True), "without biases"),
        (at(17), "slow for more than 16 tokens"),
    ):
        assert text in choose_lowering(shapes, "b200").refused["trt_moe"]


def test_turing_has_no_kernels() -> None:
    choice = choose_lowering(OLMOE, 75)
    assert choice.lowering == "gather" and "not for SM75" in choice.refused["plugin"]


def test_work_of_native_lowerings() -> None:
    shapes = at(64)
    gather, buckets, dense = (native_work(shapes, n)[0] for n in ("gather", "buckets", "dense"))
    assert gather.weights / dense.weights == pytest.approx(64 * 8 / 64)
    assert dense.flops / gather.flops == pytest.approx(64 / 8)
    assert gather.flops < buckets.flops < dense.flops


def test_wrong_use() -> None:
    with pytest.raises(UsageError, match="top_k is 9; expected at most experts, 8"):
        MoeShapes(1, 8, 9, 16, 16)
    with pytest.raises(UsageError, match="tokens is -1"):
        at(-1)
    with pytest.raises(UsageError, match="dtype 'float8'"):
        replace(OLMOE, dtype="float8")
    with pytest.raises(UsageError, match="no GPU of SM 70; choices: 75"):
        gpu_for(70)
    with pytest.raises(UsageError, match="no GPU 'h10'; nearest"):
        choose_lowering(OLMOE, "h10")
    with pytest.raises(UsageError, match="no lowering 'gathr'; nearest: gather"):
        choose_lowering(OLMOE, "h100", ("gathr",))
    with pytest.raises(UsageError, match="no lowering is possible: .*SM75"):
        choose_lowering(at(100), 75, ("plugin", "gather"))
    with pytest.raises(UsageError, match="no GPU kernel 'up'"):
        choose_tiles("up", OLMOE, "h100")
