"""The GPU plugin of ``moe_export_plugins.gpu``: its limits, and the compiled kernels that a bundle holds
for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_export.errors import UsageError
from moe_export.graph.functions import PLUGIN_ATTRIBUTES
from moe_export.ops import DOMAIN
from moe_export.passes.base import PassContext
from moe_export.schema import Decision

from ..base import MODEL_FILE, LayerSize

FOLDER = "kernels"
"""Of a bundle: the compiled kernels."""
MODULE = "moe_export_plugins.gpu.ipluginv3"
"""Registers the plugin with TensorRT; what a recipe names."""
AHEAD_OF_TIME = "moe_export_plugins.gpu.aot_graph"
"""The same for the plugin whose kernels become part of the plan, which standard TensorRT has."""


def check_plugin_sizes(layer: LayerSize, dtype: str) -> None:
    """Refuse E, K, H or I outside the kernels' limits.

    Raises:
        UsageError: names the layer, the limit and what to do instead.
    """
    from moe_export_plugins.gpu.experts import ExpertShape

    if None in (layer.top_k, layer.hidden_size, layer.intermediate_size):
        return
    try:
        ExpertShape(dtype, layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size)
    except UsageError as error:
        raise UsageError(
            f"MoE layer {layer.name!r} does not fit the GPU plugin: {error}; take expert_lowering native"
        ) from error


def write_plugin_kernels(
    context: PassContext, folder: Path, sms: tuple[int, ...], tokens: int | None = None
) -> dict[str, Any]:
    """Compile the kernels of the model's plugin nodes into the bundle, for every SM; returns what the
    recipe says of plugins. Empty where no layer is one.

    ``tokens``: the usual number of tokens of a run, for plans that take the kernels in; such a plan is built
    of a second model file beside ``model.onnx``. None: the plugin launches the bundle's kernels.

    Raises:
        UsageError, ExportError, EnvironmentLacksError: a kernel cannot be compiled.
    """
    nodes = [
        node
        for node in context.model.graph.all_nodes()
        if node.domain == DOMAIN and set(PLUGIN_ATTRIBUTES) <= set(node.attributes)
    ]
    if not nodes:
        return {}
    from moe_export_plugins.gpu import bundle_kernels

    top_ks = {layer.name: layer.top_k for layer in context.layers}
    shapes = bundle_kernels.model_shapes(context.model, top_ks)
    specs = [spec for shape in shapes for spec in bundle_kernels.expert_specs(shape)]
    written = bundle_kernels.write_kernels(folder / FOLDER, specs, sms)
    context.decisions.append(
        Decision(
            "GPU plugin",
            f"{len(written)} files of compiled kernels in {FOLDER}/",
            f"{len(nodes)} expert node(s) of {len(shapes)} form(s), compiled for "
            f"{', '.join(f'SM{n}' for n in sms)}; not run on a GPU",
        )
    )
    if tokens is None:
        return {"plugins": [MODULE], "kernels": FOLDER}
    from moe_export_plugins.gpu import aot_graph

    aot_graph.write_aot_model(folder / MODEL_FILE, folder / aot_graph.MODEL_FILE, top_ks, tokens, sms[0])
    return {"plugins": [AHEAD_OF_TIME], "kernels": FOLDER, "model": aot_graph.MODEL_FILE}
