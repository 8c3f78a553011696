"""Expert weights of every form stay where they lie: what is in memory after decoding is the experts that were
reached."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_export.backends.onnxruntime.plugin import cpu_plugin_problem

ROOT = Path(__file__).parents[2]

COMMAND = [sys.executable, str(ROOT / "tools" / "bench_memory.py")]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


WEIGHTS = (
    "float32",
    "int4",
    *(pytest.param(name, marks=pytest.mark.nightly) for name in ("float16", "bfloat16", "int8")),
)


def measure(tmp_path: Path, weights: str, limit: int) -> dict[str, float]:
    assert not cpu_plugin_problem()
    out = tmp_path / "memory.json"
    options = ["--weights", weights, "--weights-gib", "1.1", "--tokens", "3"]
    options += ["--limit-mib", str(limit), "--json", str(out)]
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return result


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
def test_only_the_experts_that_were_reached_are_in_memory(weights: str, tmp_path: Path) -> None:
    result = measure(tmp_path, weights, 0)
    mapped = result["mapped_after_decode_mib"] - result["mapped_after_load_mib"]
    assert mapped < result["experts_reached_mib"] * 1.05 < result["weights_mib"] / 2
    assert mapped > result["experts_reached_mib"] * 0.95, "the weights were read from somewhere else"
    assert result["private_after_load_mib"] < 60, "weights were copied at load"
    # An expert of 4 bits has 5 MiB.
    assert result["private_after_decode_mib"] - result["private_after_load_mib"] < 5, "weights were copied"


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_model_larger_than_the_memory_limit_runs(weights: str, tmp_path: Path) -> None:
    result = measure(tmp_path, weights, 256)
    assert result["weights_mib"] > 4 * result["limit_mib"]
    assert result["experts_reached_mib"] > result["limit_mib"]
    assert result["private_after_decode_mib"] + result["mapped_after_decode_mib"] <= result["limit_mib"] * 1.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "int3"], "invalid choice: 'int3'"),
        (["--tokens", "0"], "whole numbers of 1 or more"),
        (["--limit-mib", "-1"], "--limit-mib of 0 or more"),
        (["--weights-gib", "nan"], "--weights-gib above 0"),
        (["--json", "no/such/folder/out.json"], "expected a file in a folder that exists"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(options: list[str], message: str) -> None:
    done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
