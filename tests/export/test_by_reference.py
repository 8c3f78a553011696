"""Models whose weights are left where they lie: the same model, and the same engine, as the loaded one."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import pytest
import torch
import transformers

from moe_export import api
from moe_export.backends import get_backend
from moe_export.config import BuildConfig
from moe_export.errors import SourceError, UsageError
from moe_export.importer import hollow
from moe_export.importer.checkpoint import inspect_checkpoint
from moe_export.importer.export import export_model
from moe_export.importer.layer_kinds import LayerKinds, layer_kinds, only_first_layers, shortest_prefix
from moe_export.importer.sources import load_source
from moe_export.importer.weight_sources import Converted, PerExpert, stored_weights
from moe_export.models.families import FAMILIES
from moe_export.models.families.tiny import build_tiny
from moe_export.progress import NullProgress

RANDOM_BUFFERS = {"zaya": "balancing_biases"}
"""Buffers that no checkpoint holds and that the tiny model draws at random."""


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32, layers: int = 0) -> Any:
    entry = FAMILIES[family]
    if layers:
        entry = dataclasses.replace(entry, tiny={**entry.tiny, "num_hidden_layers": layers})
    model = build_tiny(entry, model_class=entry.classes[0]).to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", [n for n, f in FAMILIES.items() if f.status != "refused"])
def test_every_familys_hollow_model_is_the_saved_one(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every parameter and buffer of the hollow model, with all weights read, is the saved model's."""
    monkeypatch.setattr(hollow, "SMALL", 1 << 40)
    model = saved(family, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    made, _ = hollow.hollow_model(type(model), config, inspect_checkpoint(tmp_path))
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    got = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        if family in RANDOM_BUFFERS and RANDOM_BUFFERS[family] in name:
            continue
        assert got[name].dtype == value.dtype
        assert torch.equal(torch.nan_to_num(got[name]), torch.nan_to_num(value)), name


def test_where_weights_come_from(tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path / "mixtral")
    stored = stored_weights(model, inspect_checkpoint(tmp_path / "mixtral"))
    source = stored.sources["model.layers.0.mlp.experts.gate_up_proj"]
    assert isinstance(source, PerExpert)
    assert [part[1].rpartition("experts.")[2] for part in source.parts] == ["1.w1.weight", "1.w3.weight"]
    gate_up = model.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(stored.weight("model.layers.0.mlp.experts.gate_up_proj"), gate_up)
    model = saved("inkling2", tmp_path / "inkling2")
    stored = stored_weights(model, inspect_checkpoint(tmp_path / "inkling2"))
    converted = [name for name, source in stored.sources.items() if isinstance(source, Converted)]
    assert converted
    for name in converted:
        assert torch.equal(stored.weight(name), model.state_dict()[name]), name


def test_tied_weights_are_one_tensor_of_the_checkpoint(tmp_path: Path) -> None:
    entry = FAMILIES["mixtral"]
    entry = dataclasses.replace(entry, tiny={**entry.tiny, "tie_word_embeddings": True})
    model = build_tiny(entry)
    model.save_pretrained(tmp_path)
    stored = stored_weights(model, inspect_checkpoint(tmp_path))
    assert stored.sources["lm_head.weight"] == stored.sources["model.embed_tokens.weight"]
    made, _ = hollow.hollow_model(type(model), model.config, inspect_checkpoint(tmp_path))
    assert made.lm_head.weight is made.model.embed_tokens.weight


def test_a_lacking_or_misshapen_weight_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved("mixtral", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    kept = {k: v for k, v in tensors.items() if k != key}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(SourceError, match=r"another shape of model\.layers\.1\.mlp\.experts\.down_proj"):
        load_source(tmp_path, hollow=True)
    save_file({k: v for k, v in tensors.items() if "final" not in k and k != "model.norm.weight"}, file)
    with pytest.raises(SourceError, match=r"lack model\.norm\.weight"):
        load_source(tmp_path, hollow=True)


def test_a_hollow_tensor_takes_no_memory() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    tensor = hollow.hollow_tensor((1 << 14, 1 << 20), torch.float32)  # 64 GiB
    assert tensor.shape == (1 << 14, 1 << 20) and float(tensor[5, 7]) == 0.0
    assert process.memory_info().rss - before < 64 << 20
    assert hollow.hollow_tensor((0, 4), torch.float32).shape == (0, 4)


def run(folder: Path, io: Any) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    sizes = {"batch": 2, "sequence": 5, "past": 3, "total": 8}
    feeds = {}
    for spec in io.inputs:
        shape = [sizes.get(d, d) for d in spec.shape]
        if spec.role == "mask":
            feeds[spec.name] = np.ones(shape, spec.dtype)
        elif "int" in spec.dtype:
            feeds[spec.name] = random.integers(0, 50, shape).astype(spec.dtype)
        else:
            feeds[spec.name] = random.standard_normal(shape).astype(spec.dtype)
    return list(session.run(None, feeds))


@pytest.mark.parametrize(
    ("family", "layers", "traced", "dtype"),
    [
        ("mixtral", 5, "3 of 5 layers were traced", torch.bfloat16),
        pytest.param("mixtral", 2, "", torch.float32, marks=pytest.mark.slow),
        pytest.param("deepseek_v3", 7, "of 7 layers were traced", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(
            "olmoe", 5, "3 of 5 layers were traced", torch.float32,
            marks=(pytest.mark.slow, pytest.mark.nightly),
        ),
    ],
)  # fmt: skip
def test_an_engine_by_reference_gives_the_loaded_ones_numbers(
    family: str,
    layers: int,
    traced: str,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hollow, "SMALL", 8192)
    saved(family, tmp_path / "source", dtype, layers)
    results, notes = [], []
    for by_reference in (True, False):
        folder = tmp_path / f"engine-{by_reference}"
        folder.mkdir()
        exported = export_model(load_source(tmp_path / "source", hollow=by_reference))
        assert [n for n in exported.notes if "traced" in n] == [] or by_reference
        assert not (by_reference and traced) or traced in exported.notes[0]
        lowered = get_backend("portable").build(exported, folder, {})
        results.append(run(folder, lowered.io))
        notes.append([note for note in lowered.notes if note.startswith("weights: ")])
    for got, wanted in zip(*results, strict=True):
        assert np.array_equal(got, wanted)
    assert len(notes[0]) == 1 and "referenced in the checkpoint's own files" in notes[0][0]
    assert not notes[1]
    shard = tmp_path / "engine-True" / "checkpoint" / "model.safetensors"
    assert os.path.samefile(shard, tmp_path / "source" / "model.safetensors")


def test_prefixes_hold_each_kind_two_times_after_the_first_layer() -> None:
    assert shortest_prefix(["a"] * 4) == 3
    assert shortest_prefix(["a"] * 2) is None
    assert shortest_prefix(["d", "d", "d", "m", "m", "m", "m"]) == 5
    assert shortest_prefix(["s", "f", "s", "f", "s", "f", "s", "f"]) == 5
    assert shortest_prefix(["a", "b", "c"]) is None


def kinds_of(model: Any) -> LayerKinds:
    def run() -> None:
        model(input_ids=torch.ones(1, 4, dtype=torch.int64), use_cache=False)

    return layer_kinds(model, model.model.layers, run)


def test_kinds_tell_layers_by_what_they_compute(tmp_path: Path) -> None:
    model = saved("mixtral", tmp_path, layers=4)
    same = kinds_of(model)
    assert len(set(same.layers)) == 1
    with only_first_layers(model, "model.layers", 3):
        assert kinds_of(model) == LayerKinds(same.layers[:3], same.around)
    layer = model.model.layers[2]
    forward = layer.forward
    # A layer that looks at its own number, and a model that looks at the number of its layers.
    layer.forward = lambda x, *args, **kwargs: forward(x * (1 + 2 / 7), *args, **kwargs)
    other = kinds_of(model)
    assert len(set(other.layers)) == 2 and other.layers[2] != other.layers[1]
    assert other.around == same.around
    layer.forward = forward
    norm = model.model.norm.forward
    model.model.norm.forward = lambda x: norm(x) / len(model.model.layers)
    whole = kinds_of(model)
    with only_first_layers(model, "model.layers", 3):
        assert kinds_of(model).around != whole.around


def test_a_shortened_model_is_whole_again_afterwards(tmp_path: Path) -> None:
    model = saved("gpt_oss", tmp_path, layers=6)
    types = list(model.config.layer_types)
    with only_first_layers(model, "model.layers", 4):
        assert len(model.model.layers) == 4 == model.config.num_hidden_layers
        assert model.config.layer_types == types[:4]
    assert len(model.model.layers) == 6 == model.config.num_hidden_layers
    assert model.config.layer_types == types


def test_large_weights_stay_where_they_lie_and_small_ones_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("mixtral", tmp_path)
    notes: list[str] = []

    class Notes(NullProgress):
        def note(self, text: str) -> None:
            notes.append(text)

    def lie(source: Any = tmp_path, **changes: Any) -> str:
        config = BuildConfig(**{"target": "portable", "verify": False, "bench": False, **changes})
        return api._where_weights_lie(source, config, Notes())

    assert lie() == lie(dtype="float16") == lie(target="onnxruntime") == "load"
    assert lie(weights="reference") == "reference"
    assert lie(weights="stream") == lie(weights="stream", target="onnxruntime") == "stream"
    monkeypatch.setattr(api, "REFERENCE_FROM", 1000)
    assert lie() == "reference"
    assert lie(target="onnxruntime") == lie(target="onnxruntime", bench=True) == "stream"
    assert lie(weights="load") == lie(verify=True) == lie(target="onnxruntime", verify=True) == "load"
    assert lie(target="tensorrt-rtx", sm=(89,), dtype="float16") == "load"
    assert lie("own.py:make") == "load" and notes == []
    assert lie(dtype="float16") == lie(dtype="float16", target="onnxruntime") == "load"
    assert lie(trust_remote_code=True) == "load"
    assert [n.partition(" loaded: ")[2][:16] for n in notes] == [
        "reference needs ", "stream needs dty", "reference is for"
    ]  # fmt: skip
    with pytest.raises(UsageError, match="reference is for a model folder, and own.py:make is none"):
        lie("own.py:make", weights="reference")
    with pytest.raises(UsageError, match="stream is for models whose class .* not with trust_remote_code"):
        lie(weights="stream", trust_remote_code=True)
    for given, text in (
        ({"weights": "reference", "target": "onnxruntime"}, "reference needs target portable"),
        ({"weights": "reference", "bench": True}, "reference needs bench = false"),
        ({"weights": "stream", "verify": True}, "stream needs verify = false"),
        ({"weights": "stream", "dtype": "float16"}, "stream needs dtype float32 or bfloat16"),
        (
            {"weights": "stream", "target": "tensorrt-rtx", "sm": (89,), "dtype": "float16"},
            "stream needs target onnxruntime or portable",
        ),
    ):
        with pytest.raises(UsageError, match=f"weights: {text}"):
            lie(**given)
