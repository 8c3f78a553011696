"""What is known about the machine, foreign load and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from moe_export.bench.machine import LoadMeter, describe_machine
from moe_export.process_memory import peak_rss_bytes, reset_peak

BURN = "import time; e = time.monotonic() + 30\nwhile time.monotonic() < e: pass"


def test_the_machine_is_described() -> None:
    machine = describe_machine(2)
    assert machine.cpu and machine.threads == 2
    assert machine.cores_logical >= 1 and machine.cores_usable >= 1
    assert machine.memory_bytes > 1 << 28
    assert "onnxruntime" in machine.versions
    assert machine.noisy is False


def test_own_processes_are_not_foreign() -> None:
    """A busy process is foreign exactly when it is not one of ours. Both meters watch the same second."""
    process = subprocess.Popen([sys.executable, "-c", BURN])
    try:
        ours, theirs = LoadMeter(lambda: [os.getpid(), process.pid]), LoadMeter(lambda: [os.getpid()])
        windows = ours.start(), theirs.start()
        time.sleep(1.2)
        ours.stop(windows[0])
        theirs.stop(windows[1])
    finally:
        process.kill()
        process.wait()
    assert ours.foreign_cores is not None and theirs.foreign_cores is not None
    assert theirs.foreign_cores - ours.foreign_cores > 0.1


def test_a_short_window_says_nothing_and_windows_add_up() -> None:
    meter = LoadMeter(lambda: [os.getpid()])
    assert meter.foreign_cores is None
    meter.stop(meter.start())
    assert meter.foreign_cores is None
    total = LoadMeter(lambda: [os.getpid()])
    for _ in range(2):
        window = meter.start()
        time.sleep(0.3)
        meter.stop(window)
    total.add(meter)
    assert total.foreign_cores == meter.foreign_cores is not None


def test_a_dead_process_does_not_disturb() -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    meter = LoadMeter(lambda: [process.pid])
    meter.stop(meter.start())


def test_peak_memory_grows_with_what_is_used() -> None:
    before = peak_rss_bytes()
    if before is None:
        pytest.skip("this system does not tell a process's peak memory")
    block = np.ones(64 << 20, np.uint8)
    grown = peak_rss_bytes()
    assert grown is not None and grown >= before
    assert grown > block.nbytes
    del block
    if reset_peak():
        after = peak_rss_bytes()
        assert after is not None and after < grown
