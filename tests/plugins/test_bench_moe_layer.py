"""The layer benchmark: its inputs, its check of every contestant, and short runs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
DIFFERENT = "eager,expert-loop,onnxruntime-moe,openvino,plugin-packed,plugin-unpacked"


@pytest.fixture(scope="module", autouse=True)
def tools_on_path() -> Any:
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


@pytest.mark.parametrize("routing", ["uniform", "zipf", "one-hot"])
def test_logits_choose_the_forced_experts(routing: str) -> None:
    from moe_layer import SHAPES, Layer

    from moe_export.ops import OPS

    layer = Layer(SHAPES["tiny"], "float32")
    inputs = layer.inputs(33, routing)
    _, ids = OPS["Router"].reference(inputs.logits, top_k=2, renormalize=1)
    np.testing.assert_array_equal(ids, inputs.ids)
    assert inputs.expected.shape == (len(inputs.checked), 64)
    assert inputs.checked[0] == 0 and inputs.checked[-1] == 32
    if routing == "one-hot":
        assert inputs.active == 2


BROKEN: list[Callable[[Any], Any]] = [
    lambda y: 2 * y,
    lambda y: 0 * y,
    lambda y: y[::-1],
    lambda y: y * np.nan,
    lambda y: y[:-1],
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("broken", BROKEN)
def test_a_wrong_result_is_seen_at_every_dtype(broken: Any, dtype: str) -> None:
    from moe_layer import SHAPES, Layer
    from moe_layer_contestants import problem

    inputs = Layer(SHAPES["tiny"], "float32").inputs(5, "uniform")
    right = inputs.expected.astype(np.float32)
    assert problem(right, inputs, dtype) == ""
    assert problem(np.ascontiguousarray(broken(right)), inputs, dtype)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_missing_expert_is_more_than_quantisation_may_cost(kind: str) -> None:
    from moe_layer import SHAPES, Layer
    from moe_layer_contestants import problem

    from moe_export.ops.quantization import dequantize

    layer = Layer(SHAPES["tiny"], "float32")
    inputs = layer.inputs(9, "uniform")
    up, down = (dequantize(q) for q in layer.quantized(kind))
    layer.up, layer.down = up.astype(np.float32), down.astype(np.float32)
    assert problem(layer.reference(inputs.hidden, inputs.logits), inputs, kind) == ""
    layer.down[inputs.ids[0, 0]] = 0
    assert problem(layer.reference(inputs.hidden, inputs.logits), inputs, kind)


def test_wrong_and_failing_contestants_are_left_out_with_a_line() -> None:
    from bench_moe_layer import Failure, checked
    from moe_layer import SHAPES, Layer
    from moe_layer_report import Entry

    inputs = Layer(SHAPES["tiny"], "float32").inputs(5, "uniform")
    right = inputs.expected.astype(np.float32)

    class Fixed:
        def __init__(self, run: Callable[[], Any]) -> None:
            self.run = run

        def make(self, _name: str, _inputs: Any, _threads: int) -> Callable[[], Any]:
            return self.run

    entry = Entry("eager", "float32", 1, "uniform")
    checked(entry, Fixed(lambda: right), inputs)  # type: ignore[arg-type]  # one method is all it needs
    with pytest.raises(Failure, match="wrong result"):
        checked(entry, Fixed(lambda: 2 * right), inputs)  # type: ignore[arg-type]
    with pytest.raises(Failure, match="ZeroDivisionError"):
        checked(entry, Fixed(lambda: 1 // 0), inputs)  # type: ignore[arg-type]


def run(tmp_path: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    from bench_moe_layer import main

    out = tmp_path / "rows.json"
    base = ["--shape", "tiny", "--rounds", "1", "--tries", "1", "--json", str(out), "--folder", str(tmp_path)]
    code = main([*base, *arguments])
    return code, json.loads(out.read_text())


def test_a_short_run_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = run(tmp_path, "--tokens", "1,9", "--threads", "1", "--contestants", DIFFERENT)
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert {row["tokens"] for row in rows} == {1, 9}
    assert {row["shape"] for row in rows} == {"tiny"}
    names = {row["contestant"] for row in rows}
    assert {"eager", "expert-loop", "onnxruntime-moe"} <= names
    for name in ("openvino", "plugin-packed", "plugin-unpacked"):
        assert name in names or f"{name}, 1 threads: left out" in printed
    if importlib.util.find_spec("openvino") is not None:
        assert "openvino" in names
    for row in rows:
        assert row["median_ms"] > 0 and row["ratio_to_best_other"] > 0 and row["dtype"] == "float32"
        assert row["ratio_to_eager"] > 0 and row["low_ms"] <= row["median_ms"] <= row["high_ms"]
    assert "reads" in printed and "SGEMM" in printed


def test_dtypes_threads_and_routings_share_one_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--tokens", "5", "--threads", "1,2", "--dtypes", "float32,bfloat16", "--markdown"]
    arguments += ["--routing", "uniform,zipf,one-hot", "--contestants", "eager,grouped_mm,expert-loop"]
    code, rows = run(tmp_path, *arguments)
    assert code == 0
    found = {(r["contestant"], r["dtype"], r["threads"], r["routing"]) for r in rows}
    assert ("dense", "bfloat16", 2, "one-hot") in found
    assert ("dense", "float32", 1, "zipf") not in found
    # Two contestants in both dtypes, one in float32, three routings; dense with one-hot in both dtypes.
    assert len(rows) == 2 * ((2 * 2 + 1) * 3 + 2)
    for row in rows:
        assert (row["ratio_to_dense"] is None) == (
            row["routing"] != "one-hot" or row["contestant"] == "dense"
        )
        assert (row["ratio_to_float32"] is None) == (row["dtype"] == "float32")
        assert (row["ratio_to_one_thread"] is None) == (row["threads"] == 1)
    out = capsys.readouterr().out
    assert "expert-loop, 1 threads: left out: ONNX Runtime's CPU kernels multiply no bfloat16" in out
    assert "| contestant | dtype | threads | routing | tiny 5 |" in out


def test_quantised_contestants_are_judged_against_float32_eager(tmp_path: Path) -> None:
    code, rows = run(
        tmp_path, "--tokens", "3", "--threads", "1", "--contestants", "eager,expert-loop,qmoe-int8,qmoe-int4"
    )
    assert code == 0
    by_name = {row["contestant"]: row for row in rows}
    assert by_name["qmoe-int4"]["dtype"] == "int4"
    assert by_name["qmoe-int4"]["ratio_to_eager"] > 0
    assert by_name["qmoe-int4"]["ratio_to_best_other"] is None
    eager, loop = by_name["eager"]["median_ms"], by_name["expert-loop"]["median_ms"]
    assert by_name["expert-loop"]["ratio_to_best_other"] == pytest.approx(eager / loop, rel=1e-2)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_plugins_quantised_op_takes_part(kind: str, tmp_path: Path) -> None:
    from .kernels import plugin

    plugin()
    code, rows = run(tmp_path, "--tokens", "3", "--threads", "1", "--contestants", f"eager,plugin-{kind}")
    assert code == 0
    assert {row["dtype"] for row in rows} == {"float32", kind}


def test_rivals_are_other_libraries_under_equal_conditions() -> None:
    from moe_layer_report import Entry, _rivals

    packed = Entry("plugin-packed", "float32", 2, "uniform")
    assert _rivals(packed, replace(packed, contestant="eager"))
    assert not _rivals(packed, replace(packed, contestant="plugin-unpacked"))
    assert not _rivals(packed, replace(packed, contestant="qmoe-int8"))
    for other in ({"threads": 1}, {"routing": "zipf"}, {"layer_dtype": "bfloat16"}, {"contestant": "dense"}):
        assert not _rivals(packed, replace(packed, **{"contestant": "eager"} | other))
    quantised = replace(packed, contestant="plugin-int8")
    assert _rivals(quantised, replace(packed, contestant="qmoe-int8"))


def test_without_ggml_a_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_layer import LeftOut
    from moe_layer_ggml import library_folder

    monkeypatch.delenv("MOE_EXPORT_GGML", raising=False)
    with pytest.raises(LeftOut, match="no libggml-base and libggml-cpu there"):
        library_folder(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(LeftOut, match="pip install ggml-python"):
        library_folder()


def test_ggml_takes_part_where_it_is(tmp_path: Path) -> None:
    from moe_layer import LeftOut
    from moe_layer_ggml import library_folder

    try:
        folder = library_folder()
    except LeftOut as reason:
        pytest.skip(str(reason))
    arguments = ["--tokens", "1,9", "--threads", "1", "--dtypes", "float32,bfloat16"]
    code, rows = run(tmp_path, *arguments, "--contestants", "eager,ggml", "--ggml", str(folder))
    assert code == 0
    assert len([row for row in rows if row["contestant"] == "ggml"]) == 4


def test_every_topic_has_valid_options() -> None:
    from bench_moe_layer import TOPICS, _parse

    for topic in TOPICS:
        options = _parse(["--topic", topic, "--rounds", "1"])
        assert options.markdown and options.rounds == 1


def test_unknown_contestants_and_shapes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from bench_moe_layer import main

    for arguments in (
        ["--shape", "D"],
        ["--contestants", "mine"],
        ["--tokens", "0"],
        ["--rounds", "0"],
        ["--threads", "0"],
        ["--dtypes", "int8"],
        ["--json", "no/such/folder/rows.json"],
        ["--folder", "no/such/folder"],
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "expected" in capsys.readouterr().err
