"""NCCL as ranks on GPUs call it, against a library that writes down what it is asked. No GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from moe_export.backends.trt.device import wait_until
from moe_export.backends.trt.nccl import LIBRARY, Nccl, capsule, choose_gpu, library_path
from moe_export.backends.trt.runner import PlanRunner
from moe_export.errors import BundleError, EnvironmentLacksError
from moe_export.runtime.gpu_ranks import check_gpus
from tests.expert_parallel.mpi import mpiexec, needs_mpi, script

RECORDER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
typedef struct { char internal[128]; } ncclUniqueId;
int ncclGetUniqueId(ncclUniqueId* id) {
  memset(id, 0, sizeof *id);
  strcpy(id->internal + 1, "made by rank 0");
  id->internal[127] = 77;
  return 0;
}
int ncclCommInitRank(void** comm, int ranks, ncclUniqueId id, int rank) {
  const char* refuses = getenv("NCCL_REFUSES");
  const char* hangs = getenv("NCCL_HANGS");
  if (refuses && atoi(refuses) == rank) return 5;
  if (hangs && atoi(hangs) == rank) sleep(600);
  printf("%d of %d: %d %s %d\n", rank, ranks, id.internal[0], id.internal + 1, id.internal[127]);
  fflush(stdout);
  *comm = (void*)(0x7f0000001000 + rank);
  return 0;
}
int ncclCommGetAsyncError(void* comm, int* code) {
  *code = (size_t)comm == 0x7f0000001000 ? 6 : 7;
  return 0;
}
int ncclCommAbort(void* comm) { return (size_t)comm == 0x7f0000001001 ? 0 : 4; }
const char* ncclGetErrorString(int code) {
  return code == 5 ? "invalid usage" : code == 6 ? "remote process exited" : "invalid argument";
}
"""
CONNECT = """
import sys
from moe_export.cli.main import run_guarded
from moe_export.runtime.gpu_ranks import connect_gpus
from moe_export.runtime.ranks import connect
ranks = connect(float(sys.argv[1]))
show = lambda nccl, address: print(hex(address), flush=True)
sys.exit(run_guarded(lambda: connect_gpus(ranks, show)))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler on Linux")
    if library_path() != LIBRARY:
        pytest.skip("the package nvidia-nccl-cu13 comes first")
    folder = tmp_path_factory.mktemp("nccl")
    (folder / "nccl.c").write_text(RECORDER)
    command = [compiler, "-shared", "-fPIC", str(folder / "nccl.c"), "-o", str(folder / LIBRARY)]
    subprocess.run(command, check=True)
    return folder


@needs_mpi
def test_all_ranks_get_the_name_that_rank_0_made(tmp_path: Path, library: Path) -> None:
    done = mpiexec(3, *script(tmp_path, "connect", CONNECT), "20", LD_LIBRARY_PATH=str(library))
    assert (done.code, done.err) == (0, "")
    lines = sorted(done.out.split("\n"))
    said = [f"{rank} of 3: 0 made by rank 0 77" for rank in range(3)]
    assert [line for line in lines if "of" in line] == said
    assert [line for line in lines if line.startswith("0x")] == [f"0x7f000000100{rank}" for rank in range(3)]


@needs_mpi
def test_what_goes_wrong_is_said_once_and_ends_all(tmp_path: Path, library: Path) -> None:
    command = script(tmp_path, "connect", CONNECT)
    done = mpiexec(2, *command, "20", LD_LIBRARY_PATH=str(tmp_path))
    assert done.code == 3 and len(done.errors) == 1
    assert f"{LIBRARY} is not here: pip install 'moe-export[nccl]'" in done.errors[0]
    done = mpiexec(2, *command, "20", LD_LIBRARY_PATH=str(library), NCCL_REFUSES="1")
    assert done.code == 2 and len(done.errors) == 1
    assert "rank 1" in done.errors[0] and "ncclCommInitRank failed: invalid usage" in done.errors[0]
    done = mpiexec(2, *command, "2", LD_LIBRARY_PATH=str(library), NCCL_HANGS="0")
    assert done.code != 0 and done.seconds < 30
    assert len(done.errors) == 1 and "connecting the GPUs through NCCL took longer than 2 s" in done.errors[0]


@needs_mpi
def test_ranks_that_all_hang_inside_tensorrt_end_too(tmp_path: Path, library: Path) -> None:
    """It may keep Python's lock, so that nothing of Python runs."""
    hangs = CONNECT.replace("print(hex(address), flush=True)", "__import__('ctypes').PyDLL(None).sleep(600)")
    assert hangs != CONNECT
    done = mpiexec(2, *script(tmp_path, "hangs", hangs), "1", LD_LIBRARY_PATH=str(library))
    assert done.code != 0 and done.seconds < 40
    assert "Timeout" in done.err and "connect_gpus" in done.err


def test_a_plan_of_several_ranks_runs_with_them_only() -> None:
    """TensorRT would run it without, and the numbers would be wrong."""
    alone = PlanRunner.__new__(PlanRunner)  # without the GPU that making one takes
    vars(alone).update(_lock=threading.Lock(), _ranks=2, _rank=1, _nccl=None, _label="plan")
    with pytest.raises(BundleError, match="plan is of rank 1 of 2, which are not connected; .* mpiexec -n 2"):
        alone.run({})


def test_errors_of_an_exchange_end_the_wait(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_export.backends.trt.nccl.library_path", lambda: str(library / LIBRARY))
    nccl = Nccl()
    nccl.free(0x7F0000001001)
    with pytest.raises(BundleError, match="NCCL: ncclCommAbort failed: invalid argument"):
        nccl.free(0x7F0000001000)
    assert nccl.problem(0x7F0000001001) == "", "in progress is no problem"
    with pytest.raises(BundleError, match="NCCL: remote process exited"):
        wait_until(lambda: False, lambda: nccl.problem(0x7F0000001000))
    looks = iter([False, False, True])
    wait_until(lambda: next(looks), lambda: "not asked that early")


def test_a_communicator_goes_to_tensorrt_as_a_capsule_without_a_name() -> None:
    """Its binding takes a capsule and reads the pointer; a number is refused."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    made = capsule(0x7F0000001000)
    assert get(made, None) == 0x7F0000001000
    trt = pytest.importorskip("tensorrt_rtx")
    assert "CapsuleType) -> bool" in trt.IExecutionContext.set_communicator.__doc__
    with pytest.raises(TypeError, match="incompatible function arguments"):
        trt.IExecutionContext.set_communicator(None, 0x7F0000001000)


def test_each_rank_of_a_host_gets_a_gpu(tmp_path: Path) -> None:
    none = tmp_path / "none"
    cases = (None, 2, "2"), ("3,5", 1, "5"), ("GPU-a, GPU-b", 0, "GPU-a"), ("7", 1, "7")
    for given, local, expected in cases:
        environment = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
        choose_gpu(local, environment, none)
        assert environment["CUDA_VISIBLE_DEVICES"] == expected
    with pytest.raises(EnvironmentLacksError, match="names 2 GPUs, and more ranks run here; .* rank per GPU"):
        choose_gpu(2, {"CUDA_VISIBLE_DEVICES": "0,1"}, none)
    for gpu in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / gpu).mkdir(parents=True)
    environment = {}
    choose_gpu(1, environment, tmp_path / "gpus")
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    with pytest.raises(EnvironmentLacksError, match=r"this host has 2 GPU\(s\), and more ranks run here"):
        choose_gpu(2, {}, tmp_path / "gpus")


def test_one_gpu_for_two_ranks_is_refused() -> None:
    check_gpus([{"gpu": "a", "host": "x"}, {"gpu": "b", "host": "x"}, {"gpu": "", "host": "y"}])
    check_gpus([{"gpu": "", "host": "x"}] * 2)  # nothing is known of them
    with pytest.raises(EnvironmentLacksError, match=r"ranks 0 and 2 have the same GPU \(host y\)"):
        check_gpus([{"gpu": "a", "host": "x"}, {"gpu": "b", "host": "x"}, {"gpu": "a", "host": "y"}])
