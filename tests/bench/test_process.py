"""A contestant's own process: answers, errors, death, time-outs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from moe_export.bench.process import Failed, ProcessSeat
from moe_export.bench.runner import NotPossible, read_arrays
from moe_export.errors import MoeExportError
from tests.helpers.tiny_bundle import make_tiny_bundle

WAIT = 120.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("process") / "tiny")


def seat_of(spec: dict[str, object]) -> ProcessSeat:
    return ProcessSeat(spec, threads=1)


@pytest.fixture
def engine(folder: Path) -> Iterator[ProcessSeat]:
    seat = seat_of({"kind": "engine", "bundle": str(folder), "threads": 1})
    yield seat
    seat.close()


def test_a_real_engine_answers(engine: ProcessSeat, folder: Path, tmp_path: Path) -> None:
    assert engine.call("load", WAIT)["seconds"] > 0
    ids = np.arange(20, dtype=np.int64)[None]
    inputs, output = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(inputs, input_ids=ids[:, :16], next_ids=ids[:, 16:])
    engine.call("check", WAIT, inputs=str(inputs), output=str(output))
    found = read_arrays(output)
    assert found["prefill"].shape == (1, 16, 259) and found["step1"].shape == (1, 1, 259)

    # Prefill and steps through the cache give what one whole run gives.
    from moe_export.runtime.session import load

    with load(folder, threads=1) as session:
        whole = session.run({"input_ids": ids[:, :18]})["logits"]
    np.testing.assert_allclose(found["prefill"], whole[:, :16], atol=2e-5)
    np.testing.assert_allclose(found["step1"], whole[:, 17:18], atol=2e-5)

    prefill = engine.call("measure", WAIT, phase="prefill", inputs=str(inputs), repeats=3)
    assert len(prefill["seconds"]) == 3 and len(prefill["sample"]) == 64
    decode = engine.call("measure", WAIT, phase="decode", inputs=str(inputs), repeats=2)
    assert len(decode["seconds"]) == 2 * 4
    assert engine.call("memory", WAIT)["peak_rss"] > 1 << 24
    assert engine.call("routing", WAIT, inputs=str(inputs), output=str(output))["layers"] == 2
    assert read_arrays(output)["0"].shape == (16, 2)


def test_forced_routing_changes_what_the_engine_computes(engine: ProcessSeat, tmp_path: Path) -> None:
    from moe_export.bench.runner import write_routing

    engine.call("load", WAIT)
    inputs, output, forced = (str(tmp_path / f"{name}.npz") for name in ("in", "routing", "forced"))
    np.savez(inputs, input_ids=np.arange(16, dtype=np.int64)[None])

    def sample(plan: str = "") -> list[float]:
        return engine.call("measure", WAIT, phase="prefill", inputs=inputs, repeats=1, forced=plan)["sample"]

    own = sample()
    engine.call("routing", WAIT, inputs=inputs, output=output)
    ids = [read_arrays(output)[str(i)] for i in range(2)]
    half = np.full((16, 2), 0.5, np.float32)
    write_routing(forced, [(layer, half) for layer in ids])
    same_experts = sample(forced)
    write_routing(forced, [((layer + 1) % 4, half) for layer in ids])
    other_experts = sample(forced)
    assert np.abs(np.subtract(same_experts, other_experts)).max() > 1e-2
    assert np.abs(np.subtract(own, same_experts)).max() > 1e-4
    assert sample() == own


def test_a_user_error_arrives_as_one(tmp_path: Path) -> None:
    seat = seat_of({"kind": "engine", "bundle": str(tmp_path), "threads": 1})
    try:
        with pytest.raises(MoeExportError, match="not a moe-export bundle"):
            seat.call("load", WAIT)
    finally:
        seat.close()


def test_an_unexpected_error_arrives_in_one_line() -> None:
    seat = seat_of({"kind": "nonsense"})
    try:
        with pytest.raises(Failed, match=r"^ValueError: unknown contestant 'nonsense'$"):
            seat.call("load", WAIT)
    finally:
        seat.close()


def test_what_cannot_be_done_arrives_as_such(engine: ProcessSeat, tmp_path: Path) -> None:
    engine.call("load", WAIT)
    inputs = str(tmp_path / "in.npz")
    np.savez(inputs, input_ids=np.zeros((1, 4), np.int64))
    exported = tmp_path / "export" / "plain"
    exported.mkdir(parents=True)
    seat = seat_of({"kind": "transformers-onnx", "folder": str(exported.parent), "threads": 1})
    try:
        seat.call("load", WAIT)
        with pytest.raises(NotPossible, match="exported no prefill graph"):
            seat.call("measure", WAIT, phase="prefill", inputs=inputs, repeats=1)
    finally:
        seat.close()


def test_death_is_told(engine: ProcessSeat) -> None:
    engine.call("load", WAIT)
    os.kill(engine.pids[0], signal.SIGKILL)
    with pytest.raises(Failed, match=r"killed \(probably out of memory\)"):
        engine.call("memory", WAIT)
    with pytest.raises(Failed, match="killed"):
        engine.call("memory", WAIT)


def test_too_long_is_ended(engine: ProcessSeat) -> None:
    with pytest.raises(Failed, match="load took longer than 0 s"):
        engine.call("load", 0.0)
    with pytest.raises(Failed, match="ended before"):
        engine.call("load", WAIT)
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pids[0], 0)


def test_a_benchmark_that_is_killed_takes_its_processes_along(folder: Path) -> None:
    code = (
        "import json, sys, time\n"
        "from moe_export.bench.process import ProcessSeat\n"
        "seat = ProcessSeat(json.loads(sys.argv[1]), 1)\n"
        "seat.call('load', 120.0)\n"
        "print(seat.pids[0], flush=True)\n"
        "time.sleep(120)\n"
    )
    spec = json.dumps({"kind": "engine", "bundle": str(folder), "threads": 1})
    parent = subprocess.Popen([sys.executable, "-c", code, spec], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    assert worker.is_running()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    gone, alive = psutil.wait_procs([worker], timeout=30)
    assert alive == [] and gone == [worker]


def test_closing_ends_the_process_and_may_be_repeated(engine: ProcessSeat) -> None:
    pid = engine.pids[0]
    engine.close()
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
