"""A model cut to its first layers is the model's first layers, and nothing else of a checkpoint is read."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_export.errors import SourceError, UnsupportedModelError, UsageError
from moe_export.importer import first_layers as first
from moe_export.importer.checkpoint import inspect_checkpoint
from moe_export.importer.sources import load_source
from moe_export.models.families import FAMILIES
from moe_export.models.families.tiny import build_tiny
from tests.helpers import published
from tests.helpers.published import publish

DEEP: dict[str, dict[str, Any]] = {
    "mixtral": {"num_hidden_layers": 3},
    "deepseek_v3": {"num_hidden_layers": 4, "first_k_dense_replace": 2},
    "gpt_oss": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen3_next": {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "switch_transformers": {"num_layers": 5, "num_decoder_layers": 5},
}
LEFT = {"mixtral": 1, "deepseek_v3": 3, "gpt_oss": 1, "qwen3_next": 2, "switch_transformers": 3}


def deep(family: str) -> Any:
    """A tiny model of more layers than usual."""
    entry = FAMILIES[family]
    return build_tiny(dataclasses.replace(entry, tiny={**entry.tiny, **DEEP.get(family, {})}))


def stacks(model: Any) -> dict[str, int]:
    """Lists of layers of a model, and their lengths."""
    lists = {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    return {n: count for n, count in lists.items() if n.rpartition(".")[2] in ("layers", "block")}


def logits(model: Any) -> torch.Tensor:
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8, 1], [9, 3, 2, 4, 4]])}
    if model.config.is_encoder_decoder:
        ids["decoder_input_ids"] = torch.tensor([[0, 3, 4], [0, 7, 1]])
    with torch.no_grad():
        return model(**ids).logits


def shortened(model: Any, count: int) -> Any:
    """The same by hand: layers taken out of the whole model, everything else as it was."""
    model = copy.deepcopy(model)
    for name in stacks(model):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, model.get_submodule(name)[:count])
    config = model.config.get_text_config(decoder=True)
    for part in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        for key in ("num_hidden_layers", "num_layers", "num_decoder_layers"):
            if key in vars(part):
                vars(part)[key] = count
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:count]
    return model


@pytest.mark.parametrize("family", DEEP)
def test_a_cut_model_computes_what_its_first_layers_do(family: str) -> None:
    model, count = deep(family), LEFT[family]
    before = logits(model)
    cut, found = first.first_layers_of(model, count)
    assert found.count == count and found.depth == max(stacks(model).values())
    assert set(stacks(cut).values()) == {count}
    assert torch.equal(logits(cut), logits(shortened(model, count)))
    assert not torch.allclose(logits(cut), before, atol=1e-3)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", DEEP)
def test_a_folder_cut_short_is_the_same(family: str, tmp_path: Path) -> None:
    model, count = deep(family), LEFT[family]
    model.save_pretrained(tmp_path)
    loaded = load_source(tmp_path, layers=count)
    assert (loaded.info.layers, loaded.info.all_layers) == (count, found_depth(model))
    assert f"first {count} of" in loaded.info.trial
    cut = first.first_layers_of(model, count)[0]
    kept, wanted = loaded.module.state_dict(), cut.state_dict()
    assert set(kept) == set(wanted) and all(torch.equal(kept[name], wanted[name]) for name in wanted)
    # Not bit for bit: products take other paths for weights that lie otherwise in memory.
    assert torch.allclose(logits(loaded.module), logits(cut), atol=1e-5)


def found_depth(model: Any) -> int:
    return max(stacks(model).values())


def damage(folder: Path, wanted: str) -> int:
    """Make every weight whose name holds ``wanted`` NaN; returns how many there are."""
    info = inspect_checkpoint(folder)
    places = [(folder / t.shard, t.begin, t.nbytes) for name, t in info.tensors.items() if wanted in name]
    for path, begin, size in places:
        with path.open("r+b") as stream:
            stream.seek(begin)
            stream.write(b"\xff" * size)
    return len(places)


def test_weights_of_other_layers_are_not_read(tmp_path: Path) -> None:
    model = deep("mixtral")
    model.save_pretrained(tmp_path)
    sound = load_source(tmp_path, layers=2)
    assert damage(tmp_path, "layers.2.") > 3
    loaded = load_source(tmp_path, layers=2)
    assert loaded.info.hash == sound.info.hash
    assert torch.allclose(logits(loaded.module), logits(sound.module), atol=1e-5)
    with pytest.raises(SourceError, match="NaN"):
        load_source(tmp_path)
    with pytest.raises(SourceError, match="NaN"):
        load_source(tmp_path, layers=3)
    assert damage(tmp_path, "layers.1.") > 3
    with pytest.raises(SourceError, match="NaN"):
        load_source(tmp_path, layers=2)
    assert torch.isfinite(logits(load_source(tmp_path, layers=1).module)).all()


def test_the_hash_is_of_what_is_taken(tmp_path: Path) -> None:
    model = deep("mixtral")
    model.save_pretrained(tmp_path)
    hashes = {load_source(tmp_path, layers=n).info.hash for n in (1, 2, 3, None)}
    assert len(hashes) == 3  # all three layers are the whole model
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[0, 0] += 1
    model.save_pretrained(tmp_path)
    assert load_source(tmp_path, layers=1).info.hash not in hashes


def test_weights_can_stay_where_they_lie(tmp_path: Path) -> None:
    model = deep("mixtral")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = load_source(tmp_path, layers=1, hollow=True)
    assert loaded.stored is not None and loaded.info.layers == 1
    needed = first.needed_tensors(loaded.stored)
    assert needed and not [name for name in needed if "layers.1." in name or "layers.2." in name]
    shards = {loaded.stored.path(name) for name in needed}
    assert 0 < len(shards) < len(list(tmp_path.glob("*.safetensors")))


@pytest.mark.parametrize("hollow", [False, True])
def test_a_quantised_checkpoint_is_cut_too(hollow: bool, tmp_path: Path) -> None:
    model = deep("mixtral")
    model.save_pretrained(tmp_path / "source")
    publish(tmp_path / "source", tmp_path / "fp8", tmp_path / "floats", published.fp8())
    whole = load_source(tmp_path / "fp8").quantized
    loaded = load_source(tmp_path / "fp8", layers=1, hollow=hollow)
    assert whole is not None and loaded.quantized is not None
    assert loaded.quantized.tensors * 3 == whole.tensors and loaded.quantized.nbytes * 3 == whole.nbytes
    assert damage(tmp_path / "fp8", "layers.2.") > 3
    again = load_source(tmp_path / "fp8", layers=1, hollow=hollow)
    assert again.info.hash == loaded.info.hash
    if not hollow:
        floats = load_source(tmp_path / "floats", layers=1)
        assert torch.allclose(logits(again.module), logits(floats.module), atol=1e-5)


def test_all_layers_are_the_whole_model(tmp_path: Path) -> None:
    model = deep("mixtral")
    model.save_pretrained(tmp_path)
    whole, cut = load_source(tmp_path), load_source(tmp_path, layers=3)
    assert cut.info == whole.info and cut.info.trial == ""
    assert first.first_layers_of(model, 3)[0] is model


def test_layers_without_experts_are_refused() -> None:
    with pytest.raises(UsageError, match="first that has is layer 3, so ask for 3 or more"):
        first.first_layers_of(deep("deepseek_v3"), 2)


def test_more_layers_than_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="4 asked for, and the model has 3"):
        first.first_layers_of(deep("mixtral"), 4)


def test_a_model_whose_layers_look_at_their_number_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="another num_hidden_layers"):
        first.first_layers_of(deep("minimax"), 1)


def test_an_own_module_is_refused() -> None:
    with pytest.raises(UsageError, match="your own function"):
        load_source(nn.Linear(2, 2), inputs={"input": torch.ones(1, 2)}, layers=1)


class _Changed:
    """A cut that is wrong in one way; each must be found."""

    @staticmethod
    def width(model: Any) -> None:
        layer = model.model.layers[0].mlp.gate
        layer.weight = nn.Parameter(layer.weight[:, :-1])

    @staticmethod
    def attribute(model: Any) -> None:
        model.model.layers[0].mlp.top_k = 1

    @staticmethod
    def class_of_a_module(model: Any) -> None:
        model.model.layers[0].mlp = nn.Identity()

    @staticmethod
    def around(model: Any) -> None:
        model.lm_head = nn.Linear(1, 1)

    @staticmethod
    def missing(model: Any) -> None:
        del model.model.norm

    @staticmethod
    def another_number(model: Any) -> None:
        model.model.layers = model.model.layers[:1]

    @staticmethod
    def nothing_cut(model: Any) -> None:
        model.model.layers = nn.ModuleList([*model.model.layers, *deep("mixtral").model.layers[2:]])


@pytest.mark.parametrize("change", [name for name in vars(_Changed) if not name.startswith("__")])
def test_a_wrong_cut_is_found(change: str) -> None:
    whole = deep("mixtral")
    cut, _ = first.first_layers_of(whole, 2)
    first._check_same(whole, cut, 2, "mixtral")
    getattr(_Changed, change)(cut)
    with pytest.raises(UnsupportedModelError, match="cannot be taken by themselves"):
        first._check_same(whole, cut, 2, "mixtral")
