"""What goes wrong on one rank ends all of them within the time limit, with one clear error and no numbers."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from moe_export.backends.onnxruntime.plugin import cpu_plugin_problem
from moe_export.bundle.manifest import read_manifest
from tests.expert_parallel.mpi import COMMAND, Done, finish, mpiexec, needs_mpi, script, start
from tests.expert_parallel.rank_runs import LIMIT, SLACK, check
from tests.helpers.processes import has_ended
from tests.helpers.rank_bundle import make_rank_bundle
from tests.helpers.tiny_bundle import write_manifest

pytestmark = needs_mpi
needs_plugin = pytest.mark.skipif(bool(cpu_plugin_problem()), reason="needs the CPU plugin")

LOOP = """
import os, sys, time
from pathlib import Path
from moe_export.runtime import launched, load, serve_rank
bundle, folder = sys.argv[1], Path(sys.argv[2])
rank = launched().rank
(folder / f"pid{rank}").write_text(str(os.getpid()))
if rank:
    serve_rank(bundle, threads=1)
else:
    with load(bundle, threads=1) as session:
        ended = time.monotonic() + 60
        while time.monotonic() < ended:
            session.generate("hello", max_new_tokens=20)
            (folder / "running").touch()
    print("numbers")
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_rank_bundle(tmp_path / "bundle", 3, "alltoall")


def disturbed(
    folder: Path, bundle: Path, rank: int | None, act: int, text: str = LOOP
) -> tuple[Done, float]:
    """How a loop of generations ends after the process of ``rank`` (None: mpiexec) got the signal ``act``,
    and after how many seconds."""
    process = start([*script(folder, "loop", text), bundle, folder], 3, MOE_EXPORT_EP_TIMEOUT=str(LIMIT))
    until = time.monotonic() + 60
    while not (folder / "running").exists():
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.05)
    began = time.monotonic()
    os.kill(process.pid if rank is None else int((folder / f"pid{rank}").read_text()), act)
    done = finish(process)
    return done, time.monotonic() - began


def gone(folder: Path) -> bool:
    """Whether no process of the run is left."""
    pids = [int(file.read_text()) for file in folder.glob("pid*")]
    assert len(pids) == 3
    return all(has_ended(pid, within=0.5) for pid in pids)


def test_a_rank_that_is_killed_ends_all(tmp_path: Path, bundle: Path) -> None:
    done, seconds = disturbed(tmp_path, bundle, 1, signal.SIGKILL)
    assert done.code != 0 and "numbers" not in done.out
    assert seconds < SLACK, "the launcher notices by itself"
    assert "Killed (signal 9)" in done.out + done.err
    assert gone(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("act", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "Terminated")])
def test_mpiexec_is_told_to_end(tmp_path: Path, bundle: Path, act: int, said: str) -> None:
    done, seconds = disturbed(tmp_path, bundle, None, act)
    assert done.code != 0 and "numbers" not in done.out
    assert said in done.out + done.err and "Traceback" not in done.err
    assert seconds < SLACK
    assert gone(tmp_path)


@pytest.mark.slow
def test_rank_0_is_killed(tmp_path: Path, bundle: Path) -> None:
    done, seconds = disturbed(tmp_path, bundle, 0, signal.SIGKILL)
    assert done.code != 0 and "numbers" not in done.out
    assert seconds < SLACK
    assert gone(tmp_path)


@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_that_stands_still_ends_all(tmp_path: Path, bundle: Path, rank: int) -> None:
    # One prompt on three ranks: ranks 1 and 2 have no row of their own, and rank 0 does not wait for them.
    # Three prompts make it wait for all.
    text = LOOP.replace('"hello"', '["hello", "a", "b"]')
    done, seconds = disturbed(tmp_path, bundle, rank, signal.SIGSTOP, text)
    assert done.code == 2 and "numbers" not in done.out
    assert len(done.errors) == 1, done.err
    expected = rf"rank 0 of 3 \(.*\): rank {rank} does not answer for 4 s \(time limit 4 s\); all ranks are"
    assert re.search(expected, done.errors[0]), done.errors
    assert LIMIT - 1 < seconds < LIMIT + SLACK
    assert gone(tmp_path)


@needs_plugin
@pytest.mark.parametrize("rank", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rank_that_stands_still_in_an_exchange_ends_all(tmp_path: Path, rank: int) -> None:
    """The others wait for it in the middle of a graph."""
    bundle = make_rank_bundle(tmp_path / "bundle", 3, "allreduce", exchange=True)
    done, seconds = disturbed(tmp_path, bundle, rank, signal.SIGSTOP)
    assert done.code == 2 and "numbers" not in done.out
    assert len(done.errors) == 1, done.err
    assert done.errors[0].startswith("error: rank 0 of 3 ("), done.errors
    assert "longer than the timeout of 4 s" in done.errors[0], done.errors
    assert LIMIT - 1 < seconds < LIMIT + SLACK
    assert gone(tmp_path)


@pytest.mark.slow
@needs_plugin
def test_rank_0_stands_still_in_an_exchange(tmp_path: Path) -> None:
    bundle = make_rank_bundle(tmp_path / "bundle", 3, "allreduce", exchange=True)
    stops = """
if rank == 0:
    import signal
    from moe_export.runtime.stepping import CachedStepper
    feed, calls = CachedStepper.feed, []
    def stop(*args):
        calls.append(args)
        if len(calls) == 30:  # The other ranks have the command, and run.
            os.kill(os.getpid(), signal.SIGSTOP)
        return feed(*args)
    CachedStepper.feed = stop
if rank:"""
    text = LOOP.replace("\nif rank:", stops)
    command = [*script(tmp_path, "loop", text), bundle, tmp_path]
    done = mpiexec(3, *command, MOE_EXPORT_EP_TIMEOUT=str(LIMIT))
    assert done.code == 2 and "numbers" not in done.out
    assert len(done.errors) == 1, done.err
    assert done.errors[0].startswith("error: rank 1 of 3 ("), "rank 1 is the next to lose its patience"
    assert "longer than the timeout of 9 s" in done.errors[0], done.errors
    assert done.seconds < LIMIT + 5 + SLACK
    assert gone(tmp_path)


@pytest.mark.slow
def test_rank_0_stands_still_without_a_run(tmp_path: Path, bundle: Path) -> None:
    """Then it shows no sign of life, and the others wait five time limits for one."""
    text = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from moe_export.runtime import launched, load, serve_rank\n"
        "(Path(sys.argv[2]) / f'pid{launched().rank}').write_text(str(os.getpid()))\n"
        "if launched().rank:\n    serve_rank(sys.argv[1])\n"
        "else:\n    session = load(sys.argv[1])\n    os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    done = mpiexec(3, *script(tmp_path, "idle", text), bundle, tmp_path, MOE_EXPORT_EP_TIMEOUT="1")
    assert (done.code, len(done.errors)) == (2, 1), done.err
    assert re.search(r"rank 1 of 3 .*: rank 0 does not answer for 10 s \(time limit 5 s\)", done.errors[0])
    assert gone(tmp_path)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        ("time.sleep(60)", "rank 0 of 3: MPI did not start for 4 s (time limit 4 s)"),
        pytest.param("raise SystemExit(5)", "MPI did not start", marks=pytest.mark.slow),
    ],
    ids=["late", "ended"],
)
def test_a_rank_that_does_not_serve_ends_all(tmp_path: Path, bundle: Path, act: str, said: str) -> None:
    text = (
        "import sys, time\nfrom moe_export.runtime import launched, load, serve_rank\n"
        f"if launched().rank == 1:\n    {act}\n"
        "if launched().rank:\n    serve_rank(sys.argv[1])\n"
        "else:\n    load(sys.argv[1])\n    print('numbers')\n"
    )
    done = mpiexec(3, *script(tmp_path, "absent", text), bundle, MOE_EXPORT_EP_TIMEOUT=str(LIMIT))
    assert done.code != 0 and "numbers" not in done.out
    assert len(done.errors) == 1 and said in done.errors[0], done.err
    assert done.seconds < LIMIT + SLACK


@pytest.mark.slow
def test_what_comes_before_loading_takes_as_long_as_it_takes(bundle: Path, tmp_path: Path) -> None:
    text = (
        "import sys, time\nfrom moe_export.cli import run_command\nfrom moe_export.cli.main import run\n"
        "read = run_command._read_npz\n"
        "def slow(path):\n    time.sleep(6)\n    return read(path)\n"
        "run_command._read_npz = slow\n"
        "sys.argv = ['moe-export', 'run', *sys.argv[1:]]\nrun()\n"
    )
    np.savez(tmp_path / "in.npz", input_ids=np.array([[1, 2, 3]]))
    words = ("--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz", "-q")
    done = mpiexec(3, *script(tmp_path, "slow", text), bundle, *words, MOE_EXPORT_EP_TIMEOUT="2")
    assert (done.code, done.err) == (0, "")
    assert done.seconds > 6
    with np.load(tmp_path / "out.npz") as file:
        assert file["logits"].shape == (1, 3, 259)


@pytest.mark.slow
def test_loading_takes_as_long_as_it_takes(tmp_path: Path) -> None:
    """A rank that works for longer than the limit says that it is alive."""
    bundle = make_rank_bundle(tmp_path / "bundle", 3, "allreduce")
    text = (
        "import sys, time\nfrom moe_export.runtime import launched, load, serve_rank\n"
        "from moe_export.runtime import serving, session\n"
        "rank = launched().rank\nmodule = serving if rank else session\n"
        "opened = module.open_engine\n"
        "def slow(*args, **options):\n    time.sleep(6 if rank == int(sys.argv[2]) else 0)\n"
        "    return opened(*args, **options)\n"
        "module.open_engine = slow\n"
        "if rank:\n    serve_rank(sys.argv[1])\n"
        "else:\n    with load(sys.argv[1]) as s:\n        print('loaded')\n"
    )
    for rank in (0, 1):
        done = mpiexec(3, *script(tmp_path, "slow", text), bundle, str(rank), MOE_EXPORT_EP_TIMEOUT="2")
        assert (done.code, done.out) == (0, "loaded\n"), done.err
        assert done.seconds > 6


@pytest.mark.parametrize("mode", ["allreduce", "alltoall"])
def test_a_run_that_fails_on_one_rank(tmp_path: Path, mode: str) -> None:
    bundle = make_rank_bundle(tmp_path / "bundle", 2, mode)
    path = bundle / "rank1" / "model.onnx"
    model = onnx.load(path)
    names = {name for node in model.graph.node if node.op_type == "Gather" for name in node.input}
    table = next(t for t in model.graph.initializer if t.name in names and len(t.dims) == 2)
    table.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(table)[:50], table.name))
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    write_manifest(bundle, read_manifest(bundle))
    done = mpiexec(
        2, COMMAND, "run", bundle, "--prompt-ids", "200,201", "--max-new-tokens", "200", "-q", "--json",
        MOE_EXPORT_EP_TIMEOUT=str(LIMIT),
    )  # fmt: skip
    check(done, r"rank 1 of 2 \(.*\): .*rank1/model.onnx: the run failed: .*indices element out of")
