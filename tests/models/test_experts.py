"""transformers' experts run as our ops, also inside a model of one's own; float16 as the library loads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_export.importer.export import hooked, moe_layer_names
from moe_export.models.experts import LAYER_ATTRIBUTE, experts_as_ops, is_experts_module
from moe_export.models.families import tiny_model
from moe_export.models.precision import as_float16, float32_names
from moe_export.models.reference import watching

torch.set_num_threads(1)


class Wrapper(nn.Module):
    """A model of one's own around a block of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.block = tiny_model("mixtral").model.layers[0].mlp  # type: ignore[union-attr,index]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def hidden() -> Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))


def test_experts_of_the_library_inside_ones_own_module() -> None:
    model = Wrapper().eval()
    config = model.block.experts.config
    before = config._experts_implementation
    with torch.no_grad():
        want = model(hidden())
        with hooked(model, None):
            assert moe_layer_names(model) == {"block.experts"}
            assert config._experts_implementation == "moe_export"
            got = model(hidden())
        with watching(model) as recorder:
            model(hidden())
    assert torch.allclose(got, want, atol=1e-6)
    assert config._experts_implementation == before
    assert [t.name for t in recorder.layers] == ["block.experts"]
    assert recorder.layers[0].expert_ids.shape == (14, 2)


def test_the_hook_is_taken_off_after_a_failure() -> None:
    model: Any = tiny_model("mixtral")
    before = model.get_experts_implementation()
    with pytest.raises(ZeroDivisionError), experts_as_ops(model):
        assert model.get_experts_implementation() != before
        raise ZeroDivisionError
    assert model.get_experts_implementation() == before
    assert not any(LAYER_ATTRIBUTE in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "switch_transformers"])
def test_the_model_computes_the_same_through_the_ops(name: str) -> None:
    model: Any = tiny_model(name)
    ids = torch.randint(3, 120, (2, 11), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if name == "switch_transformers" else {})}
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        with hooked(model, name):
            got = model(**inputs, use_cache=False).logits
    assert torch.allclose(got, want, atol=1e-5)


def test_a_model_without_experts_is_left_alone() -> None:
    model = nn.Linear(3, 3)
    with experts_as_ops(model):
        assert not is_experts_module(model)


def test_float16_keeps_what_the_family_keeps_in_float32() -> None:
    model: Any = tiny_model("deepseek_v3")
    half: Any = as_float16(model)
    bias = [n for n, _ in half.named_buffers() if n.endswith("e_score_correction_bias")]
    assert bias and {half.get_buffer(n).dtype for n in bias} == {torch.float32}
    assert set(bias) == float32_names(model)
    assert half.lm_head.weight.dtype == torch.float16
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "the model itself is not touched"


def test_what_stays_float32_beside_bfloat16() -> None:
    from moe_export.importer.export import _float32_weights

    names = _float32_weights(tiny_model("ernie4_5_moe"))
    assert "model.model.layers.1.mlp.gate.weight" in names
    assert "model.model.rotary_emb.inv_freq" in names
    assert not any(name.endswith("embed_tokens.weight") for name in names)


def test_rotary_frequencies_stay_float32() -> None:
    """Rounded to float16 they turn a position of some thousand by a radian."""
    half: Any = as_float16(tiny_model("mixtral"))
    frequencies = half.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    with torch.no_grad():
        cos, _ = half.model.rotary_emb(torch.zeros(1, 1, dtype=torch.float16), torch.tensor([[4001]]))
    want = torch.cos(4001 * frequencies.double()).to(torch.float16)
    assert torch.allclose(cos.flatten()[: want.numel()].double(), want.double(), atol=2e-3)
    logits = half(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert logits.dtype == torch.float16 and torch.isfinite(logits).all()


def test_ones_own_module_becomes_float16_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    half = as_float16(model)
    assert {t.dtype for t in half.state_dict().values() if t.is_floating_point()} == {torch.float16}
    assert model[0].weight.dtype == torch.float32
