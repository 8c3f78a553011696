"""AllReduce, AllToAll and CheckCapacity on real MPI processes, against their references."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from moe_export.backends.onnxruntime.exchange import connect_exchange, exchange_use
from moe_export.backends.onnxruntime.runner import create_session, ort_error_types
from moe_export.errors import BundleError, EnvironmentLacksError, UsageError
from moe_export.ops import DOMAIN, OPS, VERSION
from moe_export.ops.collectives import capacity_text
from tests.expert_parallel.mpi import Done, mpiexec, needs_mpi
from tests.ops.one_op import NUMPY, problem

from .kernels import plugin, session

PROGRAM = Path(__file__).with_name("collective_ranks.py")
Arrays = list[NDArray[Any]]


def model(op: str, dtype: str, rank: int, **attributes: Any) -> onnx.ModelProto:
    """One collective; bfloat16 comes out as float32, which NumPy takes."""
    kind = helper.np_dtype_to_tensor_dtype(NUMPY[dtype])
    shape = [f"d{axis}" for axis in range(rank)]
    nodes = [helper.make_node(op, ["x"], ["y"], name=f"the {op}", domain=DOMAIN, **attributes)]
    result = kind
    if dtype == "bfloat16":
        nodes[0].output[0] = "y.bfloat16"
        result = onnx.TensorProto.FLOAT
        nodes.append(helper.make_node("Cast", ["y.bfloat16"], ["y"], to=result))
    graph = helper.make_graph(
        nodes,
        op,
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", result, shape)],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


class Run:
    """Steps for all ranks: add them, start, read what came out."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks, self.steps = folder, ranks, 0
        self.plan: dict[str, Any] = {"connect": True, "fails": False, "timeout": 60.0, "steps": []}

    def add(self, models: Sequence[onnx.ModelProto] | onnx.ModelProto, arrays: Arrays) -> int:
        """One step with an input per rank; returns its number."""
        step = self.steps
        each = [models] if isinstance(models, onnx.ModelProto) else list(models)
        names = [f"{step}.{index}.onnx" for index in range(len(each))]
        for name, proto in zip(names, each, strict=True):
            onnx.save(proto, self.folder / name)
        self.plan["steps"].append({"model": names[0] if len(names) == 1 else names})
        for rank, array in enumerate(arrays):
            bits = array.view(np.uint16) if array.dtype == NUMPY["bfloat16"] else array
            np.savez(self.folder / f"{step}.{rank}.npz", x=bits)
        self.steps += 1
        return step

    def start(self) -> Done:
        (self.folder / "plan.json").write_text(json.dumps(self.plan), encoding="utf-8")
        done = mpiexec(self.ranks, sys.executable, PROGRAM, self.folder, MOE_EXPORT_CPU_PLUGIN=str(plugin()))
        assert (done.code == 0) == (not self.plan["fails"]), done.err
        return done

    def fail(self) -> list[dict[str, Any]]:
        """Start, and return what each rank said."""
        self.plan["fails"] = True
        self.start()
        return self.said()

    def said(self) -> list[dict[str, Any]]:
        files = [self.folder / f"{rank}.error.json" for rank in range(self.ranks)]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def results(self, step: int) -> Arrays:
        return [np.load(self.folder / f"{step}.{rank}.out.npz")["y"] for rank in range(self.ranks)]


def values(dtype: str, shape: tuple[int, ...], ranks: int) -> Arrays:
    """Random, another per rank."""
    rng = np.random.default_rng([len(dtype), *shape])
    if dtype.startswith("int"):
        return [rng.integers(-(2**30), 2**30, shape).astype(NUMPY[dtype]) for _ in range(ranks)]
    return [np.asarray(rng.standard_normal(shape).astype(NUMPY[dtype])) for _ in range(ranks)]


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sums_maxima_and_blocks(tmp_path: Path, ranks: int) -> None:
    run = Run(tmp_path, ranks)
    reductions, exchanges = {}, {}
    for dtype in ("float32", "int64"):
        for reduce in ("sum", "max"):
            # None, one, few, and so many that MPI takes another algorithm.
            for shape in ((0, 8), (1,), (3, 5), (40, 1000), (300, 1000)):
                arrays = values(dtype, shape, ranks)
                proto = model("AllReduce", dtype, len(shape), ranks=ranks, reduce=reduce, layer="l0")
                reductions[run.add(proto, arrays)] = (dtype, reduce, arrays)
    for dtype in ("float32", "float16", "bfloat16", "int32"):
        for rows, rest in ((0, (6,)), (1, (1,)), (3, (17,)), (64, (9, 100))):
            arrays = values(dtype, (rows * ranks, *rest), ranks)
            proto = model("AllToAll", dtype, 1 + len(rest), ranks=ranks, layer="l0")
            exchanges[run.add(proto, arrays)] = arrays
    run.start()

    for step, (dtype, reduce, arrays) in reductions.items():
        want = OPS["AllReduce"].reference(arrays, ranks=ranks, reduce=reduce)
        results = run.results(step)
        for got, expected in zip(results, want, strict=True):
            assert got.dtype == NUMPY[dtype]
            assert not problem(OPS["AllReduce"], dtype, got, expected), (dtype, reduce, got.shape)
            assert got.tobytes() == results[0].tobytes(), "not the same bits on all ranks"
            if got.size:
                assert problem(OPS["AllReduce"], dtype, got * 2, expected)
    for step, arrays in exchanges.items():
        want = OPS["AllToAll"].reference(arrays, ranks=ranks)
        for got, expected in zip(run.results(step), want, strict=True):
            assert not problem(OPS["AllToAll"], "", got, np.asarray(expected, np.float64))
            if got.size:
                assert problem(OPS["AllToAll"], "", np.roll(got, 1), np.asarray(expected, np.float64))
    own = sum(arrays[0].nbytes for _, _, arrays in reductions.values())
    blocks = sum(arrays[0].nbytes * (ranks - 1) // ranks for arrays in exchanges.values())
    for said in run.said():
        assert said["error"] == ""
        use = said["use"]
        assert (use["all_reduce_calls"], use["all_reduce_bytes"]) == (len(reductions), own)
        assert (use["all_to_all_calls"], use["all_to_all_bytes"]) == (len(exchanges), blocks)
        assert use["failed"] == 0 and 0 < use["all_reduce_seconds"] < 60


@needs_mpi
@pytest.mark.parametrize("op", ["AllReduce", "AllToAll"])
def test_a_slow_rank_is_an_error_in_time(tmp_path: Path, op: str) -> None:
    run = Run(tmp_path, 2)
    run.plan |= {"timeout": 1.0, "sleep": {"1": 3}}
    for _ in range(3):
        run.add(model(op, "float32", 2, ranks=2, layer="block.3"), values("float32", (4, 3), 2))
    waits, _slow = run.fail()
    assert f"moe_export.{op}: layer 'block.3': rank 0 of 2: waited 1 s for the other ranks" in waits["error"]
    assert "longer than the timeout of 1 s" in waits["error"]
    assert 1 <= waits["seconds"] < 2.9
    assert waits["use"]["failed"] == 1
    assert not (tmp_path / "1.0.out.npz").exists()


def unlike(case: str) -> tuple[list[onnx.ModelProto], Arrays]:
    """What two ranks run that do not fit each other: models and inputs."""
    reduce = model("AllReduce", "float32", 2, ranks=2, layer="a")
    blocks = model("AllToAll", "float32", 2, ranks=2, layer="a")
    arrays = values("float32", (4, 3), 2)
    large = np.zeros((4000, 300), np.float32)
    cases: dict[str, tuple[list[onnx.ModelProto], Arrays]] = {
        "a longer sum": ([reduce, reduce], [arrays[0], np.zeros((4, 4), np.float32)]),
        "a much longer sum": ([reduce, reduce], [arrays[0], large]),
        "larger blocks": ([blocks, blocks], [arrays[0], np.zeros((40, 3), np.float32)]),
        "much larger blocks": ([blocks, blocks], [arrays[0], large]),
        "another shape of the unit's size": ([blocks, blocks], [arrays[0], np.zeros((4, 2), np.float32)]),
        "another layer's sum": ([reduce, model("AllReduce", "float32", 2, ranks=2, layer="b")], arrays),
        "another layer's blocks": ([blocks, model("AllToAll", "float32", 2, ranks=2, layer="b")], arrays),
        "a maximum": ([reduce, model("AllReduce", "float32", 2, ranks=2, layer="a", reduce="max")], arrays),
        "another type": (
            [blocks, model("AllToAll", "int32", 2, ranks=2, layer="a")],
            [arrays[0], np.zeros((4, 3), np.int32)],
        ),
        "another op": ([reduce, blocks], arrays),
    }
    return cases[case]


@needs_mpi
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("a longer sum", "the ranks are not alike at exchange 1|MPI: "),
        ("a much longer sum", "the ranks are not alike|MPI: |waited"),
        ("larger blocks", "sent a block of|MPI: |waited"),
        ("much larger blocks", "sent a block of|MPI: |waited"),
        ("another shape of the unit's size", "rank 1 sent a block of 16 bytes, this rank's have 24"),
        ("another layer's sum", "not alike at exchange 1"),
        ("another layer's blocks", "rank 1 is at another layer"),
        ("a maximum", "not alike|MPI: |waited"),
        ("another type", "rank 1 has another element type"),
        ("another op", "not alike|at another op|MPI: |waited"),
    ],
)
def test_ranks_that_differ_are_told(tmp_path: Path, case: str, message: str) -> None:
    run = Run(tmp_path, 2)
    run.plan["timeout"] = 2.0
    same = model("AllReduce", "float32", 2, ranks=2, layer="first")
    run.add(same, values("float32", (2, 2), 2))
    run.add(*unlike(case))
    run.add(same, values("float32", (2, 2), 2))
    said = run.fail()
    assert (tmp_path / "0.0.out.npz").exists()
    for rank in range(2):
        assert not (tmp_path / f"1.{rank}.out.npz").exists(), "numbers of ranks that do not fit"
        assert said[rank]["seconds"] < 8
        assert f"rank {rank} of 2: " in said[rank]["error"]
    assert re.search(message, said[0]["error"]), said[0]["error"]


@needs_mpi
def test_another_number_of_ranks(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.add(model("AllReduce", "float32", 2, ranks=4, layer="a"), values("float32", (2, 2), 2))
    for said in run.fail():
        assert "this engine has 4 ranks, and 2 run; start it with mpiexec -n 4" in said["error"]


@needs_mpi
def test_rows_that_make_no_equal_blocks(tmp_path: Path) -> None:
    run = Run(tmp_path, 2)
    run.add(model("AllToAll", "float32", 2, ranks=2), values("float32", (3, 2), 2))
    for said in run.fail():
        assert "input x has shape [3, 2], whose rows do not make 2 equal blocks" in said["error"]


@needs_mpi
def test_a_rank_that_dies_ends_the_run(tmp_path: Path) -> None:
    text = """
import os, sys, time
from mpi4py import MPI
from moe_export.backends.onnxruntime.exchange import connect_exchange
if MPI.COMM_WORLD.rank == 1:
    os._exit(9)
connect_exchange(MPI.COMM_WORLD, 20.0)
print("connected")
"""
    (tmp_path / "dies.py").write_text(text, encoding="utf-8")
    done = mpiexec(2, sys.executable, tmp_path / "dies.py", limit=40, MOE_EXPORT_CPU_PLUGIN=str(plugin()))
    assert done.code != 0 and "connected" not in done.out and done.seconds < 25


@needs_mpi
def test_a_rank_that_does_not_connect_is_an_error_in_time(tmp_path: Path) -> None:
    text = """
import time
from mpi4py import MPI
from moe_export.backends.onnxruntime.exchange import connect_exchange
from moe_export.errors import EnvironmentLacksError
if MPI.COMM_WORLD.rank == 1:
    time.sleep(30)
try:
    connect_exchange(MPI.COMM_WORLD, 1.0)
except EnvironmentLacksError as error:
    print(error, flush=True)
    MPI.COMM_WORLD.Abort(3)
"""
    (tmp_path / "late.py").write_text(text, encoding="utf-8")
    done = mpiexec(2, sys.executable, tmp_path / "late.py", limit=40, MOE_EXPORT_CPU_PLUGIN=str(plugin()))
    assert done.code == 3 and done.seconds < 15
    assert "rank 0 of 2: the other ranks did not connect within 1 s" in done.out


@pytest.mark.parametrize("op", ["AllReduce", "AllToAll"])
def test_not_connected(op: str) -> None:
    running = session(model(op, "float32", 2, ranks=2, layer="a"))
    with pytest.raises(ort_error_types(), match="layer 'a': this engine is one of 2 ranks, and no other"):
        running.run(None, {"x": np.zeros((2, 2), np.float32)})
    assert exchange_use() == {}


def test_a_rank_without_the_plugin_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_EXPORT_CPU_PLUGIN", "off")
    content = model("AllReduce", "float32", 2, ranks=2).SerializeToString()
    with pytest.raises(EnvironmentLacksError, match="runs only in the CPU plugin.*off.*moe_export:AllReduce"):
        create_session(content)
    with pytest.raises(BundleError, match="cannot load it: .*moe_export:AllReduce"):
        create_session(content, plugin=False)


def capacity_session(layer: str) -> Any:
    info = [helper.make_tensor_value_info(n, onnx.TensorProto.INT64, [1]) for n in ("load", "capacity", "y")]
    node = helper.make_node("CheckCapacity", ["load", "capacity"], ["y"], domain=DOMAIN, layer=layer)
    graph = helper.make_graph([node], "check", info[:2], info[2:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    return session(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def test_check_capacity() -> None:
    running = capacity_session("l7")
    for load in (1, 4):
        (got,) = running.run(None, {"load": np.array([load]), "capacity": np.array([4])})
        assert got.tolist() == [4] and got.dtype == np.int64
    with pytest.raises(ort_error_types()) as caught:
        running.run(None, {"load": np.array([5]), "capacity": np.array([4])})
    assert f"Status Message: {capacity_text('l7', 5, 4)}" in str(caught.value)


def test_no_plugin_and_no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    class One:
        rank, size = 0, 1

    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    with pytest.raises(EnvironmentLacksError, match=r"mpi4py is missing.*pip install 'moe-export\[mpi\]'"):
        connect_exchange(One())  # type: ignore[arg-type]  # it gets no further
    monkeypatch.undo()
    pytest.importorskip("mpi4py")
    monkeypatch.setenv("MOE_EXPORT_CPU_PLUGIN", "off")
    with pytest.raises(EnvironmentLacksError, match="in the CPU plugin, which is missing: switched off"):
        connect_exchange(One())  # type: ignore[arg-type]


@needs_mpi
def test_an_mpi_without_nonblocking_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_export.backends.onnxruntime import exchange

    plugin()
    monkeypatch.setattr(exchange, "_FUNCTIONS", ("MPI_Iallreduce_of_no_mpi",))
    with pytest.raises(EnvironmentLacksError, match="has no MPI_Iallreduce_of_no_mpi; expected an MPI"):
        connect_exchange(exchange._mpi().COMM_SELF)


@needs_mpi
@pytest.mark.parametrize("timeout", [0.0, -1.0, float("inf"), float("nan")])
def test_wrong_timeouts(timeout: float) -> None:
    from moe_export.backends.onnxruntime import exchange

    plugin()
    with pytest.raises(UsageError, match="expected a positive number of seconds"):
        connect_exchange(exchange._mpi().COMM_SELF, timeout)
