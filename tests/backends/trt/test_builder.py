"""The builder in its child process, with the real TensorRT-RTX: plans, what is read back, and every way to
fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from moe_export.backends.trt import build_engine
from moe_export.backends.trt.child import run_builder
from moe_export.backends.trt.library import library_problem, make_link_folder
from moe_export.errors import BuildError, EnvironmentLacksError
from moe_export.sms import FIRST_SM, sms_of
from tests.backends.trt.small import recipe, write_network
from tests.helpers.processes import has_ended


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_plans_for_three_sms(tmp_path: Path, dtype: str) -> None:
    write_network(tmp_path, dtype)
    engines = run_builder(recipe([80, 89, 120], dtype), tmp_path)
    assert [e.sm for e in engines] == [80, 89, 120]
    for engine in engines:
        assert (tmp_path / engine.file).stat().st_size > 1000
        assert (engine.library, engine.driver, engine.profiles) == ("tensorrt_rtx", "580", ("all",))
        assert engine.layers == sum(engine.layer_kinds.values()) > 0
        assert engine.weight_bytes >= 16 * 8 * (4 if dtype == "float32" else 2)
        assert engine.build_seconds > 0
        listed = json.loads((tmp_path / "evidence" / f"{engine.file}.layers.json").read_text())
        assert len(listed) == engine.layers and {"name", "kind", "onnx"} == set(listed[0])
        assert any(layer["onnx"] for layer in listed)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_table_of_sms_and_dtypes_is_what_tensorrt_says(tmp_path: Path, dtype: str) -> None:
    first = FIRST_SM["tensorrt-rtx"][dtype]
    takes = [sm for sm in sms_of("tensorrt-rtx") if sm >= first]
    write_network(tmp_path, dtype)
    assert [e.sm for e in run_builder(recipe(takes, dtype), tmp_path)] == takes
    for sm in set(sms_of("tensorrt-rtx")) - set(takes):
        with pytest.raises(BuildError, match=f"no plan for SM{sm}: .*Cannot compile"):
            run_builder(recipe([sm], dtype), tmp_path)


def test_a_profile_of_ten_times_the_rows_takes_more_memory(tmp_path: Path) -> None:
    write_network(tmp_path)
    small, large = recipe([89]), recipe([89])
    large["profiles"][0]["shapes"]["x"][2] = [64000, 16]
    (few,), (many,) = run_builder(small, tmp_path), run_builder(large, tmp_path)
    assert many.activation_bytes >= few.activation_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": [{"name": "z", "dtype": "float32", "shape": ["rows", 16]}]}, "inputs .* differ .* x, z"),
        ({"outputs": [{"name": "y", "dtype": "float16", "shape": ["rows", 8]}]}, "outputs .* differ .* y"),
        ({"profiles": [{"name": "p", "shapes": {"x": [[9, 16], [4, 16], [1, 16]]}}]}, "."),
        ({"model": "absent.onnx"}, "parser refuses absent.onnx"),
        ({"plugins": ["no_such_module_of_mine"], "kernels": "k"}, "plugin no_such_module_of_mine"),
    ],
)
def test_what_tensorrt_refuses_is_a_build_error(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_network(tmp_path)
    with pytest.raises(BuildError, match=message):
        run_builder({**recipe([89]), **change}, tmp_path)
    assert not list(tmp_path.glob("*.plan*"))


def test_an_op_that_tensorrt_lacks_is_named(tmp_path: Path) -> None:
    write_network(tmp_path, op="NoSuchOperator")
    with pytest.raises(BuildError, match=r"parser refuses model.onnx: .*NoSuchOperator"):
        run_builder(recipe([80]), tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys; print('last cry', file=sys.stderr, flush=True); os.abort()", "SIGABRT.*last cry"),
        ("os.kill(os.getpid(), 9)", "was killed, most likely for lack of memory .* GiB"),
        ("os._exit(7)", "exit code 7"),
    ],
)
def test_a_builder_that_dies_takes_nobody_with_it(tmp_path: Path, body: str, message: str) -> None:
    write_network(tmp_path)
    (tmp_path / "dies.py").write_text(f"import os\ndef register(trt, kernels):\n    {body}\n")
    with pytest.raises(BuildError, match=message):
        run_builder(recipe([89], plugins=["dies.py"], kernels="k"), tmp_path)


SLEEPER = """
import os, time
def register(trt, kernels):
    open({note!r}, "w").write(str(os.getpid()))
    time.sleep(120)
"""
BUILD = """
import shutil
from moe_export.backends.trt.child import run_builder
from moe_export.bundle import BundleWriter
from tests.backends.trt.small import recipe
with BundleWriter("out") as writer:
    for name in ("model.onnx", "sleeps.py"):
        shutil.copyfile(name, writer.path / name)
    run_builder(recipe([89], plugins=["sleeps.py"], kernels="k"), writer.path)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the child on Linux only")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_build_leaves_no_builder_and_no_bundle(tmp_path: Path, number: signal.Signals) -> None:
    write_network(tmp_path)
    note = tmp_path / "child.pid"
    (tmp_path / "sleeps.py").write_text(SLEEPER.format(note=str(note)))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    parent = subprocess.Popen([sys.executable, "-c", BUILD], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    child = int(note.read_text())
    parent.send_signal(number)
    parent.wait()
    assert has_ended(child, within=60)
    assert not (tmp_path / "out").exists()
    if number == signal.SIGTERM:
        assert not list(tmp_path.glob(".out.partial*")), "what SIGKILL leaves, the next build removes"


def test_the_link_folder_gives_the_wheels_libraries_their_bare_names(tmp_path: Path) -> None:
    environment = make_link_folder("tensorrt_rtx", tmp_path)
    if sys.platform == "linux":
        link = tmp_path / "libtensorrt_rtx.so"
        assert link.is_symlink() and link.resolve().name.startswith("libtensorrt_rtx.so.")
        assert environment["LD_LIBRARY_PATH"].split(os.pathsep)[0] == str(tmp_path)
        assert not (link.resolve().parent / "libtensorrt_rtx.so").exists(), "nothing goes into site-packages"
    assert (
        "LD_LIBRARY_PATH" not in make_link_folder("no_such_library", tmp_path)
        or "LD_LIBRARY_PATH" in os.environ
    )


@pytest.mark.parametrize(
    ("library", "version", "message"),
    [
        ("tensorrt", "10.14.1.48", "10.14 is broken; install 10.15 or later"),
        ("tensorrt", "10.13.0", "too old; 10.15 or later is needed"),
        ("tensorrt", "10.15.1", ""),
        ("tensorrt", "11.4.0.106", ""),
        ("tensorrt_rtx", "1.7.1.116", ""),
        ("tensorrt_rtx", "1.2.0.54", "too old; 1.7 or later"),
        ("tensorrt_rtx", "nightly", "not a version"),
    ],
)
def test_versions(library: str, version: str, message: str) -> None:
    fault = build_engine.version_fault(library, version)
    assert message in fault and bool(fault) == bool(message)


def test_standard_tensorrt_that_is_missing_is_told_with_the_command(tmp_path: Path) -> None:
    if not library_problem("tensorrt"):
        pytest.skip("TensorRT is installed")
    assert "pip install 'moe-export[tensorrt]'" in library_problem("tensorrt")
    write_network(tmp_path)
    with pytest.raises(EnvironmentLacksError, match="tensorrt cannot be imported.*pip install tensorrt-cu13"):
        run_builder(recipe([89], library="tensorrt"), tmp_path)


def test_a_plan_with_fewer_profiles_says_why(tmp_path: Path) -> None:
    """In the place of the real builder one that fails under two profiles, as some versions do."""
    library = pytest.importorskip("tensorrt_rtx")

    class OneProfile(library.Builder):  # type: ignore[misc]  # of a package without types
        def build_serialized_network(self, network: Any, config: Any) -> Any:
            if config.num_optimization_profiles > 1:
                return None
            return super().build_serialized_network(network, config)

    trt = types.SimpleNamespace(**{**vars(library), "Builder": OneProfile})
    write_network(tmp_path)
    wanted = recipe([89])
    wanted["profiles"] = [{"name": "few", "shapes": {"x": [[1, 16], [1, 16], [1, 16]]}}, *wanted["profiles"]]
    (engine,) = build_engine.build(wanted, tmp_path, trt, [89])
    assert engine["profiles"] == ["all"]
    assert engine["fewer_profiles"] == "no plan with few, all: TensorRT gave no reason"
    empty = {"files": [], "engines": [], "notes": ["no finished engine: the plans for SM89", "another"]}
    (tmp_path / "manifest.json").write_text(json.dumps(empty))
    build_engine.finish_manifest(tmp_path, wanted, [engine])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["state"] == "ready" and manifest["notes"][0] == "another"
    assert manifest["notes"][-1].startswith("SM89: the plan has profile all only: no plan with few, all")
