"""Parameter accounting against the numbers that the published models state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moe_export.errors import SourceError, UnsupportedModelError
from moe_export.inspect import count_parameters, find_expert_blocks, inspect_model, inspect_path
from moe_export.inspect.summary import meta_model, read_config
from moe_export.models.families import FAMILIES

CONFIGS = json.loads((Path(__file__).parent / "published_configs.json").read_text())

# Billions: total, active, active without input embeddings; layers, E, K. The vendors state 46.7/12.9, 141/39,
# 671/37, 30.5/3.3, 20.9/3.6, 116.8/5.1 and 6.9/1.3.
PUBLISHED = {
    "Mixtral-8x7B": (46.703, 12.880, 12.749, 32, 8, 2),
    "Mixtral-8x22B": (140.621, 39.152, 38.955, 56, 8, 2),
    "DeepSeek-V3": (671.026, 37.552, 36.626, 58, 256, 8),
    "Qwen3-30B-A3B": (30.532, 3.353, 3.042, 48, 128, 8),
    "gpt-oss-20b": (20.915, 4.187, 3.608, 24, 32, 4),
    "gpt-oss-120b": (116.829, 5.712, 5.133, 36, 128, 4),
    "OLMoE-1B-7B": (6.919, 1.282, 1.179, 16, 64, 8),
}


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with only a config.json, as a model hub shows it before any download."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[request.param]))
    return tmp_path


@pytest.mark.parametrize(("folder", "name"), [(n, n) for n in PUBLISHED], indirect=["folder"])
def test_published_models(folder: Path, name: str) -> None:
    total, active, without, layers, experts, top_k = PUBLISHED[name]
    summary = inspect_path(folder)
    billions = {key: round((value or 0) / 1e9, 3) for key, value in summary.parameters.items()}
    assert billions["total"] == total
    assert billions["active"] == active
    assert billions["active_without_embeddings"] == without
    assert len(summary.moe_layers) == layers
    assert {(layer.num_experts, layer.top_k) for layer in summary.moe_layers} == {(experts, top_k)}
    assert [layer.index for layer in summary.moe_layers] == list(range(layers))
    config = CONFIGS[name]
    assert {layer.hidden_size for layer in summary.moe_layers} == {config["hidden_size"]}
    size = config.get("moe_intermediate_size", config["intermediate_size"])
    assert {layer.intermediate_size for layer in summary.moe_layers} == {size}
    assert {layer.shared_experts for layer in summary.moe_layers} == {config.get("n_shared_experts", 0)}


def _tiny_mixtral(**overrides: object) -> torch.nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    values = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4,
              "num_experts_per_tok": 1, **overrides}  # fmt: skip
    with torch.device("meta"):
        return MixtralForCausalLM(MixtralConfig(**values))


def test_tied_embeddings_count_once() -> None:
    untied, tied = (count_parameters(_tiny_mixtral(tie_word_embeddings=t)) for t in (False, True))
    assert not untied.tied_embeddings
    assert tied.tied_embeddings
    assert untied.total - tied.total == 50 * 8
    assert tied.active == untied.active - 50 * 8
    assert tied.active_without_embeddings == tied.active - 50 * 8


def test_active_by_hand() -> None:
    """Two layers, K=1 of E=4 experts with 3 matrices of 12 × 8."""
    count = count_parameters(_tiny_mixtral())
    assert count.routed_experts == 2 * 4 * 3 * 12 * 8
    assert count.active == count.total - 2 * 3 * (3 * 12 * 8)


class _Expert(torch.nn.Sequential):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__(torch.nn.Linear(hidden, inner), torch.nn.ReLU(), torch.nn.Linear(inner, hidden))


class _OwnBlock(torch.nn.Module):
    def __init__(self, experts: int, top_k: int | None) -> None:
        super().__init__()
        if top_k is not None:
            self.top_k = top_k
        self.gate = torch.nn.Linear(8, experts)
        self.experts = torch.nn.ModuleList(_Expert(8, 16) for _ in range(experts))
        self.shared_experts = torch.nn.ModuleList([_Expert(8, 16), _Expert(8, 16)])


def test_own_module_list() -> None:
    model = torch.nn.Sequential(_OwnBlock(6, 2), torch.nn.Linear(8, 8), _OwnBlock(6, 2))
    blocks = find_expert_blocks(model)
    assert [block.name for block in blocks] == ["0.experts", "2.experts"]
    assert [(b.num_experts, b.top_k, b.hidden_size, b.intermediate_size) for b in blocks] == [
        (6, 2, 8, 16)
    ] * 2
    expert = 8 * 16 + 16 + 16 * 8 + 8
    count = count_parameters(model)
    assert count.total == 2 * (8 * expert + 8 * 6 + 6) + 72
    assert count.active == count.total - 2 * 4 * expert
    assert count.active_without_embeddings == count.active


def test_registered_block_tells_where_its_experts_are() -> None:
    from moe_export.models.adapters import ADAPTERS, MoEBlockSpec, register_moe_block

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chosen = 3
            self.towers = torch.nn.ModuleList(_Expert(8, 16) for _ in range(5))

    def route(block: torch.nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("inspecting runs nothing")

    model = torch.nn.Sequential(Block())
    assert find_expert_blocks(model) == ()
    register_moe_block(Block, MoEBlockSpec("towers", route, up_proj="0", down_proj="2", top_k="chosen"))
    try:
        (block,) = find_expert_blocks(model)
    finally:
        del ADAPTERS[Block]
    assert (block.name, block.num_experts, block.top_k, block.intermediate_size) == ("0.towers", 5, 3, 16)


def test_registered_block_called_experts_is_found_once() -> None:
    from moe_export.models.adapters import ADAPTERS, MoEBlockSpec, register_moe_block

    class Block(_OwnBlock):
        pass

    def route(block: torch.nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("inspecting runs nothing")

    model = torch.nn.Sequential(Block(6, 2))
    before = count_parameters(model)
    register_moe_block(Block, MoEBlockSpec("experts", route, up_proj="0", down_proj="2", top_k=2))
    try:
        assert count_parameters(model) == before
    finally:
        del ADAPTERS[Block]


def test_experts_shared_by_two_layers_count_once() -> None:
    one, two = _OwnBlock(6, 2), _OwnBlock(6, 2)
    alone = count_parameters(torch.nn.Sequential(one, two))
    two.experts = one.experts
    shared = count_parameters(torch.nn.Sequential(one, two))
    expert = 8 * 16 + 16 + 16 * 8 + 8
    assert shared.total == alone.total - 6 * expert
    assert shared.active == alone.active - 2 * expert
    assert shared.routed_experts == 6 * expert


def test_unknown_top_k_is_said_not_guessed() -> None:
    summary = inspect_model(torch.nn.Sequential(_OwnBlock(6, None)))
    assert summary.parameters["total"] is not None
    assert summary.parameters["active"] is None
    assert summary.parameters["active_without_embeddings"] is None
    assert any("0.experts" in note and "unknown" in note for note in summary.notes)


def test_dense_model_says_so() -> None:
    summary = inspect_model(torch.nn.Linear(4, 4))
    assert summary.moe_layers == ()
    assert summary.parameters["active"] == summary.parameters["total"] == 20
    assert any("no mixture-of-experts layer" in note for note in summary.notes)


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.tiny and n != "vitpose_backbone"])
def test_every_family_has_blocks_and_top_k(name: str) -> None:
    from moe_export.models.families.tiny import model_class_of

    family = FAMILIES[name]
    cls = model_class_of(family.model_class)
    config = cls.config_class(**json.loads(json.dumps(dict(family.tiny))))
    blocks = find_expert_blocks(meta_model_of(cls, config), config)
    assert blocks
    for block in blocks:
        assert block.num_experts > 1
        assert block.top_k is not None
        assert 0 < block.top_k <= block.choices
        assert block.hidden_size
        assert block.intermediate_size
        assert block.parameters >= block.num_experts


def meta_model_of(cls: type[torch.nn.Module], config: object) -> torch.nn.Module:
    with torch.device("meta"):
        return cls(config)


def test_identity_experts_hold_no_active_weights() -> None:
    """4 experts with weights, 2 without, 3 of the 6 are chosen; the rows of the 2 are never used."""
    family = FAMILIES["longcat_flash"]
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    config = LongcatFlashConfig(**json.loads(json.dumps(dict(family.tiny))))
    block = find_expert_blocks(meta_model_of(LongcatFlashForCausalLM, config), config)[0]
    assert (block.num_experts, block.choices, block.top_k) == (4, 6, 3)
    expert = 3 * block.hidden_size * block.intermediate_size
    assert block.usable_parameters == 4 * expert
    assert block.parameters == 4 * expert + 2 * 2 * block.hidden_size * block.intermediate_size


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("{", SourceError, "not valid JSON"),
        ("[]", SourceError, "model_type"),
        ("{}", SourceError, "model_type"),
        ('{"model_type": "mixtrl"}', UnsupportedModelError, "nearest: .*mixtral"),
        ('{"model_type": "mixtral", "num_attention_heads": "many"}', SourceError, "config.json"),
        (
            '{"model_type": "mine", "auto_map": {"AutoConfig": "c.C"}}',
            UnsupportedModelError,
            "trust-remote-code",
        ),
    ],
)
def test_bad_config(tmp_path: Path, text: str, error: type[Exception], match: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=match):
        meta_model(read_config(tmp_path))


def test_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        inspect_path(tmp_path / "nothing")
    with pytest.raises(SourceError, match=r"no manifest\.json.*no config\.json"):
        inspect_path(tmp_path)
