"""The PyTorch custom ops against the references, their fake shapes, and their way into ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe_export.models.experts import experts_forward
from moe_export.ops import OPS
from moe_export.ops.torch_ops import torch_ops, translation_table

from .cases import randoms, routings
from .one_op import problem

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def tensor(array: Any, dtype: str) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32)).to(DTYPES[dtype])


def check(op: str, dtype: str, got: torch.Tensor, want: Any) -> None:
    found = problem(OPS[op], dtype, got.double().numpy(), want)
    assert not found, found


def test_dispatch() -> None:
    for ids, experts in routings():
        got = torch_ops().dispatch(torch.from_numpy(ids), experts, True, "layer")
        want = OPS["Dispatch"].reference(ids, experts)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == torch.int64
            assert np.array_equal(a.numpy(), b)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_matmul(dtype: str, transposed: bool) -> None:
    for ids, experts in routings():
        order, offsets, _ = OPS["Dispatch"].reference(ids, experts)
        rows, weight = (
            randoms(dtype, len(order), 6),
            randoms(dtype, experts, *((6, 5) if transposed else (5, 6))),
        )
        got = torch_ops().grouped_matmul(
            tensor(rows, dtype), tensor(weight, dtype), torch.from_numpy(offsets), transposed
        )
        assert got.dtype == DTYPES[dtype]
        check(
            "GroupedMatMul",
            dtype,
            got,
            OPS["GroupedMatMul"].reference(rows, weight, offsets, int(transposed)),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine(dtype: str) -> None:
    for ids, experts in routings():
        order, _, _ = OPS["Dispatch"].reference(ids, experts)
        rows, weights = randoms(dtype, len(order), 6), randoms("float32", *ids.shape)
        got = torch_ops().combine(tensor(rows, dtype), torch.from_numpy(order), torch.from_numpy(weights))
        assert got.dtype == DTYPES[dtype]
        check("Combine", dtype, got, OPS["Combine"].reference(rows, order, weights))


def arguments() -> dict[str, tuple[Any, ...]]:
    ids = torch.tensor([[0, 2], [1, -1], [2, 3]], dtype=torch.int32)
    order, offsets, _ = torch_ops().dispatch(ids, 3, True, "")
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    return {
        "dispatch": (ids, 3, True, "layer"),
        "grouped_matmul": (rows, weight, offsets, False),
        "combine": (rows, order, torch.rand(3, 2)),
    }


@pytest.mark.parametrize("name", ["dispatch", "grouped_matmul", "combine"])
def test_opcheck(name: str) -> None:
    op = getattr(torch_ops(), name)
    torch.library.opcheck(
        op, arguments()[name], test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


@pytest.mark.parametrize("name", ["dispatch", "grouped_matmul", "combine"])
def test_fake_results_have_the_real_shapes_and_dtypes(name: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    op, given = getattr(torch_ops(), name), arguments()[name]
    with FakeTensorMode() as mode:
        fakes = tuple(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in given)
        fake = op(*fakes)
    real = op(*given)
    pairs = zip(fake, real, strict=True) if isinstance(real, (tuple, list)) else [(fake, real)]
    for a, b in pairs:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_every_torch_op_has_a_translation() -> None:
    table = translation_table()
    assert {str(op) for op in table} == {
        "moe_export.dispatch.default",
        "moe_export.grouped_matmul.default",
        "moe_export.combine.default",
    }


def experts_reference(
    hidden: Any, ids: Any, weights: Any, up: Any, down: Any, up_bias: Any = None, down_bias: Any = None
) -> Any:
    biased = int(up_bias is not None)
    return OPS["ExpertMLP"].reference(
        hidden,
        ids,
        weights,
        up,
        down,
        up_bias,
        down_bias,
        num_experts=len(up),
        gated=0,
        activation="gelu",
        biased=biased,
    )


@pytest.mark.parametrize("biased", [False, True])
def test_experts_forward_ignores_dropped_tokens_whatever_their_weight(biased: bool) -> None:
    ids = np.array([[0, -1], [-1, -1], [2, 1], [1, 0]], np.int32)
    hidden, weights = randoms("float32", 4, 6), np.abs(randoms("float32", 4, 2))
    up, down = randoms("float32", 3, 5, 6), randoms("float32", 3, 6, 5, seed=1) * 0.3
    biases = (randoms("float32", 3, 5, seed=2), randoms("float32", 3, 6, seed=3)) if biased else (None, None)
    t = [None if a is None else torch.from_numpy(a) for a in (hidden, ids, weights, up, down, *biases)]
    got = experts_forward(
        t[0], t[1], t[2], t[3], t[4], torch.nn.functional.gelu, layer="x", up_bias=t[5], down_bias=t[6]
    )
    want = experts_reference(hidden, ids, weights, up, down, *biases)
    check("ExpertMLP", "float32", got, want)
    assert not got[1].any(), "a token dropped by all its experts gets nothing"


def test_experts_forward_ignores_what_after_down_makes_of_dropped_rows() -> None:
    ids, weights = torch.tensor([[0], [-1]]), torch.ones(2, 1)
    up = down = torch.eye(2).unsqueeze(0)
    out = experts_forward(
        torch.ones(2, 2), ids, weights, up, down, torch.relu, layer="x", after_down=lambda rows: rows + 1
    )
    assert out.tolist() == [[2.0, 2.0], [0.0, 0.0]]


def test_not_a_number_weight_of_a_dropped_assignment_does_no_harm() -> None:
    ids, weights = torch.tensor([[0, -1]]), torch.tensor([[1.0, float("nan")]])
    up = down = torch.eye(2).unsqueeze(0)
    out = experts_forward(torch.ones(1, 2), ids, weights, up, down, torch.relu, layer="x")
    assert out.tolist() == [[1.0, 1.0]]
