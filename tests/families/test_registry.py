"""The registry is complete, consistent, and its tiny models are real models."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_export.errors import UnsupportedModelError
from moe_export.models.families import FAMILIES, FP32_TOLERANCE, NOT_MOE, Family, family, tiny_model

CODE_SIGNS = re.compile(
    r"use_experts_implementation|^class \w*(?:Expert|Router|MoE|Moe|SparseMLP|MixtureOf)\w*\(", re.MULTILINE
)
CONFIG_SIGNS = re.compile(r"\w*experts\w*\s*[:=\"]")


def transformers_folders() -> list[Path]:
    import transformers

    root = Path(transformers.__file__).parent / "models"
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("_"))


def looks_like_moe(folder: Path) -> bool:
    code = any(CODE_SIGNS.search(f.read_text("utf-8")) for f in folder.glob("modeling_*.py"))
    return code or any(CONFIG_SIGNS.search(f.read_text("utf-8")) for f in folder.glob("configuration_*.py"))


def test_no_family_of_transformers_is_missing() -> None:
    found = {folder.name for folder in transformers_folders() if looks_like_moe(folder)}
    assert len(found) > 60
    missing = found - set(FAMILIES) - set(NOT_MOE)
    assert not missing, f"register these families, or say in NOT_MOE why they are none: {sorted(missing)}"
    gone = (set(FAMILIES) | set(NOT_MOE)) - found
    assert not gone, f"these are no MoE families of the installed transformers: {sorted(gone)}"


def test_the_scan_sees_a_new_family(tmp_path: Path) -> None:
    (tmp_path / "modeling_new.py").write_text("class NewTopKRouter(nn.Module):\n    pass\n")
    assert looks_like_moe(tmp_path)
    (tmp_path / "modeling_new.py").write_text("class NewMLP(nn.Module):\n    pass\n")
    assert not looks_like_moe(tmp_path)
    (tmp_path / "configuration_new.py").write_text("    num_experts: int = 8\n")
    assert looks_like_moe(tmp_path)


def test_enough_families_work() -> None:
    assert sum(f.status == "works" for f in FAMILIES.values()) >= 55
    named = """mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 gpt_oss olmoe phimoe glm4_moe granitemoe
               llama4 switch_transformers jamba"""
    assert {FAMILIES[n].status for n in named.split()} == {"works"}


@pytest.mark.parametrize("name", FAMILIES)
def test_classes_exist_and_belong_to_the_family(name: str) -> None:
    import transformers

    for cls in FAMILIES[name].classes:
        assert f".models.{name}." in getattr(transformers, cls).__module__


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.status != "refused"])
def test_tiny_model_runs_and_is_random_everywhere(name: str) -> None:
    import torch

    torch.set_num_threads(1)
    for cls in FAMILIES[name].classes:
        model = tiny_model(name, model_class=cls)
        assert not model.training
        assert sum(p.numel() for p in model.parameters()) < 200_000
        for where, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.isfinite(parameter).all(), where
            assert parameter.numel() < 2 or parameter.std() > 0, f"{where} is constant"
        for where, buffer in model.named_buffers():
            assert torch.isfinite(buffer).all() or "mask" in where, where
            assert "bias" not in where or buffer.std() > 0, f"{where} is constant"
        with torch.no_grad():
            out = _run(model, seed=1)
            other = _run(model, seed=2)
        assert torch.isfinite(out).all()
        assert 1e-3 < out.std() < 100
        assert not torch.equal(out, other)


def _run(model, seed: int):
    import torch

    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "vitpose_backbone":
        pixels = torch.randn(2, 3, 64, 48, generator=generator)
        return model(pixels, dataset_index=torch.tensor([0, 2])).feature_maps[-1]
    ids = torch.randint(3, 127, (2, 13), generator=generator)
    if type(model).__name__ == "SwitchTransformersForConditionalGeneration":
        return model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
    result = model(input_ids=ids)
    return result.logits if "logits" in result else result.last_hidden_state


def test_seed_decides_the_weights() -> None:
    import torch

    first, again, other = (tiny_model("mixtral", seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_building_leaves_the_global_state_alone() -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    tiny_model("mixtral")
    assert torch.equal(torch.randn(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "qwen3_5_moe"])
def test_routing_of_a_tiny_model_varies(name: str) -> None:
    import torch

    model = tiny_model(name)
    chosen = []

    def keep(_module, arguments) -> None:
        chosen.append(arguments[1])

    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        _run(model, seed=1)
    assert chosen
    for ids in chosen:
        assert len({tuple(sorted(row)) for row in ids.tolist()}) >= 3


def test_unknown_family_names_the_nearest() -> None:
    with pytest.raises(UnsupportedModelError, match="nearest: mixtral"):
        family("mixtrall")
    with pytest.raises(UnsupportedModelError, match="choices: MixtralForCausalLM"):
        tiny_model("mixtral", model_class="MixtralModel")


def test_refused_family_gives_its_reason() -> None:
    with pytest.raises(UnsupportedModelError, match="expert ids are expected"):
        tiny_model("nllb_moe")


def test_nllb_moe_is_still_defective() -> None:
    """The reason of the refusal, proved: a token routed to expert 2 is computed by experts 0 and 1."""
    import torch
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

    torch.manual_seed(0)
    config = NllbMoeConfig(d_model=8, num_experts=4, moe_token_dropout=0.0, activation_dropout=0.0)
    experts = NllbMoeExperts(config, 16).eval()
    hidden, mask = torch.randn(1, 8), torch.tensor([[0, 0, 1, 0]])
    with torch.no_grad():
        out = experts(hidden, mask, mask.float())
        assert torch.allclose(out, experts["expert_1"](hidden), atol=1e-6)
        assert not torch.allclose(out, experts["expert_2"](hidden), atol=1e-2)


GOOD = dict(name="some_moe", status="works", routing="softmax", model_class="SomeModel", tiny={"a": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "some-moe"}, "folder of transformers"),
        ({"status": "fine"}, "status must be one of"),
        ({"routing": ""}, "routing must say"),
        ({"status": "limited"}, "states a reason"),
        ({"reason": "because"}, "states a reason"),
        ({"model_class": ""}, "needs model_class"),
        ({"tasks": ("translation",)}, "unknown task 'translation'"),
        ({"tolerance": 1e-4}, "has a reason exactly when"),
        ({"tolerance": 1e-9}, f"at least {FP32_TOLERANCE}"),
        ({"tolerance_reason": "x"}, "has a reason exactly when"),
    ],
)
def test_wrong_entries_are_rejected(change: dict, message: str) -> None:
    Family(**GOOD)
    with pytest.raises(ValueError, match=message):
        Family(**{**GOOD, **change})


def test_registry_needs_no_heavy_library() -> None:
    code = "import sys; import moe_export.models.families as f; f.family('mixtral');" \
           "print([m for m in ('torch', 'transformers', 'onnx', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
