"""The graphs of all ranks as one graph: what they exchange, one process computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BundleError
from ..ops import DOMAIN
from ..schema import ExpertParallel, ModelIO, MoELayer

if TYPE_CHECKING:
    import onnx

_SHARED_ROLES = ("capacity", "load")
"""Inputs that every rank gets as they are, and outputs whose largest counts."""


def merge_ranks(
    models: Sequence[onnx.ModelProto], plan: ExpertParallel, io: ModelIO, layers: Iterable[MoELayer]
) -> onnx.ModelProto:
    """One model with the inputs, outputs and MoE values of one engine, made from the ranks' models.

    External data of rank r is looked for in the folder ``plan.folder(r)``. Routing values of a layer are put
    together from the ranks and given back to them, so that forced routing reaches every rank.

    Raises:
        BundleError: the ranks do not exchange in the same order.
    """
    return _Merger(models, plan, io, tuple(layers)).merged()


class _Merger:
    def __init__(
        self,
        models: Sequence[onnx.ModelProto],
        plan: ExpertParallel,
        io: ModelIO,
        layers: tuple[MoELayer, ...],
    ) -> None:
        import onnx

        self._models, self._plan, self._io, self._layers = models, plan, io, layers
        self._dealt = plan.mode == "alltoall"
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._ints: dict[tuple[int, ...] | int, str] = {}
        self._onnx = onnx

    def merged(self) -> onnx.ModelProto:
        first = self._models[0]
        merged = self._onnx.ModelProto()
        merged.CopyFrom(first)
        del merged.graph.node[:], merged.graph.initializer[:], merged.graph.value_info[:]
        self._deal_inputs()
        exchanges = [self._take(rank, model) for rank, model in enumerate(self._models)]
        self._exchange(exchanges)
        for layer in self._layers:
            for name in (layer.hidden, layer.logits, layer.output):
                if name is not None:
                    self._assemble(name)
            for name in (layer.expert_ids, layer.weights):
                self._assemble(name)
                self._deal_routing(name)
        named = {name for layer in self._layers for name in _values(layer)}
        for spec in self._io.outputs:
            if spec.name not in named:
                self._assemble(spec.name, largest=spec.role in _SHARED_ROLES)
        merged.graph.node.extend(self._nodes)
        merged.graph.initializer.extend(self._weights)
        merged.graph.value_info.extend(v for v in first.graph.value_info if v.name in named)
        return _sorted(merged)

    def _take(self, rank: int, model: onnx.ModelProto) -> list[Any]:
        """Add a rank's nodes and weights under names of their own; returns its exchanges, in order."""
        routing = {name for layer in self._layers for name in (layer.expert_ids, layer.weights)}
        shared = {s.name for s in self._io.inputs if not self._dealt or s.role in _SHARED_ROLES}
        produced = {name for node in model.graph.node for name in node.output}

        def read(name: str) -> str:
            if name in shared and name not in produced:
                return name
            return f"rank{rank}.{name}.dealt" if name in routing else f"rank{rank}.{name}"

        exchanges = []
        for node in model.graph.node:
            copied = self._onnx.NodeProto()
            copied.CopyFrom(node)
            _rename(copied, read, lambda name: f"rank{rank}.{name}")
            if _exchanges(copied):
                exchanges.append(copied)
            else:
                self._nodes.append(copied)
        for tensor in model.graph.initializer:
            copied_tensor = self._onnx.TensorProto()
            copied_tensor.CopyFrom(tensor)
            copied_tensor.name = f"rank{rank}.{tensor.name}"
            for entry in copied_tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{self._plan.folder(rank)}/{entry.value}"
            self._weights.append(copied_tensor)
        return exchanges

    def _exchange(self, ranks: list[list[Any]]) -> None:
        """Each exchange of all ranks, which are at the same place of their graphs."""
        orders = [[_kind(node) for node in exchanges] for exchanges in ranks]
        if any(order != orders[0] for order in orders):
            raise BundleError("the ranks' graphs do not exchange in the same order; build the bundle again")
        for number, together in enumerate(zip(*ranks, strict=True)):
            kind = _kind(together[0])[0]
            inputs = [node.input[0] for node in together]
            if kind == "all_to_all":
                count = len(together)
                for source, name in enumerate(inputs):
                    pieces = [f"exchange{number}.{source}.{rank}" for rank in range(count)]
                    self._add("Split", [name], pieces, axis=0, num_outputs=count)
                for rank, node in enumerate(together):
                    parts = [f"exchange{number}.{source}.{rank}" for source in range(count)]
                    self._add("Concat", parts, [node.output[0]], axis=0)
                continue
            self._add(kind, inputs, [f"exchange{number}"])
            for node in together:
                self._add("Identity", [f"exchange{number}"], [node.output[0]])

    def _deal_inputs(self) -> None:
        """Rank r's rows of every input; a rank with none of its own repeats the last one."""
        if not self._dealt:
            return
        dealt = [spec.name for spec in self._io.inputs if spec.role not in _SHARED_ROLES]
        ranks = self._plan.ranks
        self._add("Shape", [dealt[0]], ["deal.batch"], start=0, end=1)
        self._add("Add", ["deal.batch", self._int((ranks - 1,))], ["deal.more"])
        self._add("Div", ["deal.more", self._int((ranks,))], ["deal.own"])
        self._add("Squeeze", ["deal.own"], ["deal.own_0d"])
        self._add("Sub", ["deal.batch", self._int((1,))], ["deal.last"])
        for rank in range(ranks):
            self._add("Mul", ["deal.own_0d", self._int(rank)], [f"deal.begin{rank}"])
            self._add("Add", [f"deal.begin{rank}", "deal.own_0d"], [f"deal.end{rank}"])
            self._add("Range", [f"deal.begin{rank}", f"deal.end{rank}", self._int(1)], [f"deal.range{rank}"])
            self._add("Min", [f"deal.range{rank}", "deal.last"], [f"deal.rows{rank}"])
            for name in dealt:
                self._add("Gather", [name, f"deal.rows{rank}"], [f"rank{rank}.{name}"], axis=0)

    def _assemble(self, name: str, largest: bool = False) -> None:
        """``name`` of the one model from the ranks' values of that name."""
        held = [f"rank{rank}.{name}" for rank in range(self._plan.ranks)]
        if largest:
            self._add("Max", held, [name])
        elif not self._dealt:
            self._add("Identity", held[:1], [name])
        else:
            self._add("Concat", held, [f"all.{name}"], axis=0)
            self._add("Shape", [f"all.{name}"], [f"all.{name}.rows"], start=0, end=1)
            self._add("Mul", ["deal.own", self._int((self._plan.ranks,))], [f"all.{name}.sequences"])
            self._add("Div", [f"all.{name}.rows", f"all.{name}.sequences"], [f"all.{name}.each"])
            self._add("Mul", [f"all.{name}.each", "deal.batch"], [f"all.{name}.kept"])
            self._add("Slice", [f"all.{name}", self._int((0,)), f"all.{name}.kept"], [name])

    def _deal_routing(self, name: str) -> None:
        """Each rank's part of a layer's ids or weights [T, K], which are sequence by sequence."""
        for rank in range(self._plan.ranks):
            target = f"rank{rank}.{name}.dealt"
            if not self._dealt:
                self._add("Identity", [name], [target])
                continue
            if rank == 0:
                self._add("Shape", [name], [f"all.{name}.width"], start=1, end=2)
                parts = ["deal.batch", self._int((-1,)), f"all.{name}.width"]
                self._add("Concat", parts, [f"all.{name}.shape"], axis=0)
                self._add("Reshape", [name, f"all.{name}.shape"], [f"all.{name}.by_sequence"])
                self._add("Concat", [self._int((-1,)), f"all.{name}.width"], [f"all.{name}.flat"], axis=0)
            self._add("Gather", [f"all.{name}.by_sequence", f"deal.rows{rank}"], [f"{target}.rows"], axis=0)
            self._add("Reshape", [f"{target}.rows", f"all.{name}.flat"], [target])

    def _add(self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        self._nodes.append(self._onnx.helper.make_node(op_type, list(inputs), list(outputs), **attributes))

    def _int(self, value: tuple[int, ...] | int) -> str:
        """Name of an int64 constant."""
        import numpy as np

        if value not in self._ints:
            self._ints[value] = f"deal.constant{len(self._ints)}"
            array = np.array(value, np.int64)
            self._weights.append(self._onnx.numpy_helper.from_array(array, self._ints[value]))
        return self._ints[value]


def _values(layer: MoELayer) -> tuple[str, ...]:
    names = (layer.hidden, layer.logits, layer.expert_ids, layer.weights, layer.output)
    return tuple(name for name in names if name is not None)


def _exchanges(node: Any) -> bool:
    return node.op_type in ("AllReduce", "AllToAll") and node.domain == DOMAIN or (
        node.op_type == "DistCollective"
    )


def _kind(node: Any) -> tuple[str, str]:
    """``Sum``, ``Max`` or ``all_to_all``, and the layer."""
    values = {a.name: a.s.decode() if a.s else "" for a in node.attribute}
    if node.op_type == "AllToAll" or values.get("collective_operation") == "all_to_all":
        return "all_to_all", values.get("layer", "")
    reduce = values.get("reduce") or values.get("reduce_op")
    return {"sum": "Sum", "max": "Max"}[str(reduce)], values.get("layer", "")


def _rename(node: Any, read: Any, written: Any) -> None:
    """Rename what a node reads and writes, in its subgraphs too."""
    inner = {name for a in node.attribute for g in _graphs(a) for name in _inner_names(g)}

    def reads(name: str) -> str:
        return written(name) if name in inner else read(name)

    _rename_one(node, read, written)
    for attribute in node.attribute:
        for graph in _graphs(attribute):
            _rename_graph(graph, reads, written)


def _rename_one(node: Any, read: Any, written: Any) -> None:
    node.name = written(node.name) if node.name else ""
    node.input[:] = [read(name) if name else "" for name in node.input]
    node.output[:] = [written(name) if name else "" for name in node.output]


def _rename_graph(graph: Any, read: Any, written: Any) -> None:
    for node in graph.node:
        _rename_one(node, read, written)
        for attribute in node.attribute:
            for inner in _graphs(attribute):
                _rename_graph(inner, read, written)
    for value in (*graph.input, *graph.initializer):
        value.name = written(value.name)
    for value in graph.output:
        value.name = read(value.name)
    del graph.value_info[:]


def _inner_names(graph: Any) -> Iterable[str]:
    for value in (*graph.input, *graph.initializer):
        yield value.name
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            for inner in _graphs(attribute):
                yield from _inner_names(inner)


def _graphs(attribute: Any) -> list[Any]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    """With every node behind those that it reads."""
    import graphlib

    nodes = list(model.graph.node)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    order = graphlib.TopologicalSorter(
        {index: {makers[n] for n in _all_reads(node) if n in makers} for index, node in enumerate(nodes)}
    ).static_order()
    arranged = [nodes[index] for index in order]
    del model.graph.node[:]
    model.graph.node.extend(arranged)
    return model


def _all_reads(node: Any) -> Iterable[str]:
    yield from node.input
    for attribute in node.attribute:
        for graph in _graphs(attribute):
            for inner in graph.node:
                yield from _all_reads(inner)
            yield from (value.name for value in graph.output)
