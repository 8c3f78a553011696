"""What doctor reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_export.inspect import environment
from moe_export.inspect.environment import Package, examine, target_statuses


def test_this_machine() -> None:
    found = examine()
    packages = {p.name: p for p in found.packages}
    assert packages["torch"].usable
    targets = {t.name: t for t in found.targets}
    assert all(targets[name].available and not targets[name].lacks for name in ("onnxruntime", "portable"))
    assert targets["tensorrt-rtx"].builds
    if not found.gpu:
        assert not targets["tensorrt-rtx"].runs and not targets["tensorrt-rtx"].available
        assert any("an NVIDIA GPU" in text for text in targets["tensorrt-rtx"].lacks)
    assert found.cpu["usable_cores"] >= 1
    assert 0 < found.memory["available"] <= found.memory["total"]
    assert "CPUExecutionProvider" in found.execution_providers
    assert (found.cpu_plugin["path"] is None) == (found.cpu_plugin["problem"] is not None)
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_cpu_plugin_is_listed_with_its_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOE_EXPORT_CPU_PLUGIN", "off")
    off = {"path": None, "problem": "switched off by MOE_EXPORT_CPU_PLUGIN=off"}
    assert environment._cpu_plugin(Package("onnxruntime", "1", "", "")) == off
    monkeypatch.setenv("MOE_EXPORT_CPU_PLUGIN", str(tmp_path / "absent.so"))
    assert "no such file" in str(environment._cpu_plugin(Package("onnxruntime", "1", "", ""))["problem"])
    (tmp_path / "broken.so").write_bytes(b"no library")
    monkeypatch.setenv("MOE_EXPORT_CPU_PLUGIN", str(tmp_path / "broken.so"))
    assert "cannot load" in str(environment._cpu_plugin(Package("onnxruntime", "1", "", ""))["problem"])


def test_target_names_agree_everywhere() -> None:
    from moe_export.backends import BACKENDS
    from moe_export.config import TARGETS

    assert tuple(t.name for t in target_statuses()) == TARGETS == tuple(BACKENDS)


def test_missing_and_broken_packages_are_told_apart() -> None:
    missing = environment._Known("no_such_module", ("no-such-distribution",), "nothing", "pip install it")
    assert environment._package(missing, try_import=True) == Package(
        "no-such-distribution", None, "nothing", "pip install it"
    )
    broken = environment._Known("no_such_module", ("numpy",), "nothing", "pip install it")
    package = environment._package(broken, try_import=True)
    assert package.version is not None
    assert not package.usable
    assert "importing it fails" in package.problem


def test_a_target_says_what_it_lacks_and_how_to_get_it() -> None:
    packages = {
        known.module: environment._package(known, try_import=False) for known in environment._PACKAGES
    }
    packages["torch"] = Package("torch", None, "", "pip install torch")
    target = environment._target("onnxruntime", packages)
    assert (target.available, target.runs) == (False, True)
    assert target.lacks == ("torch (not installed): pip install torch",)
    packages["onnxruntime"] = Package("onnxruntime", "1.0", "", "pip install onnxruntime", "broken")
    target = environment._target("onnxruntime", packages)
    assert (target.available, target.runs) == (False, False)
    assert target.lacks[0] == "onnxruntime (broken): pip install onnxruntime"
