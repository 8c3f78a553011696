"""Products that read one value become one product; their matrices are joined when they are written."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from moe_export.errors import EnvironmentLacksError
from moe_export.passes.fusion_steps import steps_replaced
from moe_export.passes.sibling_products import pack_sibling_products

from .moe_graphs import HIDDEN, model_of, run, tokens

TEXT = """
    a = MatMul (hidden, w_a)
    b = MatMul (hidden, w_b)
    c = MatMul (hidden, w_c)
    alone = MatMul (a, w_d)
    sum = Add (alone, b)
    total = Add (sum, c)
"""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"w_a": (HIDDEN, 16), "w_b": (HIDDEN, HIDDEN), "w_c": (HIDDEN, HIDDEN), "w_d": (16, HIDDEN)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_siblings_are_one_product_of_the_same_numbers() -> None:
    model = model_of(TEXT, weights(), result="total")
    before = model.clone()
    reads = []
    for name in ("w_a", "w_b", "w_c"):
        value = model.graph.initializers[name]
        held = value.const_value
        assert held is not None
        value.const_value = ir.LazyTensor(
            lambda held=held, name=name: (reads.append(name), held)[1],
            dtype=held.dtype,
            shape=held.shape,
            name=name,
        )
    assert pack_sibling_products(model) == 1
    assert reads == []  # nothing is read before it is written
    assert [n.op_type for n in model.graph] == ["MatMul", "Split", "MatMul", "Add", "Add", "Identity"]
    packed = next(n for n in model.graph).inputs[1]
    assert packed is not None and packed.shape is not None
    assert packed.shape.numpy() == (HIDDEN, 16 + 2 * HIDDEN)
    hidden = tokens(3)
    (got,), (want,) = run(model, hidden), run(before, hidden)
    assert np.allclose(got, want, rtol=1e-6, atol=1e-6)
    (broken,) = run(model, -hidden)
    assert not np.allclose(broken, want, rtol=1e-6, atol=1e-6)
    assert pack_sibling_products(model) == 0


def test_matrices_of_two_dtypes_stay_apart() -> None:
    held = weights()
    model = model_of(TEXT, held, result="total")
    value = model.graph.initializers["w_b"]
    value.const_value = ir.tensor(held["w_b"].astype(np.float16), name="w_b")
    assert pack_sibling_products(model) == 0


def test_a_step_that_transformers_does_not_have_is_refused() -> None:
    from transformers.exporters import onnxruntime_fusions as fusions

    before = fusions._STEPS
    unknown = steps_replaced({"_no_such_step": pack_sibling_products})
    with pytest.raises(EnvironmentLacksError, match="is not one whose fusions moe-export knows"), unknown:
        pass
    with steps_replaced({"_pack_sibling_matmuls": pack_sibling_products}):
        assert pack_sibling_products in [entry[0] for entry in fusions._STEPS]
    assert before is fusions._STEPS
