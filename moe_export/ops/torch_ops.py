"""The ops as PyTorch custom ops, so that ``torch.export`` keeps each as one node, and their way into ONNX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .contract import DOMAIN, VERSION, Attribute, OpContract

if TYPE_CHECKING:
    import torch


def _define_ops() -> None:
    import torch

    def dispatch(
        expert_ids: torch.Tensor, num_experts: int, drops: bool, layer: str
    ) -> tuple[torch.Tensor, ...]:
        flat = expert_ids.reshape(-1).to(torch.int64)
        order = torch.argsort(flat, stable=True)
        bounds = torch.arange(num_experts + 1, device=flat.device)
        offsets = torch.searchsorted(flat[order].contiguous(), bounds, side="left")
        return order, offsets, torch.div(order, expert_ids.shape[1], rounding_mode="trunc")

    def dispatch_fake(
        expert_ids: torch.Tensor, num_experts: int, drops: bool, layer: str
    ) -> tuple[torch.Tensor, ...]:
        count = expert_ids.shape[0] * expert_ids.shape[1]
        return (
            expert_ids.new_empty((count,), dtype=torch.int64),
            expert_ids.new_empty((num_experts + 1,), dtype=torch.int64),
            expert_ids.new_empty((count,), dtype=torch.int64),
        )

    def grouped_matmul(
        rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, transposed: bool
    ) -> torch.Tensor:
        out = rows.new_zeros((rows.shape[0], weight.shape[2 if transposed else 1]))
        bounds = offsets.tolist()
        for e, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            if end > begin:
                matrix = weight[e] if transposed else weight[e].t()
                out[begin:end] = rows[begin:end] @ matrix
        return out

    def grouped_matmul_fake(
        rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, transposed: bool
    ) -> torch.Tensor:
        return rows.new_empty((rows.shape[0], weight.shape[2 if transposed else 1]))

    def combine(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        unsorted = torch.empty_like(rows)
        unsorted[order] = rows
        tokens, top_k = weights.shape
        grouped = unsorted.reshape(tokens, top_k, rows.shape[1]).float()
        return (grouped * weights.float().unsqueeze(-1)).sum(dim=1).to(rows.dtype)

    def combine_fake(rows: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return rows.new_empty((weights.shape[0], rows.shape[1]))

    define = torch.library.custom_op
    for name, schema, real, fake in (
        (
            "dispatch",
            "(Tensor expert_ids, int num_experts, bool drops, str layer) -> (Tensor, Tensor, Tensor)",
            dispatch,
            dispatch_fake,
        ),
        (
            "grouped_matmul",
            "(Tensor rows, Tensor weight, Tensor offsets, bool transposed) -> Tensor",
            grouped_matmul,
            grouped_matmul_fake,
        ),
        ("combine", "(Tensor rows, Tensor order, Tensor weights) -> Tensor", combine, combine_fake),
    ):
        op = define(f"{DOMAIN}::{name}", real, mutates_args=(), schema=schema)
        op.register_fake(fake)


@functools.cache
def torch_ops() -> Any:
    """``torch.ops.moe_export`` with ``dispatch``, ``grouped_matmul``, ``combine`` (defined once per process).

    They compute what the contracts say on CPU tensors; see :mod:`moe_export.ops` for shapes and dtypes.
    """
    import torch

    _define_ops()
    return getattr(torch.ops, DOMAIN)


def _schema_attribute(attribute: Attribute) -> Any:
    """Required where the contract has no default."""
    import onnx

    schema = onnx.defs.OpSchema
    if attribute.default is not None:
        value = onnx.helper.make_attribute(attribute.name, attribute.default)
        return schema.Attribute(attribute.name, value, attribute.doc)
    kinds = {int: schema.AttrType.INT, float: schema.AttrType.FLOAT, str: schema.AttrType.STRING}
    return schema.Attribute(attribute.name, kinds[attribute.kind], attribute.doc, required=True)


def _schema(op: OpContract) -> Any:
    import onnx.defs as defs

    optional = defs.OpSchema.FormalParameterOption.Optional
    single = defs.OpSchema.FormalParameterOption.Single
    variadic = defs.OpSchema.FormalParameterOption.Variadic
    tensor = {
        "float32": "tensor(float)",
        "float16": "tensor(float16)",
        "bfloat16": "tensor(bfloat16)",
        "int32": "tensor(int32)",
        "int64": "tensor(int64)",
        "int8": "tensor(int8)",
        "uint8": "tensor(uint8)",
        "float8e4m3fn": "tensor(float8e4m3fn)",
    }
    constraints: dict[str, tuple[str, ...]] = {}

    def parameters(items: tuple[Any, ...], prefix: str) -> list[Any]:
        out = []
        for p in items:
            name = "T_rows" if prefix == "O" and p.name == "out" else f"T_{p.name}"
            if p.name in ("rows", "hidden"):
                name = "T_rows"
            constraints.setdefault(name, tuple(tensor[d] for d in p.dtypes))
            out.append(
                defs.OpSchema.FormalParameter(
                    p.name,
                    name,
                    p.doc,
                    param_option=variadic if p.count else optional if p.optional else single,
                )
            )
        return out

    inputs, outputs = parameters(op.inputs, "I"), parameters(op.outputs, "O")
    return defs.OpSchema(
        op.name,
        DOMAIN,
        VERSION,
        op.summary,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[(name, list(types), "") for name, types in constraints.items()],
        attributes=[_schema_attribute(a) for a in op.attributes],
    )


@functools.cache
def register_onnx_schemas() -> None:
    """Make the ops known to ``onnx`` in this process (checker, onnxscript)."""
    import onnx.defs as defs

    from . import OPS

    for op in OPS.values():
        if not defs.has(op.name, VERSION, DOMAIN):
            defs.register_schema(_schema(op))


def translation_table() -> dict[Any, Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=...)``: each torch op becomes one node of ours."""
    import onnxscript

    register_onnx_schemas()
    ops = torch_ops()
    domain = onnxscript.values.Opset(DOMAIN, VERSION)

    def dispatch(expert_ids: Any, num_experts: int, drops: bool, layer: str) -> Any:
        return domain.Dispatch(expert_ids, num_experts=num_experts, drops=int(drops), layer=layer)

    def grouped_matmul(rows: Any, weight: Any, offsets: Any, transposed: bool) -> Any:
        return domain.GroupedMatMul(rows, weight, offsets, transposed=int(transposed))

    def combine(rows: Any, order: Any, weights: Any) -> Any:
        return domain.Combine(rows, order, weights)

    return {
        ops.dispatch.default: dispatch,
        ops.grouped_matmul.default: grouped_matmul,
        ops.combine.default: combine,
    }
