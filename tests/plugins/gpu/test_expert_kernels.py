"""gate_up, down and combine under Triton's interpreter, each against the float64 reference of its op."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from moe_export_plugins.gpu.interpret import run_interpreted
from numpy.typing import NDArray

from moe_export.costs.tiles import Tile
from moe_export.errors import CheckFailed, InputError, UsageError
from moe_export.ops import combine as combine_op
from moe_export.ops import dispatch as dispatch_op
from moe_export.ops import expert_mlp, grouped_matmul
from tests.plugins.gpu.kernel_cases import DTYPES, LIMITS, Layer, error, normal

SMALL = {"float32": Tile(16, 32, 16, group=2), "float16": Tile(16, 32, 32), "bfloat16": Tile(16, 32, 32)}
ACTIVATIONS = [
    ("silu", 1, "concatenated"),
    ("silu", 1, "interleaved"),
    ("gelu", 1, "concatenated"),
    ("gelu_tanh", 0, "concatenated"),
    ("relu", 0, "concatenated"),
    ("relu2", 1, "interleaved"),
    ("clamped_swiglu", 1, "interleaved"),
    ("clamped_swiglu", 1, "concatenated"),
]


def blocks_of(ids: NDArray[np.int32], layer: Layer, rows: int) -> dict[str, NDArray[np.int32]]:
    constants = {"num_experts": layer.up.shape[0], "top_k": ids.shape[1]}
    found = run_interpreted("dispatch", {"expert_ids": ids}, constants, Tile(rows, 64))
    return {name: found[name] for name in ("sorted_rows", "block_expert")}


def sizes(layer: Layer) -> dict[str, Any]:
    transposed = int(layer.mlp.get("transposed", 0))
    return {
        "num_experts": layer.up.shape[0],
        "top_k": layer.attributes["top_k"],
        "hidden": layer.hidden.shape[1],
        "inner": layer.down.shape[1 if transposed else 2],
    }


def gate_up(layer: Layer, ids: NDArray[np.int32], tile: Tile) -> NDArray[Any]:
    constants = {**sizes(layer), **layer.mlp, "biased": int(layer.up_bias is not None)}
    arrays = {"hidden": layer.hidden, "up": layer.up, **blocks_of(ids, layer, tile.rows)}
    if layer.up_bias is not None:
        arrays["up_bias"] = layer.up_bias
        constants["bias_dtype"] = layer.up_bias.dtype.name
    return run_interpreted("gate_up", arrays, constants, tile)["inner"]


def gate_up_reference(layer: Layer, ids: NDArray[np.int32]) -> NDArray[np.float64]:
    """[M, I] in assignment order; NaN where dropped."""
    mlp = {"activation": "silu", "gated": 1, "layout": "concatenated", **layer.mlp}
    transposed = mlp.pop("transposed", 0)
    order, offsets, tokens = dispatch_op.reference(ids, layer.up.shape[0])
    rows = grouped_matmul.reference(
        layer.hidden.astype(np.float64)[tokens], layer.up, offsets, int(transposed)
    )
    owner = np.clip(ids.reshape(-1)[order], 0, layer.up.shape[0] - 1)
    if layer.up_bias is not None:
        rows = rows + layer.up_bias.astype(np.float64)[owner]
    sorted_result = expert_mlp.activate(rows, **mlp)
    sorted_result[: offsets[0]] = np.nan
    sorted_result[offsets[-1] :] = np.nan
    result = np.empty_like(sorted_result)
    result[order] = sorted_result
    return result


def random_ids(tokens: int, experts: int, top_k: int) -> NDArray[np.int32]:
    order = np.argsort(np.random.default_rng(tokens + experts).random((tokens, experts)), axis=1)
    return order[:, :top_k].astype(np.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("activation", "gated", "layout"), ACTIVATIONS)
def test_gate_up(dtype: str, activation: str, gated: int, layout: str) -> None:
    transposed = len(activation) % 2
    layer = Layer(
        dtype, tokens=5, experts=3, top_k=2, hidden=40, inner=36, biased=activation != "silu",
        activation=activation, gated=gated, layout=layout, transposed=transposed,
    )  # fmt: skip
    ids = random_ids(5, 3, 2)
    assert error(gate_up(layer, ids, SMALL[dtype]), gate_up_reference(layer, ids)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("biased", [False, True])
def test_down(dtype: str, transposed: int, biased: bool) -> None:
    layer = Layer(
        dtype, tokens=5, experts=3, top_k=2, hidden=40, inner=36, biased=biased, transposed=transposed
    )
    ids, tile = random_ids(5, 3, 2), SMALL[dtype]
    inner = normal(9, (10, 36), dtype)
    weights = np.random.default_rng(8).random((5, 2)).astype(np.float32)
    constants = {**sizes(layer), "transposed": transposed, "biased": int(biased), "bias_dtype": dtype}
    arrays = {"inner": inner, "down": layer.down, "weights": weights, **blocks_of(ids, layer, tile.rows)}
    if layer.down_bias is not None:
        arrays["down_bias"] = layer.down_bias
    result = run_interpreted("down", arrays, constants, tile)["rows"]
    order, offsets, _ = dispatch_op.reference(ids, 3)
    wanted = np.empty((10, 40))
    wanted[order] = grouped_matmul.reference(inner[order], layer.down, offsets, transposed)
    if layer.down_bias is not None:
        wanted += layer.down_bias.astype(np.float64)[ids.reshape(-1)]
    assert error(result, wanted * weights.reshape(-1, 1)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "top_k", "hidden"), [(0, 2, 40), (1, 1, 33), (7, 5, 80)])
def test_combine(dtype: str, tokens: int, top_k: int, hidden: int) -> None:
    rows = normal(1, (tokens * top_k, hidden), dtype)
    ids = random_ids(tokens, 6, top_k)
    constants = {"num_experts": 6, "top_k": top_k, "hidden": hidden}
    result = run_interpreted("combine", {"rows": rows, "expert_ids": ids}, constants, Tile(4, 32))["out"]
    ones = np.ones((tokens, top_k))
    wanted = combine_op.reference(rows, np.arange(tokens * top_k), ones)
    assert error(result, wanted) < LIMITS[dtype]


def test_combine_reads_no_row_of_a_dropped_expert() -> None:
    rows = np.full((6, 8), np.nan, np.float32)
    rows[[0, 3]] = 1.0
    ids = np.array([[1, -1], [7, 0], [-1, 6]], np.int32)
    constants = {"num_experts": 6, "top_k": 2, "hidden": 8}
    result = run_interpreted("combine", {"rows": rows, "expert_ids": ids}, constants, Tile(4, 32))["out"]
    assert np.array_equal(result, np.array([[1.0] * 8, [1.0] * 8, [0.0] * 8], np.float32))


def test_gate_up_writes_only_rows_of_its_own_experts() -> None:
    layer = Layer("float32", tokens=4, experts=3, top_k=2, hidden=16, inner=16)
    ids = np.array([[0, -1], [5, 2], [1, 1], [-1, 3]], np.int32)
    result, wanted = gate_up(layer, ids, SMALL["float32"]), gate_up_reference(layer, ids)
    assert np.array_equal(np.isnan(result), np.isnan(wanted))
    kept = ~np.isnan(wanted[:, 0])
    assert error(result[kept], wanted[kept]) < LIMITS["float32"]


def test_many_blocks_and_all_groupings() -> None:
    """Blocks of one expert, groups of blocks that do not divide their number, columns that are not whole."""
    layer = Layer("float32", tokens=75, experts=3, top_k=1, hidden=24, inner=40)
    ids = np.where(np.arange(75) % 9 == 0, 2, 0).astype(np.int32)[:, None]
    wanted = gate_up_reference(layer, ids)
    for group in (1, 3, 8):
        tile = Tile(16, 32, 16, group=group)
        assert error(gate_up(layer, ids, tile), wanted) < LIMITS["float32"]


def test_the_same_inputs_give_the_same_bits() -> None:
    layer = Layer("bfloat16", tokens=9, experts=4, top_k=2, hidden=32, inner=32)
    ids = random_ids(9, 4, 2)
    first, second = (gate_up(layer, ids, SMALL["bfloat16"]) for _ in range(2))
    assert first.tobytes() == second.tobytes()


def test_the_comparison_rejects_wrong_results() -> None:
    layer = Layer("float32", tokens=5, experts=3, top_k=2, hidden=40, inner=36)
    ids = random_ids(5, 3, 2)
    wanted = gate_up_reference(layer, ids)
    good = gate_up(layer, ids, SMALL["float32"])
    one_expert_swapped = gate_up(layer, np.where(ids == 0, 1, ids).astype(np.int32), SMALL["float32"])
    for wrong in (good * 2, good * 0, good[::-1], good[:-1], one_expert_swapped):
        assert error(wrong, wanted) > LIMITS["float32"]
    good[3, 3] = np.nan
    assert error(good, wanted) == float("inf")


def test_bfloat16_rounds_to_nearest_even_in_the_interpreter() -> None:
    """The two repaired faults of the interpreter show here when they are not repaired."""
    rows = np.array([[1.0, 1.0], [2.0**-8, 3 * 2.0**-8]]).astype(ml_dtypes.bfloat16)
    constants = {"num_experts": 2, "top_k": 2, "hidden": 2}
    ids = np.array([[0, 1]], np.int32)
    result = run_interpreted("combine", {"rows": rows, "expert_ids": ids}, constants, Tile(1, 32))["out"]
    # 1 + 2^-8 lies between 1 and 1 + 2^-7: even is 1; 1 + 3*2^-8 lies between 1 + 2^-7 and 1 + 2^-6.
    assert result.astype(np.float64).tolist() == [[1.0, 1.0 + 2.0**-6]]


@pytest.mark.parametrize("truncated", [False, True])
def test_three_tf32_products_are_float32(truncated: bool) -> None:
    """The interpreter multiplies float32 exactly; tensor cores get split numbers. The split, in numpy."""

    def tf32(x: NDArray[np.float32]) -> NDArray[np.float32]:
        bits = x.view(np.uint32)
        half = np.uint32(0 if truncated else 1 << 12)
        return ((bits + half) & np.uint32(0xFFFFE000)).view(np.float32)

    a, b = normal(1, (32, 2048), "float32"), normal(2, (2048, 32), "float32")
    a_high, b_high = tf32(a), tf32(b)
    a_low, b_low = tf32(a - a_high), tf32(b - b_high)
    wanted = a.astype(np.float64) @ b.astype(np.float64)
    assert error(a_low @ b_high + a_high @ b_low + a_high @ b_high, wanted) < LIMITS["float32"]
    assert error(a_high @ b_high, wanted) > 100 * LIMITS["float32"]  # one product is not enough


def test_bad_inputs_are_named() -> None:
    rows, ids = normal(1, (4, 8), "float32"), random_ids(2, 6, 2)
    constants = {"num_experts": 6, "top_k": 2, "hidden": 8}
    with pytest.raises(InputError, match=r"input rows is float32 \[3, 8\]; expected float32 \[4, 8\]"):
        run_interpreted("combine", {"rows": rows[:3], "expert_ids": ids}, constants, Tile(1, 32))
    with pytest.raises(InputError, match="inputs rows; expected expert_ids, rows"):
        run_interpreted("combine", {"rows": rows}, constants, Tile(1, 32))
    with pytest.raises(UsageError, match="unknown constant 'hiden'.*nearest: hidden"):
        run_interpreted("combine", {"rows": rows, "expert_ids": ids}, {"hiden": 8}, Tile(1, 32))
    with pytest.raises(UsageError, match="no GPU kernel 'combin'.*nearest: combine"):
        run_interpreted("combin", {}, {}, Tile(1, 32))


def test_a_kernel_that_writes_outside_or_fails_is_found() -> None:
    rows, ids = normal(1, (4, 8), "float32"), random_ids(2, 6, 2)
    constants = {"num_experts": 6, "top_k": 2, "hidden": 8}
    arrays = {"rows": rows, "expert_ids": ids}
    for name, message in (("writes_outside", "writes outside its output out"), ("fails", "no_such_thing")):
        with pytest.raises(CheckFailed, match=message):
            run_interpreted(
                "combine", arrays, constants, Tile(1, 32),
                function=("tests.plugins.gpu.broken_kernels", name),
            )  # fmt: skip
    assert run_interpreted("combine", arrays, constants, Tile(1, 32))["out"].shape == (2, 8)
