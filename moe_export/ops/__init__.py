"""The ops of the ``moe_export`` domain: contracts, float64 references and ONNX bodies."""

from __future__ import annotations

from ..errors import UsageError, choices_text
from .collectives import ALL_REDUCE, ALL_TO_ALL, CHECK_CAPACITY
from .combine import COMBINE
from .contract import DOMAIN, VERSION, Attribute, OpContract, Param, Tolerance
from .dispatch import DISPATCH
from .expert_matmul import EXPERT_MATMUL
from .expert_mlp import EXPERT_MLP
from .grouped_matmul import GROUPED_MATMUL
from .quantized_expert_mlp import QUANTIZED_EXPERT_MLP
from .rank_routing import EXPERT_SLOTS, RANK_COMBINE, RANK_DISPATCH, RANK_LOAD
from .router import ROUTER
from .scaled_expert_matmul import SCALED_EXPERT_MATMUL

OPS: dict[str, OpContract] = {
    op.name: op
    for op in (
        *(ROUTER, DISPATCH, GROUPED_MATMUL, EXPERT_MATMUL, SCALED_EXPERT_MATMUL, COMBINE),
        *(EXPERT_MLP, QUANTIZED_EXPERT_MLP),
        *(EXPERT_SLOTS, RANK_LOAD, RANK_DISPATCH, RANK_COMBINE, ALL_REDUCE, ALL_TO_ALL, CHECK_CAPACITY),
    )
}
"""Every op by name."""


def get_op(name: str) -> OpContract:
    """The contract of op ``name``.

    Raises:
        UsageError: no such op; the message lists the choices.
    """
    if name not in OPS:
        raise UsageError(f"unknown op {name!r}; {choices_text(name, OPS)}")
    return OPS[name]


__all__ = ["DOMAIN", "OPS", "VERSION", "Attribute", "OpContract", "Param", "Tolerance", "get_op"]
