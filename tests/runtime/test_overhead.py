"""What Python adds to a decode step. ``pytest -s tests/runtime/test_overhead.py`` prints the numbers."""

from __future__ import annotations

import time

import numpy as np
import pytest

from moe_export.runtime.engine import Engine
from moe_export.runtime.session import Session
from moe_export.runtime.stepping import CachedStepper

STEPS = 50


def test_python_takes_well_under_a_fifth_of_a_millisecond_per_step(
    tiny: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPU time of one thread, ONNX Runtime's own run taken out, so that other processes do not count."""
    inside = 0.0
    run_bound = Engine.run_bound

    def timed(engine: Engine, binding: object) -> None:
        nonlocal inside
        began = time.thread_time()
        run_bound(engine, binding)
        inside += time.thread_time() - began

    monkeypatch.setattr(Engine, "run_bound", timed)
    engine = tiny._open().engine
    token, one = np.zeros((1, 1), np.int64), np.ones((1, 1), np.int64)
    python, whole = [], []
    for _ in range(20):
        stepper = CachedStepper(engine, tiny.io, tiny.manifest.limits, 1)
        stepper.feed(token, one)
        inside, began = 0.0, time.thread_time()
        for _ in range(STEPS):
            token[0, 0] = int(stepper.feed(token, one)["logits"][0, -1].argmax())
        total = time.thread_time() - began
        python.append((total - inside) / STEPS * 1e6)
        whole.append(total / STEPS * 1e6)
    print(f"\n4 cache tensors: Python {min(python):.0f} µs of {min(whole):.0f} µs CPU per step")
    assert min(python) < 200
