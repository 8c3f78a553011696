"""Exchange between the ranks of an expert-parallel model: AllReduce, AllToAll, and CheckCapacity.

They have no ONNX body: one that ran without the other ranks would give numbers, and wrong ones. A
collective's reference takes the arrays of all ranks and returns the results of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .contract import FLOAT_TYPES, Attribute, OpContract, Param, Tolerance
from .rank_routing import RANKS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

REDUCTIONS = ("sum", "max")
_LAYER = Attribute("layer", str, "name of the MoE layer in the source model; errors name it", default="")


def reduce_reference(
    x: Sequence[NDArray[Any]], ranks: int, reduce: str = "sum", layer: str = ""
) -> list[NDArray[Any]]:
    """The sum or maximum over all ranks, for each rank. ``x``: one array per rank, all of one shape. Returns
    float64, int64 for integers.

    Raises:
        UsageError: not one array per rank, or of several shapes.
    """
    import numpy as np

    _check_ranks("AllReduce", x, ranks)
    kind = np.int64 if np.asarray(x[0]).dtype.kind in "iu" else np.float64
    stacked = np.stack([np.asarray(array, kind) for array in x])
    total = stacked.sum(axis=0) if reduce == "sum" else stacked.max(axis=0)
    return [total.copy() for _ in x]


def exchange_reference(x: Sequence[NDArray[Any]], ranks: int, layer: str = "") -> list[NDArray[Any]]:
    """Block s of rank r's result is block r of rank s's array. ``x``: one array [R*C, ...] per rank, all of
    one shape.

    Raises:
        UsageError: not one array per rank, of several shapes, or rows that R does not divide.
    """
    import numpy as np

    _check_ranks("AllToAll", x, ranks)
    if len(x[0]) % ranks:
        raise UsageError(f"AllToAll: {len(x[0])} rows do not make {ranks} equal blocks")
    blocks = [np.split(np.asarray(array), ranks) for array in x]
    return [np.concatenate([blocks[source][rank] for source in range(ranks)]) for rank in range(ranks)]


def capacity_reference(
    load: NDArray[np.int64], capacity: NDArray[np.int64], layer: str = ""
) -> NDArray[np.int64]:
    """``capacity`` [1] as it is.

    Raises:
        UsageError: ``load`` [1] is more.
    """
    import numpy as np

    if np.asarray(load).item() > np.asarray(capacity).item():
        raise UsageError(capacity_text(layer, np.asarray(load).item(), np.asarray(capacity).item()))
    return np.array(capacity, np.int64)


def capacity_text(layer: str, load: int, capacity: int) -> str:
    """What CheckCapacity says when it fails; all ranks say the same."""
    return (
        f"all ranks: layer '{layer}': {load} tokens for one rank, but a block has room for {capacity}; build "
        "with a larger ep_capacity_factor or with ep_overflow exact"
    )


def _check_ranks(op: str, arrays: Sequence[NDArray[Any]], ranks: int) -> None:
    if len(arrays) != ranks:
        raise UsageError(f"{op}: {len(arrays)} arrays for {ranks} ranks")
    if len({array.shape for array in arrays}) != 1:
        shapes = ", ".join(str(list(array.shape)) for array in arrays)
        raise UsageError(f"{op}: ranks with different shapes: {shapes}")


ALL_REDUCE = OpContract(
    name="AllReduce",
    summary="The sum or maximum of all ranks' tensors, on every rank and there bit for bit the same.",
    inputs=(Param("x", ("...",), ("float32", "int64"), "this rank's; every rank has the same shape"),),
    outputs=(Param("y", ("...",), ("float32", "int64"), "over all ranks, shape and dtype of x"),),
    attributes=(
        RANKS,
        Attribute("reduce", str, "how", default="sum", choices=REDUCTIONS),
        _LAYER,
    ),
    reference=reduce_reference,
    body=None,
    collective=True,
    tolerance={"float32": Tolerance(2e-6, 5e-7, "a float32 sum over some ranks, in any order")},
)

ALL_TO_ALL = OpContract(
    name="AllToAll",
    summary="Block r of each rank's rows goes to rank r; block r of the result came from rank r.",
    inputs=(
        Param(
            "x",
            ("R*C", "..."),
            (*FLOAT_TYPES, "int32"),
            "R blocks of C rows; every rank has the same shape",
        ),
    ),
    outputs=(Param("y", ("R*C", "..."), (*FLOAT_TYPES, "int32"), "shape and dtype of x"),),
    attributes=(RANKS, _LAYER),
    reference=exchange_reference,
    body=None,
    collective=True,
)

CHECK_CAPACITY = OpContract(
    name="CheckCapacity",
    summary="Passes the capacity on, and fails the run when the load is more.",
    inputs=(
        Param("load", ("1",), ("int64",), "rows that the fullest block of all ranks needs"),
        Param("capacity", ("1",), ("int64",), "rows of a block"),
    ),
    outputs=(Param("checked", ("1",), ("int64",), "capacity"),),
    attributes=(_LAYER,),
    reference=capacity_reference,
    body=None,
)
