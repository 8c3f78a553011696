"""The own modules exported: outputs and routing in stock ONNX Runtime, at shapes that were not traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_export.errors import UnsupportedModelError
from moe_export.importer.export import ExportedModel, export_model
from moe_export.models.reference import ReferenceModel

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = {"own_module": "features", "noisy_top_k": "output"}
SHAPES = [(1, 1), (1, 40), (5, 3), (3, 17)]
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=sorted(OUTPUT))
def exported(request: pytest.FixtureRequest) -> tuple[str, ExportedModel]:
    return request.param, export_model(f"{ROOT}/examples/{request.param}/model.py:build", task="module")


def session(exported: ExportedModel, path: Path) -> Any:
    """The portable model in ONNX Runtime, with each layer's expert ids as further outputs."""
    import onnx_ir as ir
    import onnxruntime

    model = exported.model.clone()
    values = {value.name: value for node in model.graph for value in node.outputs}
    for layer in exported.moe_layers:
        model.graph.outputs.append(values[layer.expert_ids])
    ir.save(model, path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])


def inputs_of(exported: ExportedModel, batch: int, length: int) -> dict[str, Any]:
    rng = np.random.default_rng(batch * 100 + length)
    sizes = {"batch": batch, "sequence": length, "time": length}
    feeds: dict[str, Any] = {}
    for spec in exported.io.inputs:
        shape = [sizes[n] if isinstance(n, str) else n for n in spec.shape]
        if spec.name == "mask":
            lengths = rng.integers(1, length + 1, size=(batch, 1))
            feeds[spec.name] = (np.arange(length) < lengths).astype(np.int64)
        else:
            feeds[spec.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def test_outputs_and_routing_agree_with_the_model_itself(
    exported: tuple[str, ExportedModel], tmp_path: Path
) -> None:
    name, model = exported
    assert [spec.name for spec in model.io.outputs] == [OUTPUT[name]]
    assert [layer.num_experts for layer in model.moe_layers] == ([6, 6] if name == "own_module" else [8])
    engine, reference = session(model, tmp_path), ReferenceModel(model.source)
    used: list[set[int]] = [set() for _ in model.moe_layers]
    for batch, length in SHAPES:
        feeds = inputs_of(model, batch, length)
        expected = reference.run(feeds)
        output, *expert_ids = engine.run(None, feeds)
        assert output.shape == expected.outputs[OUTPUT[name]].shape
        assert np.abs(output - expected.outputs[OUTPUT[name]]).max() <= TOLERANCE
        for layer, ids in enumerate(expert_ids):
            assert np.array_equal(ids, expected.layers[layer].expert_ids)
            used[layer] |= set(ids.ravel().tolist())
    assert used == [set(range(layer.num_experts)) for layer in model.moe_layers]


def test_the_comparison_notices_two_experts_swapped(
    exported: tuple[str, ExportedModel], tmp_path: Path
) -> None:
    import onnx_ir as ir

    name, model = exported
    broken = ExportedModel(
        model.model.clone(), model.io, model.moe_layers, model.source, model.dtype, model.opset
    )
    stacked = [
        v for v in broken.model.graph.initializers.values() if v.shape is not None and len(v.shape) == 3
    ]
    assert stacked
    for value in stacked[:1]:
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        array[[0, 1]] = array[[1, 0]]
        value.const_value = ir.tensor(array, name=value.name)
    feeds = inputs_of(model, 3, 17)
    output = session(broken, tmp_path).run(None, feeds)[0]
    assert (
        np.abs(output - ReferenceModel(model.source).run(feeds).outputs[OUTPUT[name]]).max() > 100 * TOLERANCE
    )


def test_without_its_adapter_the_model_is_refused_and_the_adapter_to_write_is_shown(tmp_path: Path) -> None:
    source = (ROOT / "examples" / "noisy_top_k" / "model.py").read_text()
    begin, end = source.index("register_moe_block(\n"), source.index("class FrameTagger")
    file = tmp_path / "model.py"
    file.write_text(source[:begin] + source[end:])
    with pytest.raises(UnsupportedModelError) as refused:
        export_model(f"{file}:build", task="module")
    for expected in ("NoisyTopKMoE", "8 experts", "MoEBlockSpec", "first, second"):
        assert expected in str(refused.value)
