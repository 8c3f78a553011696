"""GPU acceptance without a GPU: what it lists and skips, and that checks tell right numbers from wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_export.costs.tiles import Tile
from moe_export.errors import MoeExportError
from tests.helpers.tools import TOOLS, tool

from ..plugins.gpu.memory_launcher import MemoryLauncher, stand_in_library

acceptance_gpu = tool("acceptance_gpu")
acceptance_plans = tool("acceptance_plans")
gpu_acceptance = tool("gpu_acceptance")
Machine = tool("acceptance_core").Machine

HAS = {"gpu": "one", "triton": "3.9", "cuda": "13", "tensorrt": "11.4", "tensorrt_rtx": "1.7"}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_acceptance, "find_gpus", dict)


def test_without_a_gpu_everything_is_skipped_with_its_reason(
    no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_acceptance.main(["--output", str(tmp_path)]) == 3
    data = json.loads((tmp_path / "acceptance.json").read_text())
    assert data["exit_code"] == 3 and {c["status"] for c in data["checks"]} == {"skipped"}
    names = [c["name"] for c in data["checks"]]
    assert names[:4] == ["marshalling", "shared-memory", "tensor-cores", "bare-plan"]
    assert {"tensorrt-rtx/plugin/float16/sm89", "tensorrt/native/bfloat16/sm90"} <= set(names)
    assert all("no NVIDIA GPU" in c["reason"] for c in data["checks"])
    told = capsys.readouterr().out
    assert f"{len(names)} skipped" in told and all(f"{n}: skipped" in told for n in names)
    text = (tmp_path / "acceptance.md").read_text()
    assert "## Skipped: nothing is shown for these" in text


def test_the_command_as_users_call_it(tmp_path: Path) -> None:
    line = [sys.executable, str(TOOLS / "gpu_acceptance.py"), "--output", str(tmp_path)]
    done = subprocess.run([*line, "--list"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("marshalling") and not list(tmp_path.iterdir())
    done = subprocess.run([*line, "--only", "marshalls"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "unknown check 'marshalls'; nearest: marshalling" in done.stderr


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--sm", "abc"), "'abc'; expected SMs with commas between, such as 80,89"),
        (("--sm", "89,"), "'89,'; expected SMs"),
        (("--sm", "89,70"), "no check is for SM70 here; choices: 75, 80, 86"),
        (("--only", "marshalling,"), "unknown check ''"),
        (("--min-speedup", "nan"), "'nan'; expected a number above 0"),
        (("--min-speedup", "-1"), "'-1'; expected a number above 0"),
        (("--source", "nowhere/model"), "--source nowhere/model: there is no such file or folder"),
        (("--output", "{here}/file/folder"), "/file/folder: Not a directory"),
    ],
)
def test_wrong_use_is_told_before_anything_runs(
    given: tuple[str, str], told: str, no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    words = [word.format(here=tmp_path) for word in given]
    try:
        code: object = gpu_acceptance.main(["--output", str(tmp_path / "report"), *words])
    except SystemExit as refused:
        code = refused.code
    printed = capsys.readouterr()
    assert code == 2 and told in printed.err and not printed.out
    assert not (tmp_path / "report").exists()


def test_checks_of_a_machine_with_two_kinds_of_gpu() -> None:
    checks = gpu_acceptance.all_checks(Machine(HAS, {}, (89, 120)), "SOURCE", 1.5)
    names = {c.name for c in checks}
    assert {"marshalling/sm89", "marshalling/sm120", "tensorrt-rtx/plugin/float32/sm120"} <= names
    assert {c.sm for c in checks} == {89, 120}
    one = next(c for c in checks if c.name == "tensorrt/plugin/bfloat16/sm89")
    assert one.command[-6:] == ("tensorrt", "plugin", "bfloat16", "89", "SOURCE", "1.5")
    assert set(one.needs) == {"gpu", "cuda", "tensorrt", "triton"}
    # No engine of RTX for an SM that it has none for.
    only = gpu_acceptance.all_checks(Machine(HAS, {}, (90,)), "SOURCE", 1.0)
    assert not any(c.name.startswith("tensorrt-rtx") for c in only)


def test_ranks_need_two_gpus_of_an_sm() -> None:
    core = tool("acceptance_core")
    assert core.rank_gpus(89, [80, 89, 120, 89, 89]) == (1, 3) and core.rank_gpus(80, [80, 89]) == ()
    checks = gpu_acceptance.all_checks(Machine(HAS, {}, (75, 89)), "SOURCE", 1.0)
    ranks = [c for c in checks if c.name.startswith("ranks/")]
    modes = [f"{name}/{mode}" for name in ("tensorrt", "tensorrt-rtx") for mode in ("allreduce", "alltoall")]
    assert {c.name for c in ranks} == {f"ranks/{mode}/sm89" for mode in modes}
    assert all({"two GPUs of SM89", "mpi", "nccl"} <= set(c.needs) for c in ranks)
    (found, *_) = core.run_checks(ranks[:1], Machine(HAS, {"two GPUs of SM89": "has one"}, (89,)))
    assert found.status == "skipped" and "has one" in found.reason
    with pytest.raises(MoeExportError, match="two ranks need two GPUs of SM1"):
        acceptance_plans.ranks("tensorrt", "allreduce", "1")


def test_a_refusal_is_a_result(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise MoeExportError("no driver")

    monkeypatch.setitem(acceptance_plans.CHECKS, "marshalling", refuse)
    assert acceptance_plans.main(["marshalling"]) == 1
    assert json.loads(capsys.readouterr().out) == {"passed": False, "reason": "no driver"}
    assert acceptance_plans.main(["other"]) == 2


class Stand:
    """What a GPU would answer, from Triton's interpreter; ``spoil``: the kernel whose numbers are wrong."""

    spoil = ""

    def __init__(self) -> None:
        self.device = SimpleNamespace(sm=89, shared_limit=99 * 1024)
        self.driver = MemoryLauncher()
        self.stream = Stream()

    def launch(
        self, kernel: str, arrays: Mapping[str, Any], constants: Mapping[str, Any], tile: Tile, dtype: str
    ) -> dict[str, NDArray[Any]]:
        from moe_export_plugins.gpu.interpret import run_interpreted

        made = run_interpreted(kernel, arrays, constants, tile, dtype=dtype)
        return {k: v[::-1] if kernel == self.spoil else v for k, v in made.items()}


class Stream:
    """Main memory in place of a GPU's."""

    handle = 77

    def to_device(self, array: NDArray[Any]) -> Any:
        held = np.ascontiguousarray(array)
        return SimpleNamespace(array=held, pointer=held.ctypes.data, nbytes=held.nbytes)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        return self.to_device(np.zeros(shape, dtype))

    def to_host(self, held: Any) -> NDArray[Any]:
        return np.array(held.array)

    def wait(self) -> None:
        pass


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> type[Stand]:
    monkeypatch.setattr(acceptance_gpu, "Gpu", Stand)
    monkeypatch.setattr(Stand, "spoil", "")
    return Stand


def test_marshalling(stand: type[Stand]) -> None:
    result = acceptance_gpu.marshalling()
    assert result["passed"] and set(result["max_error"]) == {
        "router",
        "dispatch",
        "gate_up",
        "down",
        "combine",
    }


@pytest.mark.parametrize("kernel", ["dispatch", "down"])
def test_marshalling_sees_one_wrong_kernel(stand: type[Stand], kernel: str) -> None:
    stand.spoil = kernel
    result = acceptance_gpu.marshalling()
    assert not result["passed"] and kernel in result["reason"]


@pytest.mark.parametrize("spoil", ["", "gate_up"])
def test_shared_memory(stand: type[Stand], spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import moe_export_plugins.gpu.compile as compiler

    def size(*given: Any) -> Any:
        return SimpleNamespace(shared_bytes=given[4].stages * 16384)

    monkeypatch.setattr(compiler, "compile_kernel", size)
    stand.spoil = spoil
    result = acceptance_gpu.shared_memory()
    assert result["bytes"] == 4 * 16384 and result["passed"] == (not spoil)


def test_shared_memory_needs_a_tile_that_takes_it(
    stand: type[Stand], monkeypatch: pytest.MonkeyPatch
) -> None:
    import moe_export_plugins.gpu.compile as compiler

    monkeypatch.setattr(compiler, "compile_kernel", lambda *_: SimpleNamespace(shared_bytes=1000))
    result = acceptance_gpu.shared_memory()
    assert not result["passed"] and "no tile between 48 KiB" in result["reason"]


@pytest.mark.parametrize("spoil", [False, True])
def test_tensor_cores(stand: type[Stand], spoil: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import moe_export_plugins.gpu.bundle_kernels as kernels
    from moe_export_plugins.gpu.experts import ExpertShape

    monkeypatch.setattr(
        kernels, "write_kernels", lambda folder, specs, sms: stand_in_library(folder, specs, sms)
    )
    plain = Stand.__init__

    def made(self: Stand) -> None:
        plain(self)
        self.driver = MemoryLauncher(spoil=spoil)

    monkeypatch.setattr(Stand, "__init__", made)
    base = ExpertShape("float16", num_experts=5, top_k=2, hidden=24, inner=20)
    dtypes = ("float16",) if spoil else ("float32", "bfloat16")
    result = acceptance_gpu.tensor_cores(base, (3,), dtypes)
    assert result["passed"] == (not spoil), result
    assert set(result["max_error"]) == set(dtypes)
    if spoil:
        assert "outside the limits" in result["reason"]


def test_the_error_is_of_the_reference() -> None:
    from moe_export_plugins.gpu.experts import ExpertShape

    shape = ExpertShape("float32", num_experts=5, top_k=2, hidden=24, inner=20)
    given = acceptance_gpu.expert_inputs(shape, 6)
    from moe_export.ops import OPS

    wanted = OPS["ExpertMLP"].reference(**given, num_experts=5).astype(np.float32)
    assert acceptance_gpu.reference_error(wanted, shape, given) < 1e-6
    for wrong in (2 * wanted, np.zeros_like(wanted), wanted[::-1], np.full_like(wanted, np.nan)):
        assert acceptance_gpu.reference_error(wrong, shape, given) > 1e-2
    assert acceptance_gpu.reference_error(wanted, replace(shape, activation="gelu"), given) > 1e-3


def test_the_model_of_the_bare_plan_becomes_plugin_nodes(tmp_path: Path) -> None:
    from moe_export_plugins.gpu.aot_graph import write_aot_model
    from moe_export_plugins.gpu.experts import ExpertShape

    shape = ExpertShape("float16", num_experts=5, top_k=2, hidden=24, inner=20)
    given = acceptance_gpu.expert_inputs(shape, 6)
    acceptance_plans.write_model(tmp_path / "model.onnx", 5, given)
    top_k = {acceptance_plans.LAYER: 2}
    assert write_aot_model(tmp_path / "model.onnx", tmp_path / "model.aot.onnx", top_k, 6, 89) == 1


def test_the_bare_process_imports_nothing_of_moe_export() -> None:
    import ast

    tree = ast.parse((TOOLS / "acceptance_bare.py").read_text())
    roots = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    roots |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert {r.split(".")[0] for r in roots} == {"sys", "pathlib", "typing", "numpy", "tensorrt", "cuda"}
