"""The hash of a live model changes with everything that changes what it computes, and with nothing else."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_export.importer.identity import library_model_hash, own_module_hash
from moe_export.importer.sources import load_source
from moe_export.models.families import tiny_model

from ..models.blocks import GatedMoE, PlainMoE, seeded

INPUTS = {"x": torch.zeros(2, 3, 6)}
DYNAMIC = {"x": {0: "batch"}}


def own(module: Any, inputs: Any = INPUTS, dynamic: Any = DYNAMIC) -> str:
    return own_module_hash(module, inputs, dynamic)


def test_the_same_module_hashes_the_same() -> None:
    assert own(seeded(GatedMoE)) == own(seeded(GatedMoE)) == own(copy.deepcopy(seeded(GatedMoE).train()))


def _weight(module: Any) -> None:
    with torch.no_grad():
        module.experts[0].down.weight[0, 0] += 1e-6


def _top_k(module: Any) -> None:
    module.top_k = 1


def _activation(module: Any) -> None:
    module.experts[0].act = torch.tanh


def _buffer(module: Any) -> None:
    module.register_buffer("scale", torch.ones(1), persistent=False)


@pytest.mark.parametrize("change", [_weight, _top_k, _activation, _buffer])
def test_what_changes_the_result_changes_the_hash(change: Callable[[Any], None]) -> None:
    module = seeded(GatedMoE)
    before = own(module)
    change(module)
    assert own(module) != before


def test_class_inputs_and_axes_are_part_of_it() -> None:
    hashes = {
        own(seeded(GatedMoE)),
        own(seeded(PlainMoE)),
        own(seeded(GatedMoE), inputs={"x": torch.zeros(2, 4, 6)}),
        own(seeded(GatedMoE), inputs={"x": torch.zeros(2, 3, 6, dtype=torch.float16)}),
        own(seeded(GatedMoE), dynamic={"x": {1: "batch"}}),
        own(seeded(GatedMoE), dynamic={"x": {0: "rows"}}),
    }
    assert len(hashes) == 6


SOURCE = """
import torch
from helper import scale


class Scaled(torch.nn.Module):
    def forward(self, x):
        return x * scale()


def build():
    return Scaled(), {"x": torch.zeros(2, 3)}, {"x": {0: "batch"}}
"""


def hash_of(folder: Path) -> str:
    """In a process of its own, so that nothing is imported already."""
    code = (
        "import sys; from moe_export.importer.sources import load_source;"
        f"print(load_source({str(folder / 'model.py') + ':build'!r}).info.hash)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.slow
def test_code_is_part_of_it_also_what_it_imports(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(SOURCE)
    (tmp_path / "helper.py").write_text("def scale():\n    return 2.0\n")
    first = hash_of(tmp_path)
    assert hash_of(tmp_path) == first
    (tmp_path / "helper.py").write_text("def scale():\n    return 3.0\n")
    second = hash_of(tmp_path)
    (tmp_path / "model.py").write_text(SOURCE.replace("x * scale()", "x + scale()"))
    assert len({first, second, hash_of(tmp_path)}) == 3


def test_a_library_model_is_its_configuration_too() -> None:
    model: Any = tiny_model("mixtral")
    before = library_model_hash(model)
    assert library_model_hash(tiny_model("mixtral")) == before
    assert library_model_hash(tiny_model("mixtral", seed=1)) != before
    model.config._name_or_path = "elsewhere"
    assert library_model_hash(model) == before
    for name, value in (("num_experts_per_tok", 1), ("rms_norm_eps", 1e-3), ("eos_token_id", 7)):
        other: Any = tiny_model("mixtral")
        setattr(other.config, name, value)
        assert library_model_hash(other) != before, name
    other = tiny_model("mixtral")
    other.generation_config.eos_token_id = [2, 5]
    assert library_model_hash(other) != before


def test_configurations_have_a_json_form_whatever_they_hold() -> None:
    model: Any = tiny_model("gpt_oss")
    json.dumps(model.config.to_dict(), default=str)
    assert library_model_hash(model) == library_model_hash(tiny_model("gpt_oss"))


def test_loaded_sources_carry_it() -> None:
    model = tiny_model("mixtral")
    assert load_source(model).info.hash == library_model_hash(model)
