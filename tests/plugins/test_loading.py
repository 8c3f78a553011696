"""Finding the library, bundles with and without it, and what the library itself shows to the world."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

import moe_export
from moe_export.backends.onnxruntime.runner import create_session
from moe_export.cli.main import cli
from moe_export.errors import BundleError, EnvironmentLacksError
from moe_export.models.families import tiny_model
from moe_export.runtime.plugin import cpu_plugin_path, cpu_plugin_problem, register_cpu_plugin
from tests.ops.one_op import onnx_model

from .kernels import plugin

VARIABLE = "MOE_EXPORT_CPU_PLUGIN"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small Mixtral with GroupedMatMul nodes, as an engine for onnxruntime and as a portable one."""
    folder = tmp_path_factory.mktemp("bundles")
    paths = {target: folder / target for target in ("onnxruntime", "portable")}
    moe_export.build(
        tiny_model("mixtral"),
        paths["onnxruntime"],
        target="onnxruntime",
        expert_lowering="loop",
        verify=False,
        bench=False,
    )
    shutil.copytree(paths["onnxruntime"], paths["portable"])
    manifest = paths["portable"] / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    manifest.write_text(json.dumps({**content, "target": "portable"}), encoding="utf-8")
    return paths


def ids() -> dict[str, Any]:
    return {"input_ids": np.random.default_rng(0).integers(3, 127, (2, 9))}


def test_the_installed_library_is_found_and_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    path = plugin()
    monkeypatch.setenv(VARIABLE, str(path))
    assert cpu_plugin_path() == path.resolve()
    assert cpu_plugin_problem() == ""
    assert register_cpu_plugin(onnxruntime.SessionOptions())


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert cpu_plugin_path() is None
    assert not register_cpu_plugin(onnxruntime.SessionOptions())
    assert cpu_plugin_problem() == f"switched off by {VARIABLE}=off"


def test_a_missing_file_and_a_broken_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "absent.so"))
    with pytest.raises(EnvironmentLacksError, match="no such file; set it to the library's path or to 'off'"):
        register_cpu_plugin(onnxruntime.SessionOptions())
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv(VARIABLE, str(broken))
    with pytest.raises(EnvironmentLacksError, match="ONNX Runtime cannot load .*broken.so"):
        register_cpu_plugin(onnxruntime.SessionOptions())


def test_an_installed_library_that_cannot_be_loaded_is_a_reason_not_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "moe_export_plugins"
    (package / "cpu").mkdir(parents=True)
    (package / "cpu" / "libmoe_export_cpu.so").write_bytes(b"not a library")
    from importlib.machinery import ModuleSpec

    spec = ModuleSpec("moe_export_plugins", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: spec)
    assert not register_cpu_plugin(onnxruntime.SessionOptions())
    assert "cannot be loaded: " in cpu_plugin_problem()
    assert "install moe-export again" in cpu_plugin_problem()


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert cpu_plugin_path() is None
    assert cpu_plugin_problem().startswith("not installed; install moe-export again where a C++17")


def test_create_session_takes_the_kernels_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(plugin()))
    model = onnx_model("Dispatch", {"num_experts": 3}, {"expert_ids": "int32"}, 20)
    del model.functions[:]
    assert create_session(model.SerializeToString()).get_outputs()
    with pytest.raises(BundleError, match="Dispatch"):
        create_session(model.SerializeToString(), plugin=False)


def test_an_engine_runs_with_and_without_the_plugin(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for setting in (str(plugin()), "off"):
        monkeypatch.setenv(VARIABLE, setting)
        with moe_export.load(bundles["onnxruntime"], threads=1) as session:
            results.append(session.run(ids())["logits"])
            told = [note for note in session.notes if "CPU plugin" in note]
        assert len(told) == (setting == "off")
        if told:
            assert f"no CPU plugin (switched off by {VARIABLE}=off)" in told[0]
            assert "run by their ONNX bodies, which is slower" in told[0]
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=2e-5)


def test_routing_is_shown_and_forced_with_the_plugin(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(plugin()))
    with moe_export.load(bundles["onnxruntime"], threads=1) as session:
        shown = session.run_traced(ids())
        np.testing.assert_allclose(shown.outputs["logits"], session.run(ids())["logits"], atol=2e-5)
        forced = session.run_traced(ids(), force_routing=shown.layers)
        np.testing.assert_allclose(forced.outputs["logits"], shown.outputs["logits"], atol=2e-5)
        first = shown.layers[0]
        other = type(first)(**{**vars(first), "expert_ids": (first.expert_ids + 1) % 4})
        changed = session.run_traced(ids(), force_routing=[other, *shown.layers[1:]])
        assert np.abs(changed.outputs["logits"] - shown.outputs["logits"]).max() > 1e-3


def test_a_portable_engine_never_takes_the_plugin(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv(VARIABLE, str(broken))
    with moe_export.load(bundles["portable"], threads=1) as session:
        assert session.run_traced(ids()).layers
        assert not session.notes or "CPU plugin" not in " ".join(session.notes)
    with pytest.raises(EnvironmentLacksError, match=r"cannot load .*broken\.so"):
        moe_export.load(bundles["onnxruntime"], threads=1)


def test_the_command_line_says_that_it_runs_without(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    arguments = ["run", str(bundles["onnxruntime"]), "--prompt-ids", "5,6,7", "--max-new-tokens", "1"]
    said = CliRunner().invoke(cli, arguments)
    assert said.exit_code == 0, said.output
    assert "note: no CPU plugin (switched off" in said.stderr
    quiet = CliRunner().invoke(cli, [*arguments, "--quiet"])
    assert "CPU plugin" not in quiet.stderr


def test_few_symbols_are_exported_and_neither_onnxruntime_nor_mpi_is_linked() -> None:
    tool = subprocess.run(["nm", "--version"], capture_output=True, check=False).returncode == 0
    if not tool:
        pytest.skip("no nm")
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", str(plugin())], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in shown.splitlines()}
    assert exported == {"RegisterCustomOps", "MoeExportSetExchange", "MoeExportGetExchangeUse"}
    needed = subprocess.run(
        ["readelf", "-d", str(plugin())], capture_output=True, text=True, check=True
    ).stdout
    assert "NEEDED" in needed
    linked = [line for line in needed.splitlines() if "NEEDED" in line]
    assert not [line for line in linked if "onnxruntime" in line or "mpi" in line]


def test_the_kernels_take_every_dtype_that_the_contracts_allow() -> None:
    """Once registered, the kernel's schema overrides the function: a missing dtype would break a model."""
    from itertools import product

    from moe_export.ops import OPS

    required: dict[str, dict[str, object]] = {
        "Router": {"top_k": 1},
        "Dispatch": {"num_experts": 2},
        "ExpertMLP": {"num_experts": 2},
        "RankLoad": {"ranks": 2, "slots_per_rank": 1},
        "RankDispatch": {"ranks": 2, "slots_per_rank": 1},
        "AllReduce": {"ranks": 2},
        "AllToAll": {"ranks": 2},
    }
    no_kernel = {"ExpertMatMul", "ScaledExpertMatMul"}  # only portable models hold them
    for name, op in OPS.items():
        if name in no_kernel:
            continue
        given = [p for p in op.inputs if not p.optional]
        for dtypes in product(*(p.dtypes for p in given)):
            chosen = dict(zip((p.name for p in given), dtypes, strict=True))
            if name == "ExpertMLP" and chosen["up"] != chosen["down"]:
                continue  # Both come from one checkpoint; the kernel says so.
            attributes: dict[str, object] = {**required.get(name, {})}
            if name == "QuantizedExpertMLP":
                if chosen["up_codes"] != chosen["down_codes"]:
                    continue  # One number of bits, which goes with the dtype.
                attributes = {"num_experts": 2, "bits": 8 if chosen["up_codes"] == "int8" else 4}
            model: onnx.ModelProto = onnx_model(name, attributes, chosen, 20)
            del model.functions[:]
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            options.register_custom_ops_library(str(plugin()))
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
