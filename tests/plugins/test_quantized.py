"""QuantizedExpertMLP by the CPU plugin's kernel: against the float64 reference, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_export.backends.onnxruntime.runner import ort_error_types
from moe_export.ops import OPS
from moe_export.ops.contract import FLOAT_TYPES
from moe_export.ops.expert_mlp import ACTIVATIONS
from tests.ops.cases import QUANTIZED_EXPERTS, expert_ids, quantized_inputs, routings
from tests.ops.one_op import assert_equal, expected, in_onnxruntime, problem

from .kernels import in_kernel, refusal, session
from .test_errors import node_model

OP = "QuantizedExpertMLP"
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def check(dtype: str, inputs: dict[str, Any], attributes: dict[str, Any], threads: int = 2) -> None:
    got = in_kernel(OP, inputs, attributes, threads)
    assert_equal(OP, dtype, got, expected(OP, inputs, attributes))


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
@pytest.mark.parametrize("form", QUANTIZED_EXPERTS)
def test_kernel(form: str, dtype: str) -> None:
    # Every routing in float32: spread, one expert for all, all dropped, K = E, no token.
    for ids, experts in routings() if dtype == "float32" else [(expert_ids(7, 2, 4), 4)]:
        inputs = quantized_inputs(QUANTIZED_EXPERTS[form], ids, experts, dtype, hidden=2, inner=3)
        check(dtype, inputs, {"num_experts": experts, **QUANTIZED_EXPERTS[form]})


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 18, 40])
def test_every_height_of_a_tile(rows: int, bits: int) -> None:
    """All tokens go to one expert: rows in one tile, in two, decoded first; more than one block of the
    depth."""
    ids, attributes = np.full((rows, 1), 1, np.int32), {"num_experts": 2, "bits": bits, "activation": "relu"}
    inputs = quantized_inputs(attributes, ids, 2, "float32", hidden=20, inner=3)
    check("float32", inputs, attributes)
    check("float32", inputs, attributes, threads=1)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    """In a process of its own, since the library looks once."""
    code = f"""
import os
os.environ["MOE_EXPORT_CPU_ISA"] = {isa!r}
from tests.plugins.test_quantized import test_kernel, test_every_height_of_a_tile
for form in ("swiglu", "swiglu, 4 bits", "gpt-oss, 4 bits", "gelu", "small blocks"):
    test_kernel(form, "float32")
for rows in (1, 2, 3, 4, 5, 6, 12, 13):
    for bits in (8, 4):
        test_every_height_of_a_tile(rows, bits)
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if "this machine or build lacks" in done.stderr:
        pytest.skip(f"no {isa} here")
    assert done.stdout.strip().endswith("same"), done.stderr[-2000:]


@SETTINGS
@given(
    tokens=st.integers(0, 40),
    top_k=st.integers(1, 8),
    experts=st.integers(1, 17),
    dtype=st.sampled_from(FLOAT_TYPES),
    bits=st.sampled_from([8, 4]),
    block=st.sampled_from([16, 32, 64, 128]),
    hidden=st.integers(1, 5),
    inner=st.integers(1, 5),
    activation=st.sampled_from(ACTIVATIONS),
    gated=st.integers(0, 1),
    biased=st.integers(0, 1),
    seed=st.integers(0, 2**32),
)
def test_random_layers(
    tokens: int, top_k: int, experts: int, dtype: str, bits: int, block: int, hidden: int, inner: int,
    activation: str, gated: int, biased: int, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    ids = rng.integers(-2, experts + 2, (tokens, top_k)).astype(np.int32)
    attributes = {
        "activation": activation,
        "gated": 1 if activation == "clamped_swiglu" else gated,
        "bits": bits,
        "block": block,
        "biased": biased,
    }
    inputs = quantized_inputs(attributes, ids, experts, dtype, hidden=hidden, inner=inner)
    inputs["weights"] = np.abs(inputs["weights"]) / top_k
    check(dtype, inputs, {"num_experts": experts, **attributes})


def test_the_body_says_the_same() -> None:
    attributes = {"num_experts": 5, "bits": 4}
    inputs = quantized_inputs(attributes, expert_ids(9, 3, 5), 5, "float32", hidden=3, inner=2)
    (kernel,), (body,) = in_kernel(OP, inputs, attributes), in_onnxruntime(OP, inputs, attributes)
    assert not problem(OPS[OP], "float32", kernel, body.astype(np.float64))


def test_equal_inputs_give_equal_bits_with_any_number_of_threads() -> None:
    attributes = {"num_experts": 8, "bits": 4}
    inputs = quantized_inputs(
        attributes, expert_ids(30, 2, 8, strangers=False), 8, "float32", hidden=8, inner=8
    )
    results = [in_kernel(OP, inputs, attributes, threads)[0] for threads in (1, 2, 2)]
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[1], results[2])


def test_nan_and_infinity_reach_the_output() -> None:
    attributes = {"num_experts": 4}
    inputs = quantized_inputs(
        attributes, expert_ids(6, 2, 4, strangers=False), 4, "float32", hidden=2, inner=2
    )
    inputs["hidden"][1, 3], inputs["hidden"][2, 0], inputs["weights"][3, 1] = np.nan, np.inf, np.nan
    (out,) = in_kernel(OP, inputs, attributes)
    assert not np.isfinite(out[1:4]).all(axis=1).any() and np.isfinite(out[[0, 4, 5]]).all()


def good(bits: int = 8, **changes: Any) -> dict[str, Any]:
    """Inputs with T = 5, K = 2, E = 4, H = 64, I = 96, some replaced."""
    made = quantized_inputs({"bits": bits}, expert_ids(5, 2, 4), 4, "float32", hidden=2, inner=3)
    return {**made, **changes}


def blank(like: str, *shape: int, bits: int = 8) -> Any:
    return np.zeros(shape, good(bits)[like].dtype)


WORDS = good(4)["up_codes"].shape
REFUSED: list[tuple[int, dict[str, Any], str]] = [
    (
        8,
        {"hidden": np.ones((5, 33), np.float32)},
        "input hidden has 33 columns; expected a multiple of attribute",
    ),
    (
        8,
        {"hidden": np.ones((5, 32), np.float32)},
        "input up_codes has shape [4, 3, 64, 64]; expected 32 (columns",
    ),
    (8, {"hidden": np.ones(5, np.float32)}, "input hidden has shape [5]; expected 2 dimensions"),
    (
        8,
        {"weights": np.ones((5, 3), np.float32)},
        "input weights has shape [5, 3]; expected 2 (columns of exp",
    ),
    (
        8,
        {"up_codes": blank("up_codes", 3, 3, 64, 64)},
        "input up_codes has shape [3, 3, 64, 64]; expected 4 (attr",
    ),
    (
        8,
        {"up_codes": blank("up_codes", 4, 2, 64, 64)},
        "up_codes has shape [4, 2, 64, 64]; expected 3 (panels of",
    ),
    (8, {"up_codes": blank("up_codes", 4, 3, 64, 32)}, "expected 64 (columns of a panel) in dimension 3"),
    (
        8,
        {"up_codes": blank("up_codes", 4, 3, 64)},
        "input up_codes has shape [4, 3, 64]; expected 4 dimensions",
    ),
    (
        8,
        {"up_scales": blank("up_scales", 4, 3, 1, 64)},
        "up_scales has shape [4, 3, 1, 64]; expected 2 (blocks",
    ),
    (
        8,
        {"up_scales": blank("up_scales", 4, 2, 2, 64)},
        "input up_scales has shape [4, 2, 2, 64]; expected 3",
    ),
    (
        8,
        {"down_scales": blank("down_scales", 4, 1, 0, 64)},
        "input down_scales has shape [4, 1, 0, 64]; it is empty",
    ),
    (
        8,
        {"down_scales": blank("down_scales", 4, 1, 3)},
        "input down_scales has shape [4, 1, 3]; expected 4 dim",
    ),
    (
        8,
        {"down_codes": blank("down_codes", 4, 1, 95, 64)},
        "down_codes has shape [4, 1, 95, 64]; expected 96 (the",
    ),
    (
        8,
        {"down_codes": blank("down_codes", 4, 2, 96, 64)},
        "input down_codes has shape [4, 2, 96, 64]; expected 1",
    ),
    (
        4,
        {"up_codes": blank("up_codes", *WORDS[:4], bits=4)},
        "input up_codes has shape [4, 3, 8, 64]; expected 5",
    ),
    (
        4,
        {"up_codes": blank("up_codes", *WORDS[:4], 8, bits=4)},
        "expected 4 (bytes of a word) in dimension 4",
    ),
    (
        4,
        {"up_codes": blank("up_codes", 4, 3, 9, 64, 4, bits=4)},
        "expected 8 (an eighth of the columns of hidden)",
    ),
]


@pytest.mark.parametrize(("bits", "changes", "message"), REFUSED, ids=[c[2][:40] for c in REFUSED])
def test_refused_when_it_runs(bits: int, changes: dict[str, Any], message: str) -> None:
    said = refusal(OP, good(bits, **changes), {"num_experts": 4, "bits": bits})
    assert f"moe_export.{OP}: " in said and message in said


@pytest.mark.parametrize("which", ["up_bias", "down_bias"])
def test_a_bias_of_another_size_is_refused(which: str) -> None:
    attributes = {"biased": 1}
    inputs = quantized_inputs(attributes, expert_ids(5, 2, 4), 4, "float32", hidden=2, inner=3)
    inputs[which] = inputs[which][:, 1:]
    said = refusal(OP, inputs, {"num_experts": 4, **attributes})
    assert f"moe_export.{OP}: input {which} has shape [4, " in said


T = onnx.TensorProto
KINDS = {
    "hidden": T.FLOAT, "expert_ids": T.INT32, "weights": T.FLOAT, "up_codes": T.INT8, "up_scales": T.FLOAT,
    "down_codes": T.INT8, "down_scales": T.FLOAT,
}  # fmt: skip
LOADING: list[tuple[dict[str, int], dict[str, Any], str]] = [
    ({}, {"bits": 3}, "attribute bits is 3; expected 4 or 8"),
    ({}, {"block": 24}, "attribute block is 24; expected 16, 32, 64 or 128"),
    ({}, {"bits": 4}, "input up_codes has dtype int8; expected uint8, as attribute bits is 4"),
    ({"up_codes": T.UINT8}, {}, "input up_codes has dtype uint8; expected int8, as attribute bits is 8"),
    ({"down_codes": T.FLOAT}, {}, "input down_codes has dtype float32; expected int8"),
    ({}, {"num_experts": 0}, "attribute num_experts is 0; expected at least 1"),
    ({}, {"activation": "swish"}, "attribute activation is 'swish'"),
    ({}, {"activation": "clamped_swiglu", "gated": 0}, "which needs gated = 1"),
    ({}, {"biased": 1}, "input up_bias is missing; attribute biased is 1"),
    ({"up_bias": T.FLOAT}, {"biased": 1}, "input down_bias is missing"),
    ({"up_bias": T.FLOAT}, {}, "a bias is given; attribute biased is 0"),
    ({"up_bias": T.FLOAT, "down_bias": T.DOUBLE}, {"biased": 1}, "input down_bias has dtype float64"),
    ({"hidden": T.DOUBLE}, {}, "tensor(double)"),
    ({"up_scales": T.FLOAT16}, {}, "tensor(float16)"),
]


@pytest.mark.parametrize(("dtypes", "attributes", "message"), LOADING, ids=[c[2][:40] for c in LOADING])
def test_refused_at_load(dtypes: dict[str, int], attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(ort_error_types()) as caught:
        session(node_model(OP, {**KINDS, **dtypes}, {"num_experts": 2, **attributes}))
    assert message in str(caught.value) and OP in str(caught.value)


def test_a_wrong_result_is_seen() -> None:
    attributes = {"num_experts": 4, "bits": 4}
    inputs = quantized_inputs(
        attributes, expert_ids(7, 2, 4, strangers=False), 4, "float32", hidden=2, inner=2
    )
    want = expected(OP, inputs, attributes)
    (out,) = in_kernel(OP, inputs, attributes)
    codes = inputs["down_codes"]
    (swapped,) = in_kernel(OP, {**inputs, "down_codes": (codes >> 4) | (codes << 4)}, attributes)
    (shifted,) = in_kernel(OP, {**inputs, "up_scales": np.roll(inputs["up_scales"], 1, 2)}, attributes)
    for broken in (out * 2, np.zeros_like(out), out[::-1], swapped, shifted):
        with pytest.raises(AssertionError, match="error"):
            assert_equal(OP, "float32", [broken], want)
