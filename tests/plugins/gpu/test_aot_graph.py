"""ExpertMLP as four ahead-of-time plugin nodes: same numbers, a kernel per node, weights where they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from moe_export_plugins.gpu.aot_graph import ATTRIBUTES, expand_experts, plugin_of, register, write_aot_model
from moe_export_plugins.gpu.aot_plugins import NAMESPACE, PLUGINS
from moe_export_plugins.gpu.experts import ExpertShape
from moe_export_plugins.gpu.interpret import run_interpreted
from numpy.typing import NDArray

from moe_export.backends.trt.build_engine import gpu_sm
from moe_export.costs.tiles import tiles
from moe_export.errors import BundleError, EnvironmentLacksError
from moe_export.ops import OPS

from .test_ipluginv3_build import INNER, E, H, K, model

LAYERS = {"model.layers.0": K}


def inputs(tokens: int, dtype: str) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(tokens)
    return {
        "hidden": rng.standard_normal((tokens, H)).astype(dtype),
        "expert_ids": rng.integers(-1, E, (tokens, K)).astype(np.int32),
        "weights": rng.random((tokens, K)).astype(np.float32),
    }


def run(graph: ir.Graph, given: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Every node by its kernel under Triton's interpreter, as its attributes say."""
    values = dict(given)
    values |= {n: v.const_value.numpy() for n, v in graph.initializers.items() if v.const_value is not None}
    for node in graph:
        plugin = PLUGINS[node.op_type]
        arrays = [values[v.name] for v in node.inputs if v is not None and v.name is not None]
        attributes = {k: a.value for k, a in node.attributes.items() if k not in ATTRIBUTES}
        dtypes = [a.dtype.name for a in arrays]
        constants, dtype = plugin.decode(attributes, dtypes), plugin.dtype(dtypes)
        tile = next(iter(plugin.tactics(dtype, attributes.get("block_rows")).values()))
        named = {t.name: a for t, a in zip(plugin.inputs, arrays, strict=True)}
        made = run_interpreted(plugin.kernel, named, constants, tile, dtype=dtype)
        for tensor, value in zip(plugin.contract.outputs, node.outputs, strict=True):
            assert value.name is not None
            values[value.name] = made[tensor.name]
    return values["out"]


FORMS: dict[str, dict[str, Any]] = {
    "silu": {},
    "biased": {"activation": "clamped_swiglu", "layout": "interleaved", "biased": 1},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [3, 200])
def test_the_same_numbers(form: str, tokens: int, tmp_path: Path) -> None:
    path = model(tmp_path, "float32", **FORMS[form])
    held = ir.load(path)
    assert expand_experts(held, LAYERS, tokens, 89) == 1
    names = [n.op_type for n in held.graph]
    bias = "Bias" if form == "biased" else ""
    assert names == ["Dispatch", f"GateUp{bias}", f"Down{bias}", "Combine"]
    assert {n.domain for n in held.graph} == {NAMESPACE}
    assert all({k: n.attributes[k].value for k in ATTRIBUTES} == ATTRIBUTES for n in held.graph)
    given = inputs(min(tokens, 9), "float32")
    attributes = OPS["ExpertMLP"].complete({"num_experts": E, "layer": "", **FORMS[form]})
    weights = {
        n: v.const_value.numpy() for n, v in held.graph.initializers.items() if v.const_value is not None
    }
    wanted = OPS["ExpertMLP"].reference(**given, **weights, **attributes)
    found = run(held.graph, given)
    assert np.abs(found - wanted).max() <= 1e-6 * np.abs(wanted).max()
    spoiled = {**given, "expert_ids": (given["expert_ids"] + 1) % E}
    assert np.abs(run(held.graph, spoiled) - wanted).max() > 1e-2


def test_rows_of_a_block_follow_the_usual_number_of_tokens(tmp_path: Path) -> None:
    path = model(tmp_path, "float16")
    rows = []
    for tokens in (1, 100_000):
        held = ir.load(path)
        expand_experts(held, LAYERS, tokens, 89)
        by_node = [n.attributes["block_rows"].value for n in held.graph if "block_rows" in n.attributes]
        assert len(by_node) == 3 and len(set(by_node)) == 1
        rows.append(by_node[0])
    found = [t.rows for t in tiles("gate_up", "float16")]
    assert rows == [min(found), max(found)]


def test_the_written_model_names_the_same_weights_and_no_function(tmp_path: Path) -> None:
    path = model(tmp_path, "float16")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.data", size_threshold=0)
    before = (tmp_path / "w.data").read_bytes()
    target = tmp_path / "model.aot.onnx"
    assert write_aot_model(path, target, LAYERS, 8, 89) == 1
    proto = onnx.load(target, load_external_data=False)
    assert {e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"} == {
        "w.data"
    }
    assert not proto.functions and {o.domain for o in proto.opset_import} == {"", NAMESPACE}
    assert (tmp_path / "w.data").read_bytes() == before
    # The other model is as it was.
    assert [n.op_type for n in onnx.load(path).graph.node] == ["ExpertMLP"]
    with pytest.raises(EnvironmentLacksError, match="must lie beside"):
        write_aot_model(path, tmp_path / "other" / "m.onnx", LAYERS, 8, 89)


def test_which_plugin() -> None:
    assert plugin_of("gate_up", True).name == "GateUpBias" and plugin_of("gate_up", False).name == "GateUp"
    assert plugin_of("dispatch", True).name == "Dispatch"


def test_registering_needs_kernels_and_a_gpu(tmp_path: Path) -> None:
    from moe_export_plugins.gpu.bundle_kernels import expert_specs

    from .memory_launcher import stand_in_library

    with pytest.raises(BundleError, match="kernels.json is missing"):
        register(None, tmp_path)
    stand_in_library(tmp_path, expert_specs(ExpertShape("float16", E, K, H, INNER)))
    if gpu_sm() is None:
        with pytest.raises(EnvironmentLacksError, match="NVIDIA driver"):
            register(None, tmp_path)
