"""A graph of a model's first layers becomes the graph of all: one layer of each kind is copied.

Works on the graph as torch.onnx gives it, where each node says which module it came from. Nothing is taken on
trust: a layer is copied only if two traced layers of its kind are the same expression of the hidden state,
their own weights and caches, and values that all layers share.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..schema import ModelIO, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"
_CACHE = re.compile(r"^(past|present)\.(\d+)\.")


class CannotCopy(Exception):
    """Why the layers must be traced one by one."""


@dataclass(frozen=True)
class _Region:
    """The nodes of one traced layer, and the two values that join it to its neighbours."""

    index: int
    nodes: tuple[ir.Node, ...]
    hidden: ir.Value
    out: ir.Value


def copy_layers(
    model: ir.Model, io: ModelIO, path: str, kinds: Sequence[str], traced: int, buffers: dict[str, Any]
) -> ModelIO:
    """Add the layers from number ``traced`` on, each a copy of the last traced one of its kind.

    Args:
        model: graph of the first ``traced`` layers, not optimised; changed in place.
        io: its inputs and outputs; those of the graph still have torch.onnx's order and number.
        path: name of the list of layers in the traced module, as in the names of initializers.
        kinds: kind of each layer of the whole model.
        buffers: tensors of the whole model that no checkpoint holds, by name in the graph.

    Returns: inputs and outputs of the whole model.

    Raises:
        CannotCopy: a layer reads something else; the graph may be changed.
    """
    owner = _owners(model, path)
    inputs = {spec.name: value for spec, value in zip(io.inputs, model.graph.inputs, strict=True)}
    outputs = {spec.name: value for spec, value in zip(io.outputs, model.graph.outputs, strict=True)}
    caches = {id(value): name for name, value in inputs.items() if _CACHE.match(name)}
    shared = _shared(model, owner, path, caches)
    regions = {
        index: _region(model, index, owner, shared, path, caches, outputs) for index in range(1, traced)
    }
    templates: dict[str, _Region] = {}
    for kind in sorted(set(kinds[traced:])):
        same = [regions[i] for i in range(1, traced) if kinds[i] == kind]
        _check_same(same[-2], same[-1], path, caches, outputs)
        templates[kind] = same[-1]
    added_in: list[TensorSpec] = []
    added_out: list[TensorSpec] = []
    last = regions[traced - 1]
    tail = [(n, i) for n, i in last.out.uses() if owner.get(id(n)) != last.index]
    tail_output = next((i for i, v in enumerate(model.graph.outputs) if v is last.out), None)
    hidden, after = last.out, last.nodes[-1]
    for index in range(traced, len(kinds)):
        region = templates[kinds[index]]
        layer = _Copy(model, region, index, path, hidden, inputs, buffers)
        after = layer.insert(after)
        hidden = layer.values[id(region.out)]
        for spec in io.inputs:
            if (found := _CACHE.match(spec.name)) and int(found[2]) == region.index:
                added_in.append(_renumbered(spec, index))
                model.graph.inputs.append(layer.inputs[spec.name])
        for spec in io.outputs:
            if (found := _CACHE.match(spec.name)) and int(found[2]) == region.index:
                added_out.append(_renumbered(spec, index))
                model.graph.outputs.append(layer.values[id(outputs[spec.name])])
    for node, position in tail:
        node.replace_input_with(position, hidden)
    if tail_output is not None:
        model.graph.outputs[tail_output] = hidden
    return ModelIO((*io.inputs, *added_in), (*io.outputs, *added_out))


def _owners(model: ir.Model, path: str) -> dict[int, int]:
    """Node → number of the layer it was traced in; nodes of no layer are left out."""
    prefix = f"{path}."
    owner: dict[int, int] = {}
    for node in model.graph:
        text = node.metadata_props.get(_SCOPES)
        if text is None:
            raise CannotCopy(f"node {node.name!r} does not say which module it came from")
        for scope in ast.literal_eval(text):
            if scope.startswith(prefix) and scope[len(prefix) :].partition(".")[0].isdigit():
                owner[id(node)] = int(scope[len(prefix) :].partition(".")[0])
                break
    return owner


def _layer_of(value: ir.Value, path: str, caches: dict[int, str]) -> int | None:
    """Number of the layer whose weight or cache ``value`` is."""
    if id(value) in caches:
        found = _CACHE.match(caches[id(value)])
        return int(found[2]) if found else None
    name = value.name or ""
    if value.is_initializer() and name.startswith(f"{path}."):
        number = name[len(path) + 1 :].partition(".")[0]
        return int(number) if number.isdigit() else None
    return None


def _shared(model: ir.Model, owner: dict[int, int], path: str, caches: dict[int, str]) -> set[int]:
    """Nodes inside layers whose results do not depend on the layer: constants, and sizes of inputs."""
    free: set[int] = set()
    for node in model.graph:
        if id(node) not in owner:
            continue
        if node.op_type == "Shape" and node.domain == "":
            source = node.inputs[0]
            if source is not None and (source.is_graph_input() or source.is_initializer()):
                free.add(id(node))
                continue
        reads = [v for v in node.inputs if v is not None]
        if all(
            _layer_of(v, path, caches) is None
            and not v.is_graph_input()
            and (v.producer() is None or id(v.producer()) in free or id(v.producer()) not in owner)
            for v in reads
        ) and not _reads_tokens(reads, owner, free):
            free.add(id(node))
    return free


def _reads_tokens(values: Sequence[ir.Value], owner: dict[int, int], free: set[int]) -> bool:
    """Whether one of ``values`` comes from outside the layers and is no number known from sizes alone."""
    seen: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        node = value.producer()
        if node is None:
            if value.is_graph_input() or (value.is_initializer() and (value.const_value is None)):
                return True
            continue
        if id(node) in seen or id(node) in free:
            continue
        seen.add(id(node))
        if node.op_type == "Shape" and node.domain == "":
            continue
        stack += [v for v in node.inputs if v is not None]
    return False


def _region(
    model: ir.Model,
    index: int,
    owner: dict[int, int],
    shared: set[int],
    path: str,
    caches: dict[int, str],
    outputs: dict[str, ir.Value],
) -> _Region:
    nodes = tuple(n for n in model.graph if owner.get(id(n)) == index and id(n) not in shared)
    held = {id(n) for n in nodes}
    entering: dict[int, ir.Value] = {}
    for node in nodes:
        for value in node.inputs:
            if value is None:
                continue
            layer = _layer_of(value, path, caches)
            if layer is not None and layer != index:
                raise CannotCopy(f"layer {index} reads {value.name!r} of layer {layer}")
            producer = value.producer()
            if producer is None or id(producer) in held or id(producer) in shared:
                continue
            came_from = owner.get(id(producer))
            if came_from is not None:
                if came_from != index - 1:
                    raise CannotCopy(f"layer {index} reads a result of layer {came_from}")
                entering[id(value)] = value
    kept = {id(v) for name, v in outputs.items() if _CACHE.match(name)}
    leaving = {
        id(v): v
        for n in nodes
        for v in n.outputs
        if any(id(user) not in held for user, _ in v.uses()) or (v.is_graph_output() and id(v) not in kept)
    }
    if len(entering) != 1 or len(leaving) != 1:
        raise CannotCopy(f"layer {index} takes {len(entering)} values of the layer before it, not one")
    return _Region(index, nodes, next(iter(entering.values())), next(iter(leaving.values())))


def _check_same(
    one: _Region, other: _Region, path: str, caches: dict[int, str], outputs: dict[str, ir.Value]
) -> None:
    """Two traced layers are one expression, node by node from their results back."""
    pairs: list[tuple[ir.Value | None, ir.Value | None]] = [(one.out, other.out)]
    for name, value in outputs.items():
        found = _CACHE.match(name)
        if found and int(found[2]) == one.index:
            twin = outputs.get(_number(name, other.index))
            if twin is None:
                raise CannotCopy(f"layer {other.index} has no {_number(name, other.index)}")
            pairs.append((value, twin))
    seen: set[tuple[int, int]] = set()
    while pairs:
        a, b = pairs.pop()
        if a is None or b is None or a is b or (id(a), id(b)) in seen:
            continue
        seen.add((id(a), id(b)))
        if (a is one.hidden) != (b is other.hidden):
            raise CannotCopy(f"layers {one.index} and {other.index} use the hidden state differently")
        if a is one.hidden:
            continue
        first, second = a.producer(), b.producer()
        if first is None or second is None:
            if not _same_leaf(a, b, one.index, other.index, path, caches):
                raise CannotCopy(
                    f"layers {one.index} and {other.index} differ: {a.name!r} and {b.name!r} are not the same"
                )
            continue
        if not _same_call(first, second, one.index, other.index, path) or a.index() != b.index():
            raise CannotCopy(f"layers {one.index} and {other.index} differ at a {first.op_type}")
        pairs += [(x, y) for x, y in zip(first.inputs, second.inputs, strict=True) if x is not y]


def _same_leaf(a: ir.Value, b: ir.Value, first: int, second: int, path: str, caches: dict[int, str]) -> bool:
    import numpy as np

    if a is b:
        return True
    if id(a) in caches and id(b) in caches:
        return _number(caches[id(a)], second) == caches[id(b)]
    if _layer_of(a, path, caches) == first and _layer_of(b, path, caches) == second:
        return _weight_name(a.name, path, second) == b.name
    if a.const_value is not None and b.const_value is not None and a.const_value.size <= 4096:
        return bool(np.array_equal(a.const_value.numpy(), b.const_value.numpy()))
    return False


def _same_call(a: ir.Node, b: ir.Node, first: int, second: int, path: str) -> bool:
    """The same operator, with the same attributes, on inputs of the same number."""
    import numpy as np
    import onnx_ir as ir

    if (a.domain, a.op_type, a.overload) != (b.domain, b.op_type, b.overload):
        return False
    if [v is None for v in a.inputs] != [v is None for v in b.inputs]:
        return False
    if set(a.attributes) != set(b.attributes):
        return False
    for name, attribute in a.attributes.items():
        x, y = attribute.value, b.attributes[name].value
        if attribute.type == ir.AttributeType.TENSOR:
            if x.dtype != y.dtype or not np.array_equal(x.numpy(), y.numpy()):
                return False
        elif attribute.type == ir.AttributeType.STRING:
            if _text(x, path, first, second) != y:
                return False
        elif attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or x != y:
            return False
    return True


class _Copy:
    """One layer made from another's nodes."""

    def __init__(
        self,
        model: ir.Model,
        region: _Region,
        index: int,
        path: str,
        hidden: ir.Value,
        inputs: dict[str, ir.Value],
        buffers: dict[str, Any],
    ) -> None:
        self._model, self._region, self._index, self._path = model, region, index, path
        self._buffers = buffers
        self._names = {id(value): name for name, value in inputs.items()}
        self.values: dict[int, ir.Value] = {id(region.hidden): hidden}
        """Value of the template → value of the copy."""
        self.inputs: dict[str, ir.Value] = {}
        """The template's cache inputs by name → the copy's."""

    def insert(self, after: ir.Node) -> ir.Node:
        """Put the copy behind ``after``; returns its last node."""
        import onnx_ir as ir

        for node in self._region.nodes:
            made = ir.Node(
                node.domain,
                node.op_type,
                [None if v is None else self._value(v) for v in node.inputs],
                [self._attribute(a) for a in node.attributes.values()],
                overload=node.overload,
                num_outputs=len(node.outputs),
                version=node.version,
                name=f"{node.name}.layer{self._index}",
            )
            made.metadata_props.update(node.metadata_props)
            for old, new in zip(node.outputs, made.outputs, strict=True):
                new.name = f"{old.name}.layer{self._index}"
                new.type, new.shape = copy.copy(old.type), copy.copy(old.shape)
                self.values[id(old)] = new
            self._model.graph.insert_after(after, made)
            after = made
        return after

    def _value(self, value: ir.Value) -> ir.Value:
        if id(value) in self.values:
            return self.values[id(value)]
        name = self._names.get(id(value), "")
        if _CACHE.match(name):
            self.inputs[name] = self.values[id(value)] = _like(value, _number(name, self._index))
            return self.values[id(value)]
        if value.is_initializer() and (value.name or "").startswith(f"{self._path}.{self._region.index}."):
            return self._weight(value)
        return value

    def _weight(self, value: ir.Value) -> ir.Value:
        import onnx_ir as ir

        name = _weight_name(value.name, self._path, self._index)
        graph = self._model.graph
        if name not in graph.initializers:
            made = _like(value, name)
            held = value.const_value
            if name in self._buffers:
                held = ir.tensor(self._buffers[name].numpy(), name=name)
            made.const_value = held
            graph.register_initializer(made)
        return graph.initializers[name]

    def _attribute(self, attribute: Any) -> Any:
        import onnx_ir as ir

        if attribute.type != ir.AttributeType.STRING:
            return attribute
        text = _text(attribute.value, self._path, self._region.index, self._index)
        return ir.AttrString(attribute.name, text)


def _like(value: ir.Value, name: str) -> ir.Value:
    import onnx_ir as ir

    # Types are objects that setting a value's dtype changes.
    return ir.Value(name=name, type=copy.copy(value.type), shape=copy.copy(value.shape))


def _number(name: str, index: int) -> str:
    """``past.3.key`` → ``past.7.key``."""
    return _CACHE.sub(lambda found: f"{found[1]}.{index}.", name)


def _weight_name(name: str | None, path: str, index: int) -> str:
    rest = (name or "")[len(path) + 1 :]
    return f"{path}.{index}.{rest.partition('.')[2]}"


def _text(text: str, path: str, first: int, second: int) -> str:
    """A name inside layer ``first``, as it is in layer ``second``. Names may lack the graph's own prefix."""
    own = path.partition(".")[2]
    pattern = rf"^((?:{re.escape(path)})|(?:{re.escape(own)}))\.{first}(?=\.|$)"
    return re.sub(pattern, lambda found: f"{found[1]}.{second}", text)


def _renumbered(spec: TensorSpec, index: int) -> TensorSpec:
    pair = None if spec.pair is None else _number(spec.pair, index)
    return dataclasses.replace(spec, name=_number(spec.name, index), pair=pair)
