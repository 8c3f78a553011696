"""Each ExpertMLP node of a lowered model as four nodes of the ahead-of-time plugins, for standard TensorRT.

The model with them lies beside the one without: only TensorRT with :mod:`aot` registered reads it. The other
still runs anywhere by its function bodies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.errors import EnvironmentLacksError
from moe_export.ops import DOMAIN

from .aot import register as register_plugins
from .aot_plugins import NAMESPACE, PLUGINS, AotPlugin
from .bundle_kernels import expert_nodes, node_shape
from .driver import CudaDriver
from .experts import STEPS, ExpertShape, choose_tiles
from .library import KernelLibrary, PtxOf

if TYPE_CHECKING:
    import onnx_ir as ir

MODEL_FILE = "model.aot.onnx"
ATTRIBUTES = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1}
"""Of every node: they make TensorRT's parser take the plugin, and its ahead-of-time form."""


def register(trt: Any, library: Path | str) -> tuple[str, ...]:
    """Register the ahead-of-time plugins with the compiled kernels of a bundle, for the GPU here.

    A plan's builder calls it before parsing; whoever loads the plan needs none of this.

    Raises:
        BundleError: no kernels for this GPU, or damaged ones.
        EnvironmentLacksError: no GPU or driver, or a TensorRT whose plugin API cannot do it.
    """
    kernels = KernelLibrary.load(Path(library))
    driver = CudaDriver()
    driver.open(0)
    device = driver.device()
    kernels.check(device)
    return register_plugins(trt, PtxOf(kernels, device.sm))


def write_aot_model(source: Path, target: Path, top_ks: Mapping[str, int], tokens: int, sm: int) -> int:
    """Rewrite the model file ``source`` into ``target`` in the same folder; returns the number of layers.

    Weights stay where they are. ``top_ks``: K by layer. ``tokens``, ``sm``: the usual number of tokens of a
    run, and a GPU, for which the cost model chooses the rows of a block.

    Raises:
        UsageError: a form of experts that the kernels do not have.
    """
    import onnx_ir as ir

    if source.parent.resolve() != target.parent.resolve():
        raise EnvironmentLacksError(f"{target} must lie beside {source}: both name the same weight files")
    model = ir.load(source)
    count = expand_experts(model, top_ks, tokens, sm)
    ir.save(model, target)
    return count


def expand_experts(model: ir.Model, top_ks: Mapping[str, int], tokens: int, sm: int) -> int:
    """Replace the ExpertMLP nodes of ``model``; returns how many there were. See :func:`write_aot_model`."""
    nodes = expert_nodes(model)
    for number, node in enumerate(nodes):
        shape = node_shape(node, top_ks)
        rows = choose_tiles(shape, tokens, sm).dispatch.rows
        _expand(model, node, shape, rows, f"moe_gpu.{number}")
    if nodes:
        model.graph.opset_imports[NAMESPACE] = 1
    if all(n.domain != DOMAIN for n in model.graph.all_nodes()):
        for identifier in [k for k in model.functions if k[0] == DOMAIN]:
            del model.functions[identifier]
        model.graph.opset_imports.pop(DOMAIN, None)
    return len(nodes)


def plugin_of(kernel: str, biased: bool) -> AotPlugin:
    """The plugin of a kernel, with biases where it has any."""
    return next(
        p
        for p in PLUGINS.values()
        if p.kernel == kernel and p.biased == (biased and any(t.only_if for t in p.contract.inputs))
    )


def _expand(model: ir.Model, node: ir.Node, shape: ExpertShape, rows: int, name: str) -> None:
    import onnx_ir as ir

    names = ("hidden", "expert_ids", "weights", "up", "down", "up_bias", "down_bias")
    values = dict(zip(names, node.inputs, strict=False))
    made = []
    for kernel in STEPS:
        plugin = plugin_of(kernel, bool(shape.biased))
        attributes = {**plugin.encode(shape.constants(kernel), rows), **ATTRIBUTES}
        step = ir.node(
            plugin.name,
            [values[t.name] for t in plugin.inputs],
            attributes=attributes,
            domain=NAMESPACE,
            num_outputs=len(plugin.contract.outputs),
            name=f"{name}.{kernel}",
        )
        for tensor, value in zip(plugin.contract.outputs, step.outputs, strict=True):
            value.name = f"{name}.{tensor.name}"
            values[tensor.name] = value
        made.append(step)
    old, new = node.outputs[0], made[-1].outputs[0]
    graph = node.graph
    assert isinstance(graph, ir.Graph), "a plugin node lies in the main graph or in a branch of it"
    graph.insert_before(node, made)
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = None, old.name
    graph.remove(node, safe=True)
