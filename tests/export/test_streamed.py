"""Weights read one by one and written anew: the same engine as the loaded model's, in less memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

from moe_export import build
from moe_export.backends.onnxruntime.plugin import cpu_plugin_problem
from moe_export.importer import hollow, streamed
from tests.export.test_by_reference import saved
from tests.helpers.tools import tool


def numbers(folder: Path) -> dict[str, np.ndarray]:
    """Every weight of a bundle by dtype, shape and bytes: names differ by how the graph came about."""
    model = onnx.load(folder / "model.onnx")
    held = {}
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        held[f"{array.dtype} {array.shape} {hash(array.tobytes())}"] = array
    return held


def built(source: Path, output: Path, weights: str, **options: Any) -> list[str]:
    bundle = build(
        source, output, target="onnxruntime", verify=False, bench=False, weights=weights, **options
    )
    return [n for n in bundle.manifest.notes if n.startswith("weights: ")]


@pytest.mark.parametrize(
    ("family", "layers", "stored", "options"),
    [
        ("mixtral", 4, torch.bfloat16, {}),
        pytest.param(
            "mixtral", 2, torch.float32, {"dtype": "bfloat16", "expert_lowering": "unrolled"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "deepseek_v3", 7, torch.bfloat16, {"expert_weights": "as-is"},
            marks=(pytest.mark.slow, pytest.mark.nightly),
        ),
        pytest.param(
            "gpt_oss", 6, torch.float32, {"dtype": "bfloat16"},
            marks=(pytest.mark.slow, pytest.mark.nightly),
        ),
        pytest.param("mixtral", 2, torch.bfloat16, {"quantize": "int8"}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_streamed_engine_is_the_loaded_one(
    family: str,
    layers: int,
    stored: torch.dtype,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hollow, "SMALL", 1024)
    monkeypatch.setattr(streamed, "INLINE", 1024)
    saved(family, tmp_path / "source", stored, layers)
    notes = built(tmp_path / "source", tmp_path / "streamed", "stream", **options)
    assert notes == ["weights: read from the checkpoint one by one and written anew"]
    assert built(tmp_path / "source", tmp_path / "loaded", "load", **options) == []
    got, wanted = numbers(tmp_path / "streamed"), numbers(tmp_path / "loaded")
    assert set(got) == set(wanted)
    assert sum(array.nbytes for array in got.values()) > 10_000
    files = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("streamed", "loaded")]
    assert files[0] == files[1]


CONFIG = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 1024,
    "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 6, "num_attention_heads": 16,
    "num_key_value_heads": 4, "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
"""1.06 GB in bfloat16, 2.1 GB in float32; an expert's matrices take 44 MB in float32, a layer's 352 MB."""
CHILD = """
import json, sys
from contextlib import contextmanager
import onnx, onnxruntime, onnxscript, psutil, torch.onnx, transformers
from moe_export import build
from moe_export.process_memory import peak_rss_bytes, reset_peak
assert transformers.MixtralForCausalLM
found = {}
class Watch:
    @contextmanager
    def stage(self, name, total=None):
        if name.startswith("lower"):
            found["whole"] = peak_rss_bytes()
            found["before"] = psutil.Process().memory_info().rss
            assert reset_peak()
        yield lambda count: None
        if name.startswith("lower"):
            found["lower"] = peak_rss_bytes() - found["before"]
    def note(self, text):
        pass
libraries = peak_rss_bytes()
build(sys.argv[1], sys.argv[2], target="onnxruntime", verify=False, bench=False, weights=sys.argv[3],
      ep=int(sys.argv[4]), progress=Watch())
whole = max(found["whole"], peak_rss_bytes())
print(json.dumps([whole - libraries, found["before"] - libraries, found["lower"]]))
"""


def memory(source: Path, output: Path, weights: str, ranks: int = 1) -> tuple[int, int, int]:
    """Bytes above the libraries: the peak of a build, what it holds before it lowers the graph; and how much
    lowering and writing add to that."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(output), weights, str(ranks)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    peak, held, added = json.loads(done.stdout.splitlines()[-1])
    return int(peak), int(held), int(added)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_build_holds_no_more_than_its_way_needs(tmp_path: Path) -> None:
    """Streamed: one matrix. Loaded: the source's weights in float32, and nothing of the target's layout."""
    weights = 2 * tool("synthetic_checkpoint").write_checkpoint(tmp_path / "source", CONFIG)
    assert weights > 2_000_000_000
    layer = 8 * 3 * 1024 * 3584 * 4
    peak, held, added = memory(tmp_path / "source", tmp_path / "streamed", "stream")
    assert peak < weights / 4 and held < layer and added < layer, (peak, held, added)
    if not cpu_plugin_problem():
        # Four ranks, one after the other: no more than one, and less than the weights of a rank.
        peak, held, added = memory(tmp_path / "source", tmp_path / "ranks", "stream", ranks=4)
        assert peak < weights / 4 and held < layer and added < layer, (peak, held, added)
        sizes = [(tmp_path / "ranks" / f"rank{r}" / "model.onnx.data").stat().st_size for r in range(4)]
        assert len(set(sizes)) == 1 and sizes[0] < weights / 3
    peak, held, added = memory(tmp_path / "source", tmp_path / "loaded", "load")
    assert weights < held < weights + layer and added < layer, (peak, held, added)
    a, b = ((tmp_path / n / "model.onnx.data").stat().st_size for n in ("streamed", "loaded"))
    assert a == b > weights - 10_000_000


def test_numbers_that_differ_are_seen(tmp_path: Path) -> None:
    one = onnx.helper.make_model(
        onnx.helper.make_graph([], "g", [], [], [onnx.numpy_helper.from_array(np.ones(3, np.float32), "a")])
    )
    other = onnx.helper.make_model(
        onnx.helper.make_graph(
            [], "g", [], [], [onnx.numpy_helper.from_array(np.ones(3, ml_dtypes.bfloat16), "a")]
        )
    )
    for name, model in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        onnx.save(model, tmp_path / name / "model.onnx")
    assert set(numbers(tmp_path / "one")) != set(numbers(tmp_path / "other"))
