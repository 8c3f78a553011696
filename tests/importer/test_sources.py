"""What can be handed in as a model, and what is refused, with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_export.config import BuildConfig
from moe_export.errors import ExportError, SourceError, UnsupportedModelError, UsageError
from moe_export.importer.export import export_model
from moe_export.importer.graphs import module_graph
from moe_export.importer.sources import check_finite_state, load_source
from moe_export.importer.trace import OPSETS, check_opset, trace

GOOD = """
import torch

def build():
    return torch.nn.Linear(3, 2), {"input": torch.ones(2, 3)}, {"input": {0: "batch"}}

def only_a_tuple():
    return torch.nn.Linear(3, 2), {"input": torch.ones(2, 3)}

def a_number():
    return 3

def fails():
    raise ValueError("no weights today")

def bare():
    return torch.nn.Linear(3, 2)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(GOOD, encoding="utf-8")
    return path


def linear_inputs() -> dict[str, Any]:
    return {"inputs": {"input": torch.ones(2, 3)}, "dynamic": {"input": {0: "batch"}}}


def tiny() -> Any:
    from moe_export.models.families import tiny_model

    return tiny_model("mixtral")


# Folders


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no-such-folder.*a model folder has config\.json"):
        load_source(tmp_path / "no-such-folder")
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(SourceError, match=r"a model folder has config\.json and safetensors files"):
        load_source(tmp_path)
    with pytest.raises(SourceError, match=r"a model folder has config\.json"):
        load_source(tmp_path / "notes.txt")


def saved(folder: Path, **changes: Any) -> Path:
    tiny().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    return folder


def test_a_saved_model_is_loaded(tmp_path: Path) -> None:
    source = load_source(saved(tmp_path))
    assert (source.kind, source.task, source.info.model_type) == ("huggingface", "text-generation", "mixtral")
    assert not source.module.training


def test_an_unknown_model_type_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="unknown model_type 'mixtrol'.*mixtral"):
        load_source(saved(tmp_path, model_type="mixtrol"))


@pytest.mark.parametrize(
    ("architectures", "said"),
    [(["MixtralForTelepathy"], "names 'MixtralForTelepathy', no model class"), (None, "names no class")],
)
def test_an_unknown_architecture_is_refused(tmp_path: Path, architectures: Any, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        load_source(saved(tmp_path, architectures=architectures))


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="lack model.layers"):
        load_source(saved(tmp_path, num_hidden_layers=5, layer_types=None))


# Live models


def test_a_nan_in_a_live_model_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    check_finite_state(model)
    with torch.no_grad():
        model[1].weight[1, 2] = float("nan")
    with pytest.raises(SourceError, match=r"weight '1\.weight' holds 1 values .* the first at \(1, 2\)"):
        load_source(model, **linear_inputs())
    library = tiny()
    with torch.no_grad():
        next(library.parameters())[0, 0] = float("inf")
    with pytest.raises(SourceError, match="NaN or infinite"):
        load_source(library)


def test_an_infinite_buffer_is_a_mask_and_a_nan_buffer_is_not() -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    load_source(model, **linear_inputs())
    model.register_buffer("mask", torch.tensor([0.0, float("nan")]))
    with pytest.raises(SourceError, match=r"buffer 'mask' holds 1 values .* \(1,\)"):
        load_source(model, **linear_inputs())


@pytest.mark.parametrize("library", [False, True])
def test_bfloat16_becomes_float32_in_a_copy(library: bool) -> None:
    model = (tiny() if library else nn.Linear(3, 2)).to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = load_source(model) if library else load_source(model, **linear_inputs())
    assert source.module is not model
    assert {p.dtype for p in source.module.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loaded = source.module.state_dict()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value)
        assert torch.equal(loaded[name], value.to(loaded[name].dtype))


def test_a_float32_module_is_not_copied() -> None:
    model = nn.Linear(3, 2)
    assert load_source(model, **linear_inputs()).module is model


def test_a_refused_family_says_why() -> None:
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    from moe_export.models.families import FAMILIES

    config = NllbMoeConfig(
        vocab_size=32,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        num_experts=2,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
    )
    assert FAMILIES["nllb_moe"].status == "refused"
    with pytest.raises(UnsupportedModelError) as refused:
        load_source(NllbMoeForConditionalGeneration(config))
    assert str(refused.value) == f"family nllb_moe: {FAMILIES['nllb_moe'].reason}"
    assert FAMILIES["nllb_moe"].reason


# Tasks and other arguments


def test_a_wrong_task_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown task 'text-generaton'.*text-generation"):
        load_source(nn.Linear(3, 2), task="text-generaton", **linear_inputs())
    with pytest.raises(UsageError, match="task 'text-generation' needs a transformers model"):
        load_source(nn.Linear(3, 2), task="text-generation", **linear_inputs())
    model = tiny()
    with pytest.raises(UsageError, match="task 'module' is for an own nn.Module"):
        load_source(model, task="module")
    headless = model.model
    assert load_source(headless).task == "feature-extraction"
    with pytest.raises(UsageError, match="no language-model head; use --task feature-extraction"):
        load_source(headless, task="text-generation")


def test_a_source_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="expected a folder, file.py:function or an nn.Module, got int"):
        load_source(3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "needs sample inputs"),
        ({"inputs": {"input": [1.0]}}, "expected a tensor, got list"),
        ({"inputs": {"in put": torch.ones(2, 3)}}, "is not the name of an argument"),
        ({"dynamic": {"inputs": {0: "batch"}}}, "'inputs' is not an input"),
        ({"dynamic": {"input": {2: "batch"}}}, "axis 2 of a tensor with 2 axes"),
        ({"dynamic": {"input": {0: "a batch"}}}, "expected a name like 'batch'"),
        ({"inputs": {"input": torch.ones(1, 3)}, "dynamic": {"input": {0: "batch"}}}, "has size 1 in the"),
        ({"dynamic": {"input": {0: "size", 1: "size"}}}, "different sizes need different names"),
    ],
)
def test_inputs_and_axes_that_do_not_fit_are_refused(arguments: dict[str, Any], said: str) -> None:
    if "dynamic" in arguments:
        arguments = {"inputs": {"input": torch.ones(2, 3)}, **arguments}
    with pytest.raises(UsageError, match=said):
        load_source(nn.Linear(3, 2), **arguments)


# file.py:function


def test_a_function_of_a_file_is_called(file: Path) -> None:
    source = load_source(f"{file}:build")
    assert (source.kind, source.task, source.info.path) == ("module", "module", f"{file}:build")
    assert source.dynamic == {"input": {0: "batch"}}
    assert list(load_source(f"{file}:bare", **linear_inputs()).inputs) == ["input"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("biuld", r"no function 'biuld'.*build"),
        ("GOOD", "no function 'GOOD'"),
        ("only_a_tuple", r"returns tuple of Linear, dict; expected \(module, inputs, dynamic\)"),
        ("a_number", r"returns int; expected \(module, inputs, dynamic\)"),
        ("fails", r"fails: ValueError: no weights today \(model\.py, line \d+\)"),
    ],
)
def test_a_function_that_gives_no_model_is_refused(file: Path, name: str, said: str) -> None:
    with pytest.raises(SourceError, match=said):
        load_source(f"{file}:{name}")


def test_files_that_cannot_be_imported_are_refused(file: Path) -> None:
    with pytest.raises(SourceError, match="other.py: no such file"):
        load_source(f"{file.with_name('other.py')}:build")
    with pytest.raises(SourceError, match="name the function that makes the model"):
        load_source(file)
    file.write_text("import no_such_module_at_all\n", encoding="utf-8")
    with pytest.raises(SourceError, match="cannot be imported: ModuleNotFoundError.*line 1"):
        load_source(f"{file}:build")
    file.write_text("def build(:\n", encoding="utf-8")
    with pytest.raises(SourceError, match="cannot be imported: SyntaxError"):
        load_source(f"{file}:build")


# Opsets


def test_opset_23_is_refused_wherever_it_is_asked_for() -> None:
    assert 23 not in OPSETS
    for opset in OPSETS:
        check_opset(opset)
        assert BuildConfig(opset=opset).opset == opset
    with pytest.raises(UsageError, match="opset.*RotaryEmbedding"):
        BuildConfig(opset=23)
    model = nn.Linear(3, 2)
    plan = module_graph(model, {"input": torch.ones(2, 3)}, {"input": {0: "batch"}})
    with pytest.raises(ExportError, match="opset 23 is not supported .*RotaryEmbedding.* 20, 21, 22, 24"):
        trace(plan, 23)
    with pytest.raises(ExportError, match="opset 23 is not supported"):
        export_model(model, opset=23, **linear_inputs())
    with pytest.raises(ExportError, match="opset 19 is not supported; choose one of"):
        check_opset(19)
