"""Whole models for TensorRT-RTX: lowered, built for three SMs without a GPU, simulated and compared. Slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moe_export
from moe_export.models.families import tiny_model
from moe_export.verify import verify_bundle

pytest.importorskip("tensorrt_rtx", reason="pip install 'moe-export[tensorrt-rtx]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMS = (80, 89, 120)
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "byte-mixtral"


def built(source: Any, folder: Path, **options: Any) -> Any:
    options = {"max_batch": 3, "max_sequence": 64, "bench": False, "threads": 1, **options}
    return moe_export.build(source, folder, target="tensorrt-rtx", **options)


def lowerings(bundle: Any) -> set[str]:
    return {d.choice.split(" ")[1] for d in bundle.manifest.decisions if d.choice.startswith("native: ")}


def check(bundle: Any, sms: tuple[int, ...]) -> None:
    """Every plan is there, and the build itself simulated the graph and found it right."""
    manifest = bundle.manifest
    assert manifest.state == "ready" and manifest.sm == sms == tuple(e.sm for e in manifest.engines)
    for engine in manifest.engines:
        assert (bundle.path / engine.file).stat().st_size > engine.weight_bytes
    parity = manifest.evidence["parity"]
    assert parity["passed"] is True and parity["simulated"] is True and parity["routed_tokens"] > 0


def test_the_example(tmp_path: Path) -> None:
    bundle = built(EXAMPLE, tmp_path / "bundle", sm=SMS, max_sequence=128)
    check(bundle, SMS)
    assert lowerings(bundle) == {"gather"}
    roles = {spec.role for spec in (*bundle.manifest.io.inputs, *bundle.manifest.io.outputs)}
    assert {"capacity", "load"} <= roles
    golden = tmp_path / "golden.npz"
    assert verify_bundle(bundle.path, against=EXAMPLE, simulate=True, save_golden=golden, threads=1).passed
    assert verify_bundle(bundle.path, against=golden, simulate=True, threads=1).passed


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "qwen3_moe"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Groups of experts and a selection bias; clamped SwiGLU with biases; many experts per token."""
    check(built(tiny_model(family), tmp_path / "bundle", sm=(89,)), (89,))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision(dtype: str, tmp_path: Path) -> None:
    check(built(EXAMPLE, tmp_path / "bundle", sm=(120,), dtype=dtype), (120,))
