"""The bodies of our ops as functions of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from ..ops import DOMAIN, OPS, VERSION

if TYPE_CHECKING:
    import onnx_ir as ir

PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": "1"}
"""On a node of ours beside its own attributes: TensorRT's parser then looks for a plugin of the node's name
before it inlines the body. They are no attributes of the op and reach no body."""


def attach_functions(model: ir.Model, opset: int) -> None:
    """Put the body of every op that the graph uses and that has one into the model's functions.

    Raises:
        ExportError: two nodes of one op differ in a structural attribute (one body cannot serve both).
    """
    import onnx_ir as ir

    needed: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    ours = False

    def need(name: str, attributes: dict[str, Any]) -> None:
        full = OPS[name].complete(attributes)
        variant = OPS[name].variant(full)
        if name in needed and needed[name][0] != variant:
            raise ExportError(f"two {name} nodes need different bodies: {needed[name][0]} and {variant}")
        needed.setdefault(name, (variant, full))

    for node in model.graph.all_nodes():
        if node.domain == DOMAIN:
            attributes = {k: a.value for k, a in node.attributes.items() if k not in PLUGIN_ATTRIBUTES}
            full = OPS[node.op_type].complete(attributes)
            for key, value in full.items():
                if key not in node.attributes:
                    node.attributes[key] = ir.convenience.convert_attribute(key, value)
            if OPS[node.op_type].body is None:
                ours = True
                continue
            need(node.op_type, full)
            if node.op_type == "ExpertMLP":
                need("Dispatch", {"num_experts": full["num_experts"]})
                need("GroupedMatMul", {"transposed": full["transposed"]})
                need("Combine", {})
            if node.op_type == "QuantizedExpertMLP":
                need("Dispatch", {"num_experts": full["num_experts"]})
                need("Combine", {})
    for identifier in [k for k in model.functions if k[0] == DOMAIN]:
        del model.functions[identifier]
    # The compounds last: their bodies call the others.
    for name in sorted(OPS, key=lambda name: name in ("ExpertMLP", "QuantizedExpertMLP")):
        if name in needed:
            function = ir.from_proto(OPS[name].function(needed[name][1], opset))
            model.functions[function.identifier()] = function
    if needed or ours:
        model.graph.opset_imports[DOMAIN] = VERSION
