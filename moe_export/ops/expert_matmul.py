"""ExpertMatMul: GroupedMatMul whose matrices are inputs of their own, as most checkpoints hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .contract import FLOAT_TOLERANCE, FLOAT_TYPES, Attribute, OpContract, Param

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def reference(
    rows: NDArray[Any], offsets: NDArray[np.int64], *weight: NDArray[Any], num_experts: int
) -> NDArray[np.float64]:
    """``out[m] = rows[m] @ weight[e].T`` for ``offsets[e] <= m < offsets[e+1]``; zero elsewhere.

    ``rows`` [M, A]; ``offsets`` [E+1]; E times ``weight`` [B, A], the layout of ``torch.nn.Linear``. Returns
    float64 [M, B].
    """
    import numpy as np

    from .grouped_matmul import reference as grouped

    if len(weight) != num_experts:
        raise UsageError(f"ExpertMatMul: {len(weight)} matrices for {num_experts} experts")
    return grouped(rows, np.stack([np.asarray(w, np.float64) for w in weight]), offsets)


def body(attributes: Mapping[str, Any], _opset: int) -> str:
    return joined_branches(
        attributes["num_experts"],
        lambda e: expert_branch(e, f"{unfolded(e)}\nmatrix_f32_{e} = Cast <to = 1> (matrix_{e})"),
    )


def joined_branches(count: int, branch: Callable[[int], str]) -> str:
    """Nodes of a body that joins what one ``branch`` (see :func:`expert_branch`) per expert makes."""
    experts = "".join(branch(e) for e in range(count))
    parts = ", ".join(f"part_{e}" for e in range(count))
    return f"""
    zero_1d = Constant <value_ints = [0]> ()
    one_1d = Constant <value_ints = [1]> ()
    minus_one_1d = Constant <value_ints = [-1]> ()
    int_max_1d = Constant <value_ints = [9223372036854775807]> ()
    columns = Shape <start = 0, end = 1> (weight_0)
    nothing_shape = Concat <axis = 0> (zero_1d, columns)
    nothing = ConstantOfShape (nothing_shape)
    first = Slice (offsets, zero_1d, one_1d, zero_1d)
    last = Slice (offsets, minus_one_1d, int_max_1d, zero_1d)
    run_zero = Sub (first, first)
    all_rows = Shape <start = 0, end = 1> (rows)
    rest = Sub (all_rows, last)
    head_shape = Concat <axis = 0> (first, columns)
    tail_shape = Concat <axis = 0> (rest, columns)
    head = ConstantOfShape (head_shape)
    tail = ConstantOfShape (tail_shape)
    {experts}
    joined = Concat <axis = 0> (head, {parts}, tail)
    out = CastLike (joined, rows)
    """


def unfolded(e: int) -> str:
    """Nodes that make ``matrix_<e>``, which is ``weight_<e>``, by a Reshape to its own shape plus a zero that
    only the run knows: otherwise a runtime casts every expert's matrix to float32 when it loads the model,
    and keeps the copies."""
    return f"""
        known_{e} = Shape (weight_{e})
        shape_{e} = Add (known_{e}, run_zero)
        matrix_{e} = Reshape (weight_{e}, shape_{e})"""


def expert_branch(e: int, to_float32: str) -> str:
    """Nodes of a body that multiply the rows of expert ``e``; ``to_float32`` makes ``matrix_f32_<e>`` of
    ``weight_<e>``.

    They are in a branch, so that an expert without rows costs nothing.
    """
    return f"""
    at_{e} = Constant <value_ints = [{e}]> ()
    after_{e} = Constant <value_ints = [{e + 1}]> ()
    begin_{e} = Gather <axis = 0> (offsets, at_{e})
    end_{e} = Gather <axis = 0> (offsets, after_{e})
    has_{e}_1d = Greater (end_{e}, begin_{e})
    has_{e} = Squeeze (has_{e}_1d)
    part_{e} = If (has_{e}) <then_branch = some_{e} () => (float[r, c] product_{e}) {{
        rows_{e} = Slice (rows, begin_{e}, end_{e}, zero_1d)
        rows_f32_{e} = Cast <to = 1> (rows_{e})
        {to_float32}
        product_{e} = Gemm <transB = 1> (rows_f32_{e}, matrix_f32_{e})
    }}, else_branch = none_{e} () => (float[z, c] empty_{e}) {{
        empty_{e} = Identity (nothing)
    }}>
    """


EXPERT_MATMUL = OpContract(
    name="ExpertMatMul",
    summary="Multiplies the rows of each expert, sorted by expert, with that expert's own matrix.",
    inputs=(
        Param("rows", ("M", "A"), FLOAT_TYPES, "activations sorted by expert"),
        Param("offsets", ("E+1",), ("int64",), "where each expert's rows begin (Dispatch)"),
        Param("weight", ("B", "A"), FLOAT_TYPES, "the matrix of one expert", count="num_experts"),
    ),
    outputs=(
        Param(
            "out", ("M", "B"), FLOAT_TYPES, "products, dtype of rows; rows that belong to no expert are zero"
        ),
    ),
    attributes=(Attribute("num_experts", int, "E", structural=True, minimum=1),),
    reference=reference,
    body=body,
    tolerance=FLOAT_TOLERANCE,
)
