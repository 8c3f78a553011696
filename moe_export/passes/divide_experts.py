"""Expert parallel: the graph of one rank. It routes as before, computes its own experts, and exchanges."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..errors import ExportError, UsageError
from ..graph.functions import attach_functions
from ..graph.moe_values import ExpertNodes, expert_nodes
from ..graph.subgraph import ancestors
from ..ops import DOMAIN
from ..schema import Decision, ExpertParallel, MoELayer
from ..sms import GPU_TARGETS
from .base import Pass, PassContext
from .expert_region import find_region, forget_rows
from .expert_slices import ExpertSlices

if TYPE_CHECKING:
    import onnx_ir as ir

_STEPS = 1000
"""A capacity factor is a whole number of these parts."""


class DivideExperts(Pass):
    """``option expert_parallel``: an :class:`ExpertParallel`, and ``rank``: whose graph this is. Without it
    the pass does nothing.

    Routing values of a layer keep their meaning: the ids are the source's experts. What follows works with
    slots of ranks, and a choice that lies elsewhere is dropped here (-1).
    """

    name = "divide-experts"

    def _run(self, context: PassContext) -> None:
        plan = context.options.get("expert_parallel")
        if plan is None:
            return
        if not context.layers:
            raise UsageError("ep: the model has no MoE layer, so there are no experts to divide over ranks")
        slices = ExpertSlices(context.model.graph)
        for layer in context.layers:
            _Divider(context, plan, layer, slices).run()
        slices.remove_unused()
        attach_functions(context.model, context.opset)
        context.decisions.append(_decision(plan, context))


class _Divider:
    """One layer of one rank."""

    def __init__(
        self, context: PassContext, plan: ExpertParallel, layer: MoELayer, slices: ExpertSlices
    ) -> None:
        self._graph = context.model.graph
        self._plan, self._layer, self._slices = plan, layer, slices
        self._placed = next(p.experts for p in plan.layers if p.index == layer.index)
        self._rank = int(context.options["rank"])
        self._on_gpu = context.options.get("target") in GPU_TARGETS
        self._made: list[ir.Node] = []
        self._nodes: ExpertNodes = expert_nodes(_dispatch(self._graph, layer))

    def run(self) -> None:
        nodes, own = self._nodes, self._placed[self._rank]
        region, foreign = find_region(nodes)
        self._take_own(region, own)
        slots = self._op("ExpertSlots", [nodes.expert_ids, self._table()])
        slots.type, slots.shape = nodes.expert_ids.type, nodes.expert_ids.shape
        if self._plan.mode == "allreduce":
            hidden, ids, weights = nodes.hidden, slots, self._masked(slots)
        else:
            if foreign:
                raise ExportError(
                    f"MoE layer {self._layer.name!r}: its experts read {foreign[0]!r} beside their tokens, "
                    "which cannot be sent to other ranks; build with ep_mode allreduce"
                )
            hidden, ids, weights, places = self._sent(slots)
        here = {id(nodes.expert_ids): ids, id(nodes.hidden): hidden, id(nodes.weights): weights}
        for node in region:
            for index, value in enumerate(node.inputs):
                if value is not None and id(value) in here:
                    node.replace_input_with(index, here[id(value)])
            for output in node.outputs:
                forget_rows(output)
        nodes.combine.replace_input_with(2, weights)
        _set(nodes.dispatch, num_experts=len(own), drops=1)
        self._graph.insert_before(self._first_of(region), self._made)
        self._made = []
        old = nodes.output
        kind, shape, name = old.type, old.shape, old.name
        readers = [(n, i) for n, i in old.uses()]
        if self._plan.mode == "allreduce":
            total = self._summed(old)
        else:
            returned = self._op("AllToAll", [old], ranks=self._plan.ranks)
            total = self._op("RankCombine", [returned, places])
            forget_rows(old)
        total.type, total.shape = kind, shape
        for node, index in readers:
            node.replace_input_with(index, total)
        for index, output in enumerate(self._graph.outputs):
            if output is old:
                self._graph.outputs[index] = total
        old.name, total.name = f"moe.{self._layer.index}.partial", name
        self._graph.insert_after(nodes.combine, self._made)

    def _take_own(self, region: list[ir.Node], own: tuple[int, ...]) -> None:
        """Weights, and what is looked up by expert, of this rank's experts only."""
        experts = self._layer.num_experts
        for node in region:
            product = node.domain == DOMAIN and node.op_type == "GroupedMatMul"
            if not product and not (node.op_type == "Gather" and self._by_expert(node)):
                continue
            index = 1 if product else 0
            stack = node.inputs[index]
            if stack is None or stack.const_value is None or stack.const_value.shape[0] != experts:
                raise ExportError(
                    f"MoE layer {self._layer.name!r}: the experts' values that {node.op_type} reads are "
                    "computed in the graph, so they cannot be divided over ranks"
                )
            node.replace_input_with(index, self._slices.take(stack, own))

    def _by_expert(self, node: ir.Node) -> bool:
        """Whether a Gather looks something up by expert: its indices come from the ids."""
        if "axis" in node.attributes and node.attributes["axis"].as_int() != 0:
            return False
        data = node.inputs[0]
        if data is None or data.const_value is None or not len(data.const_value.shape):
            return False
        index = node.inputs[1]
        return index is not None and bool(ancestors([index], [self._nodes.expert_ids])[1])

    def _table(self) -> ir.Value:
        """[E, L] int32: the slot of each expert for tokens t = 0, 1, ... mod L; -1: not on this rank."""
        import numpy as np

        width = max(len(experts) for experts in self._placed)
        replicas: list[list[int]] = [[] for _ in range(self._layer.num_experts)]
        for rank, experts in enumerate(self._placed):
            for slot, expert in enumerate(experts):
                replicas[expert].append(rank * width + slot)
        choices = math.lcm(*(len(found) for found in replicas))
        table = np.array([[found[n % len(found)] for n in range(choices)] for found in replicas], np.int32)
        if self._plan.mode == "allreduce":
            table = np.where(table // width == self._rank, table % width, -1).astype(np.int32)
        return self._constant(table, "slots")

    def _masked(self, slots: ir.Value) -> ir.Value:
        """The weights, 0 where the choice lies elsewhere: nothing that is added per row counts there."""
        import numpy as np

        weights = self._nodes.weights
        zero = self._constant(np.zeros((), np.int32), "zero_slot")
        none = self._constant(np.zeros((), weights.dtype.numpy() if weights.dtype else np.float32), "none")
        here = self._op("GreaterOrEqual", [slots, zero], domain="")
        masked = self._op("Where", [here, weights, none], domain="")
        masked.type, masked.shape = weights.type, weights.shape
        return masked

    def _sent(self, slots: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
        """Tokens, slots and weights that the other ranks sent here; and where this rank's tokens went."""
        import onnx_ir as ir

        plan, nodes = self._plan, self._nodes
        sizes = {"ranks": plan.ranks, "slots_per_rank": max(len(experts) for experts in self._placed)}
        capacity = self._capacity(slots, sizes)
        made = ir.node(
            "RankDispatch",
            [nodes.hidden, slots, nodes.weights, capacity],
            attributes={**sizes, "layer": self._layer.name},
            num_outputs=3,
            domain=DOMAIN,
        )
        self._made.append(made)
        rows, route, places = made.outputs
        rows.type, route.type, places.type = (
            nodes.hidden.type,
            ir.TensorType(ir.DataType.FLOAT),
            ir.TensorType(ir.DataType.INT64),
        )
        hidden = self._op("AllToAll", [rows], ranks=plan.ranks)
        received = self._op("AllToAll", [route], ranks=plan.ranks)
        hidden.type, received.type = rows.type, route.type
        hidden.shape = ir.Shape([None, nodes.hidden.shape[1] if nodes.hidden.shape else None])
        split = ir.node("Split", [received], attributes={"axis": 1, "num_outputs": 2}, num_outputs=2)
        self._made.append(split)
        for half in split.outputs:
            half.type = route.type
            half.shape = ir.Shape([None, self._layer.top_k])
        ids = self._op("Cast", [split.outputs[0]], domain="", to=int(ir.DataType.INT32))
        ids.type, ids.shape = ir.TensorType(ir.DataType.INT32), split.outputs[0].shape
        return hidden, ids, split.outputs[1], places

    def _capacity(self, slots: ir.Value, sizes: dict[str, int]) -> ir.Value:
        """[1] int64: rows per block, the same on all ranks."""
        import numpy as np

        plan = self._plan
        if self._on_gpu:
            # Shapes of a plan cannot depend on values: as many rows as there are tokens always suffice.
            return self._op("Shape", [slots], domain="", start=0, end=1)
        load = self._op("RankLoad", [slots], DOMAIN, **sizes)
        load = self._op("AllReduce", [load], ranks=plan.ranks, reduce="max")
        if plan.overflow == "exact":
            return load
        assert plan.capacity_factor is not None
        tokens = self._op("Shape", [slots], domain="", start=0, end=1)
        share = round(plan.capacity_factor * self._layer.top_k * _STEPS)
        parts = self._constant(np.array([share], np.int64), "share")
        whole = self._constant(np.array([plan.ranks * _STEPS], np.int64), "whole")
        rest = self._constant(np.array([plan.ranks * _STEPS - 1], np.int64), "rest")
        one = self._constant(np.array([1], np.int64), "one")
        product = self._op("Mul", [tokens, parts], domain="")
        raised = self._op("Add", [product, rest], domain="")
        rows = self._op("Div", [raised, whole], domain="")
        most = self._op("Max", [tokens, one], domain="")
        fitting = self._op("Min", [self._op("Max", [rows, one], domain=""), most], domain="")
        return self._op("CheckCapacity", [load, fitting])

    def _summed(self, partial: ir.Value) -> ir.Value:
        """The sum over all ranks, in float32."""
        import onnx_ir as ir

        kind = partial.dtype
        if kind in (None, ir.DataType.FLOAT):
            return self._op("AllReduce", [partial], ranks=self._plan.ranks, reduce="sum")
        wide = self._op("Cast", [partial], domain="", to=int(ir.DataType.FLOAT))
        wide.type = ir.TensorType(ir.DataType.FLOAT)
        total = self._op("AllReduce", [wide], ranks=self._plan.ranks, reduce="sum")
        total.type = wide.type
        return self._op("Cast", [total], domain="", to=int(kind))

    def _op(self, name: str, inputs: list[ir.Value], domain: str = DOMAIN, **attributes: Any) -> ir.Value:
        """A node's only output. Our ops say which layer they belong to."""
        import onnx_ir as ir

        if domain == DOMAIN and name not in ("ExpertSlots", "RankCombine"):
            attributes["layer"] = self._layer.name
        node = ir.node(name, inputs, attributes=attributes, domain=domain)
        self._made.append(node)
        return node.outputs[0]

    def _constant(self, array: Any, what: str) -> ir.Value:
        import onnx_ir as ir

        name = f"ranks.{self._layer.index}.{what}"
        held = self._graph.initializers.get(name)
        if held is not None:
            return held
        tensor = ir.tensor(array, name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        value = ir.Value(name=name, const_value=tensor, type=kind, shape=shape)
        self._graph.register_initializer(value)
        return value

    def _first_of(self, region: list[ir.Node]) -> ir.Node:
        wanted = set(map(id, region))
        return next(node for node in self._graph if id(node) in wanted)


def _dispatch(graph: ir.Graph, layer: MoELayer) -> ir.Node:
    for node in graph:
        ours = node.domain == DOMAIN and node.op_type == "Dispatch"
        if ours and node.attributes["layer"].as_string() == layer.name:
            return node
    raise ExportError(f"MoE layer {layer.name!r}: its Dispatch is gone")


def _set(node: ir.Node, **values: int) -> None:
    import onnx_ir as ir

    for name, value in values.items():
        node.attributes[name] = ir.AttrInt64(name, value)


def _decision(plan: ExpertParallel, context: PassContext) -> Decision:
    how = "one sum over the ranks per MoE layer; every rank gets all sequences"
    if plan.mode == "alltoall":
        rows = "as large as the fullest one needs"
        if context.options.get("target") in GPU_TARGETS:
            rows = "with a row for every token of a rank, since a plan's shapes cannot depend on routing"
        elif plan.overflow == "error":
            rows = f"of {plan.capacity_factor:g} times their share at even load; a fuller one ends the run"
        how = f"sequences are divided over the ranks; tokens go to their experts and back, in blocks {rows}"
    return Decision("expert parallel", f"{plan.ranks} ranks, {plan.mode}", how)
