"""Expert weights stay where they lie: what is in memory after decoding is the experts that were reached."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_export.backends.onnxruntime.plugin import cpu_plugin_problem

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def measure(tmp_path: Path, limit: int) -> dict[str, float]:
    assert not cpu_plugin_problem()
    out = tmp_path / "memory.json"
    options = ["--weights-gib", "1", "--tokens", "2", "--limit-mib", str(limit), "--json", str(out)]
    command = [sys.executable, str(ROOT / "tools" / "bench_memory.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return result


def test_only_the_experts_that_were_reached_are_in_memory(tmp_path: Path) -> None:
    result = measure(tmp_path, 0)
    before, after = result["mapped_after_load_mib"], result["mapped_after_decode_mib"]
    assert after - before < result["experts_reached_mib"] * 1.2 < result["weights_mib"] / 2
    assert after - before > result["experts_reached_mib"] * 0.8, "the weights were read from somewhere else"
    assert result["private_after_decode_mib"] < 100, "weights were copied"


def test_a_model_larger_than_the_memory_limit_runs(tmp_path: Path) -> None:
    result = measure(tmp_path, 256)
    assert result["weights_mib"] > 4 * result["limit_mib"]
    assert result["experts_reached_mib"] > result["limit_mib"]
    assert result["private_after_decode_mib"] + result["mapped_after_decode_mib"] <= result["limit_mib"] * 1.1
