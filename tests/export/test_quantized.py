"""Quantised checkpoints through export and build: the engine is that of the dequantised model."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file

from moe_export import build, export
from moe_export.backends import get_backend
from moe_export.errors import SourceError
from moe_export.importer import hollow, referenced
from moe_export.importer.checkpoint import inspect_checkpoint
from moe_export.importer.export import export_model
from moe_export.importer.kept import kept_tensors, quantized_decision, written_bytes
from moe_export.importer.quantized import QuantizedTensor, QuantizedWeights
from moe_export.importer.sources import load_source
from moe_export.importer.weight_sources import AsStored, StoredWeights, stored_weights
from moe_export.models.families import FAMILIES
from moe_export.models.families.tiny import build_tiny
from moe_export.schema import Decision
from moe_export.verify import verify_bundle
from tests.helpers import published
from tests.helpers.published import Format, publish
from tests.helpers.tools import tool

FORMATS = [
    pytest.param("mixtral", published.fp8(), {"num_hidden_layers": 1}, id="mixtral-fp8"),
    pytest.param("deepseek_v3", published.fp8((16, 24)), {}, id="deepseek-fp8", marks=pytest.mark.slow),
    pytest.param(
        "gpt_oss", published.mxfp4(), {"intermediate_size": 64}, id="gpt-oss-mxfp4", marks=pytest.mark.slow
    ),
    pytest.param(
        "qwen3_moe", published.gptq(desc_act=True), {}, id="qwen3-moe-gptq", marks=pytest.mark.slow
    ),
    pytest.param("mixtral", published.awq(), {}, id="mixtral-awq", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix of the tiny models is left where it lies."""
    monkeypatch.setattr(hollow, "SMALL", 256)
    monkeypatch.setattr(referenced, "INLINE", 256)


def checkpoints(family: str, form: Format, folder: Path, **sizes: Any) -> tuple[Path, Path]:
    """The quantised one and the float one of the same values."""
    entry = FAMILIES[family]
    model = build_tiny(dataclasses.replace(entry, tiny={**entry.tiny, **sizes}))
    model.save_pretrained(folder / "source")
    publish(folder / "source", folder / "quantised", folder / "floats", form, shards=2)
    return folder / "quantised", folder / "floats"


def engine(source: Path, folder: Path, by_reference: bool, **options: Any) -> tuple[list[Any], Any]:
    """What the portable model of ``source`` answers, and what was noted."""
    folder.mkdir()
    exported = export_model(load_source(source, hollow=by_reference), **options)
    lowered = get_backend("portable").build(exported, folder, {})
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    random, sizes = np.random.default_rng(0), {"batch": 2, "sequence": 5, "past": 3, "total": 8}
    feeds = {}
    for spec in lowered.io.inputs:
        shape = [sizes.get(str(d), d) for d in spec.shape]
        if spec.role == "mask":
            feeds[spec.name] = np.ones(shape, spec.dtype)
        elif "int" in spec.dtype:
            feeds[spec.name] = random.integers(0, 50, shape).astype(spec.dtype)
        else:
            feeds[spec.name] = random.standard_normal(shape).astype(spec.dtype)
    return session.run(None, feeds), lowered


def decision(decisions: tuple[Decision, ...]) -> Decision:
    (found,) = [d for d in decisions if d.subject == "quantised checkpoint"]
    return found


@pytest.mark.parametrize(("family", "form", "sizes"), FORMATS)
def test_an_engine_has_the_published_values(
    family: str, form: Format, sizes: dict[str, Any], tmp_path: Path
) -> None:
    """By reference, written tensor by tensor, it answers as that of the float checkpoint, to the last bit."""
    quantised, floats = checkpoints(family, form, tmp_path, **sizes)
    got, lowered = engine(quantised, tmp_path / "got", by_reference=True)
    wanted, plain = engine(floats, tmp_path / "wanted", by_reference=False)
    for a, b in zip(got, wanted, strict=True):
        assert np.array_equal(a, b)
    found = decision(lowered.decisions)
    info = inspect_checkpoint(quantised)
    assert found.choice == "dequantised" and info.quantization is not None
    assert found.reason.startswith(f"{len(info.quantized)} weights in {info.quantization.text()}, ")
    assert " as published: all are read and written as floats, " in found.reason
    assert "not kept, as " in found.reason
    assert any(note.startswith("weights: ") and "referenced" in note for note in lowered.notes)
    assert not any(d.subject == "quantised checkpoint" for d in plain.decisions)
    types = set(initializers(tmp_path / "got").values())
    assert ("BFLOAT16" in types) == (form.config["quant_method"] == "mxfp4")


def initializers(folder: Path) -> dict[str, str]:
    """Name → dtype of every initializer of a written model."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return {t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer}


def test_fp8_stays_as_it_is(tmp_path: Path) -> None:
    """From opset 21 on the graph scales the checkpoint's own float8 tensors; its answers are the same."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96}
    quantised, floats = checkpoints("mixtral", published.fp8((24, 40)), tmp_path, **sizes)
    got, lowered = engine(quantised, tmp_path / "got", by_reference=True, opset=21)
    wanted, _ = engine(floats, tmp_path / "wanted", by_reference=False, opset=21)
    for a, b in zip(got, wanted, strict=True):
        assert np.array_equal(a, b)
    held = initializers(tmp_path / "got")
    float8 = [name for name, dtype in held.items() if dtype == "FLOAT8E4M3FN"]
    info = inspect_checkpoint(quantised)
    assert len(float8) == len(info.quantized) == 16
    found = decision(lowered.decisions)
    assert found.choice == "kept" and "16 stay in the checkpoint's files as they are" in found.reason
    files = sum(path.stat().st_size for path in (tmp_path / "got").glob("model.onnx*"))
    assert files < sum(t.nbytes for t in info.quantized.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deepseeks_fp8_stays_as_it_is(dtype: str, tmp_path: Path) -> None:
    """Dense layers, latent attention and shared experts, too; scales are never rounded to bfloat16."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 48}
    quantised, floats = checkpoints("deepseek_v3", published.fp8((2, 4)), tmp_path, **sizes)
    got, lowered = engine(quantised, tmp_path / "got", by_reference=True, opset=21, dtype=dtype)
    assert decision(lowered.decisions).choice == "kept"
    held = initializers(tmp_path / "got")
    scales = {name: kind for name, kind in held.items() if "_scale" in name}
    assert scales and set(scales.values()) == {"FLOAT"}
    wanted, _ = engine(floats, tmp_path / "wanted", by_reference=False, opset=21)
    for a, b in zip(got, wanted, strict=True):
        assert np.array_equal(a, b) if dtype == "float32" else np.abs(a - b).max() < 0.05 * np.abs(b).max()


@pytest.mark.slow
def test_an_export_that_keeps_fp8_is_verified(tmp_path: Path) -> None:
    """As a bundle, hashes and all; and another model's numbers are not taken for it."""
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    quantised, floats = checkpoints("mixtral", published.fp8((24, 40)), tmp_path, **sizes)
    made = export(str(quantised), tmp_path / "made", weights="reference", opset=21)
    assert "FLOAT8E4M3FN" in initializers(made).values()
    assert verify_bundle(made, against=str(quantised)).passed
    tensors = load_file(floats / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"] *= np.float32(2)
    save_file(tensors, floats / "model.safetensors", {"format": "pt"})
    assert not verify_bundle(made, against=str(floats)).passed


@pytest.mark.parametrize(
    ("form", "opset", "choice", "why"),
    [
        (published.fp8(), 21, "kept", "That is slower than float weights"),
        (published.fp8(), 20, "dequantised", "blocks have scales from opset 21 on: use --opset 21"),
        (published.fp8(scale="bfloat16"), 21, "dequantised", "kept are large matrices with a float32 scale"),
        (published.fp8(None), 21, "dequantised", "kept are large matrices with a float32 scale"),
        (published.gptq(), 21, "dequantised", "no type of ONNX holds the packed words of GPTQ int4"),
        (published.awq(), 21, "dequantised", "no type of ONNX holds the packed words of AWQ int4"),
    ],
)
def test_why_weights_are_kept_or_not(
    form: Format, opset: int, choice: str, why: str, tmp_path: Path
) -> None:
    quantised, _ = checkpoints("mixtral", form, tmp_path)
    info = inspect_checkpoint(quantised)
    stored = stored_weights(build_tiny(FAMILIES["mixtral"]), info)
    counted = QuantizedWeights.of(info)
    assert counted is not None
    found = quantized_decision(counted, stored, "float32", opset)
    assert found.choice == choice and why in found.reason
    streamed = dataclasses.replace(stored, streamed=True)
    for other in (None, streamed):
        reason = quantized_decision(counted, other, "float32", opset)
        assert reason.choice == "dequantised" and "the target's ops take floats" in reason.reason


def test_experts_are_kept_together(tmp_path: Path) -> None:
    """Where one expert of a projection is a float, all of that projection are."""
    form = dataclasses.replace(published.fp8(), wanted=r"experts\.([0-2]\.w1|\d\.w2)\.weight$")
    quantised, _ = checkpoints("mixtral", form, tmp_path)
    info = inspect_checkpoint(quantised)
    stored = stored_weights(build_tiny(FAMILIES["mixtral"]), info)
    kept = kept_tensors(stored, 21)
    assert len(info.quantized) == 2 * (3 + 4) and len(kept) == 2 * 4
    assert all(name.endswith("w2.weight") for name in kept)
    counted = QuantizedWeights.of(info)
    assert counted is not None
    found = quantized_decision(counted, stored, "float32", 21)
    assert found.choice == "kept in part" and "; kept are large matrices" in found.reason
    assert " 6 are read and written as floats, 36.0 KiB; " in found.reason
    assert written_bytes(counted, stored, "float32", 21) == 36 << 10
    assert written_bytes(counted, stored, "bfloat16", 21) == 18 << 10
    assert written_bytes(counted, stored, "float32", 20) == counted.float_bytes


def test_stacks_are_written_one_matrix_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed at once is one expert's matrix, and all of them make the stack."""
    import onnx_ir as ir

    entry = FAMILIES["gpt_oss"]
    quantised, _ = checkpoints("gpt_oss", published.mxfp4(), tmp_path, intermediate_size=64)
    model = build_tiny(dataclasses.replace(entry, tiny={**entry.tiny, "intermediate_size": 64}))
    stored = stored_weights(model, inspect_checkpoint(quantised))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    source = stored.sources[name]
    assert isinstance(source, AsStored) and stored.checkpoint.quantized[name].stack == 4
    whole = stored.weight(name)
    sizes: list[int] = []
    dequantize = QuantizedTensor.dequantize

    def noted(self: QuantizedTensor, parts: Any) -> torch.Tensor:
        made = dequantize(self, parts)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(QuantizedTensor, "dequantize", noted)
    tensor = referenced._place(stored, name, "w")
    assert isinstance(tensor, ir.LazyTensor) and tensor.dtype == ir.DataType.BFLOAT16
    stream = io.BytesIO()
    tensor.tofile(stream)
    assert sizes == [whole.numel() // 4] * 4
    assert stream.getvalue() == whole.view(torch.uint8).numpy().tobytes() == tensor.tobytes()


def test_a_value_that_makes_no_sense_ends_the_export(tmp_path: Path) -> None:
    quantised, _ = checkpoints("mixtral", published.gptq(), tmp_path)
    for file in quantised.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if n.endswith("experts.2.w2.g_idx")]:
            tensors[name][3] = 99
        save_file(tensors, file, {"format": "pt"})
    stored = stored_weights(build_tiny(FAMILIES["mixtral"]), inspect_checkpoint(quantised))
    with pytest.raises(SourceError, match=r"experts\.2\.w2\.qweight': g_idx puts input 3 into group 99"):
        list(every_weight(stored))


def test_files_that_have_a_second_name_are_read(tmp_path: Path) -> None:
    """An earlier export leaves one, and so do hub caches; onnx_ir refuses them below a folder."""
    quantised, _ = checkpoints("mixtral", published.fp8(), tmp_path)
    for file in quantised.glob("*.safetensors"):
        (tmp_path / file.name).hardlink_to(file)
    stored = stored_weights(build_tiny(FAMILIES["mixtral"]), inspect_checkpoint(quantised))
    name = "model.embed_tokens.weight"
    assert np.array_equal(referenced._place(stored, name, "w").numpy(), stored.weight(name).numpy())


@pytest.mark.parametrize("sparse", [False, True])
def test_synthetic_checkpoints_in_fp8(sparse: bool, tmp_path: Path) -> None:
    """What tools/bench_export.py measures is a checkpoint as published."""
    config = {**FAMILIES["deepseek_v3"].tiny, "model_type": "deepseek_v3"}
    config["architectures"] = ["DeepseekV3ForCausalLM"]
    size = tool("synthetic_checkpoint").write_checkpoint(tmp_path / "c", config, sparse=sparse, fp8=True)
    info = inspect_checkpoint(tmp_path / "c")
    assert info.total_bytes == size and info.quantization is not None
    assert info.quantization.text() == "FP8 in blocks of 128 x 128"
    model = load_source(tmp_path / "c").module
    spread = [float(p.std()) for n, p in model.named_parameters() if "_proj" in n]
    assert len(spread) == 18
    assert max(spread) == 0 if sparse else all(0.005 < value < 0.05 for value in spread)


def every_weight(stored: StoredWeights) -> Iterator[torch.Tensor]:
    for name in stored.sources:
        yield stored.weight(name)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_a_build_is_verified_against_the_dequantised_model(target: str, tmp_path: Path) -> None:
    quantised, floats = checkpoints("mixtral", published.gptq(desc_act=True), tmp_path)
    bundle = build(str(quantised), tmp_path / "engine", target=target, bench=False)
    assert bundle.manifest.evidence["parity"]["passed"]
    assert decision(bundle.manifest.decisions).choice == "dequantised"
    # Another model: every scale of one layer doubled.
    for file in quantised.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [n for n in tensors if ".layers.1." in n and n.endswith(".scales")]:
            tensors[name] = tensors[name] * np.float16(2)
        save_file(tensors, file, {"format": "pt"})
    assert not verify_bundle(bundle.path, against=str(quantised)).passed
    assert verify_bundle(bundle.path, against=str(floats)).passed


def test_large_quantised_models_are_those_with_many_weights(tmp_path: Path) -> None:
    """What decides whether weights are loaded is their size as floats, not that of the files."""
    from moe_export.api import _weight_bytes

    quantised, floats = checkpoints("mixtral", published.awq(), tmp_path)
    size = sum(f.stat().st_size for f in quantised.glob("*.safetensors"))
    assert _weight_bytes(quantised) == 4 * size
    assert _weight_bytes(floats) == (floats / "model.safetensors").stat().st_size
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "unknown"}
    (quantised / "config.json").write_text(json.dumps(config))
    assert _weight_bytes(quantised) == size
