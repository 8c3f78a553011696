"""Kernels in sessions: shared by threads, several in one process, after a fork, on each instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.ops.cases import expert_ids, randoms

from .kernels import feeds, in_kernel, one_op_session, plugin

ROOT = Path(__file__).resolve().parents[2]
EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 96, 80


def layer_inputs(tokens: int, seed: int = 0) -> dict[str, Any]:
    """An MoE layer large enough for several threads."""
    return {
        "hidden": randoms("float32", tokens, HIDDEN, seed=seed),
        "expert_ids": expert_ids(tokens, TOP_K, EXPERTS, strangers=False),
        "weights": np.abs(randoms("float32", tokens, TOP_K, seed=seed)),
        "up": randoms("float32", EXPERTS, 2 * INNER, HIDDEN, seed=1) * HIDDEN**-0.5,
        "down": randoms("float32", EXPERTS, HIDDEN, INNER, seed=2) * INNER**-0.5,
    }


ATTRIBUTES = {"num_experts": EXPERTS}


def ops_of_a_layer(tokens: int) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    inputs = layer_inputs(tokens)
    dispatched = {"expert_ids": inputs["expert_ids"]}
    order, offsets, token_of = in_kernel("Dispatch", dispatched, ATTRIBUTES)
    rows = inputs["hidden"][token_of]
    return [
        ("Router", {"logits": randoms("float32", tokens, 64)}, {"top_k": 4, "renormalize": 1}),
        ("Dispatch", dispatched, ATTRIBUTES),
        ("GroupedMatMul", {"rows": rows, "weight": inputs["up"], "offsets": offsets}, {}),
        ("Combine", {"rows": rows, "order": order, "weights": inputs["weights"]}, {}),
        ("ExpertMLP", inputs, ATTRIBUTES),
    ]


@pytest.mark.parametrize("tokens", [1, 8, 300])
def test_results_have_the_same_bits_each_time_and_for_any_number_of_threads(tokens: int) -> None:
    for name, inputs, attributes in ops_of_a_layer(tokens):
        first = in_kernel(name, inputs, attributes, threads=1)
        for threads in (1, 2, 2, 3):
            again = in_kernel(name, inputs, attributes, threads=threads)
            assert all(a.tobytes() == b.tobytes() for a, b in zip(first, again, strict=True)), name


def test_a_token_alone_and_in_a_batch() -> None:
    """Not bit for bit: small and large groups run by different code."""
    whole = layer_inputs(300)
    (together,) = in_kernel("ExpertMLP", whole, ATTRIBUTES)
    for token in (0, 17, 299):
        part = {k: v[token : token + 1] if len(v) == 300 else v for k, v in whole.items()}
        (alone,) = in_kernel("ExpertMLP", part, ATTRIBUTES)
        np.testing.assert_allclose(alone[0], together[token], rtol=0, atol=2e-6)


def test_one_session_serves_threads_at_the_same_time() -> None:
    cases = [layer_inputs(tokens, seed) for seed in range(4) for tokens in (1, 7, 64)]
    running = one_op_session("ExpertMLP", cases[0], ATTRIBUTES)

    def run(inputs: dict[str, Any]) -> bytes:
        return bytes(running.run_with_ort_values(None, feeds(inputs))[0].numpy().tobytes())

    want = [run(case) for case in cases]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(run, cases * 10)) == want * 10


def test_sessions_come_and_go_in_any_order() -> None:
    inputs = layer_inputs(5)
    (want,) = in_kernel("ExpertMLP", inputs, ATTRIBUTES)
    one_op_session.__globals__["_session"].cache_clear()
    sessions = []
    for threads in (1, 2, 3):
        sessions.append(one_op_session("ExpertMLP", inputs, ATTRIBUTES, threads))
        one_op_session.__globals__["_session"].cache_clear()
    while sessions:
        del sessions[len(sessions) // 2]
        for running in sessions:
            (got,) = running.run_with_ort_values(None, feeds(inputs))
            assert np.array_equal(got.numpy(), want)
    assert np.array_equal(in_kernel("ExpertMLP", inputs, ATTRIBUTES)[0], want)


def in_new_process(script: str, **environment: str) -> str:
    """Standard output of a Python script in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "MOE_EXPORT_CPU_PLUGIN": str(plugin()), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FORK = """
import os, sys
import numpy as np
from tests.plugins.kernels import in_kernel
from tests.plugins.test_sessions import ATTRIBUTES, layer_inputs

inputs = layer_inputs(64)
(before,) = in_kernel("ExpertMLP", inputs, ATTRIBUTES, threads=1)
child = os.fork()
if child == 0:
    # The parent's session has no threads to lose; the second one makes its own here.
    results = [in_kernel("ExpertMLP", inputs, ATTRIBUTES, threads=n)[0] for n in (1, 2)]
    os._exit(0 if all(result.tobytes() == before.tobytes() for result in results) else 1)
_, status = os.waitpid(child, 0)
(after,) = in_kernel("ExpertMLP", inputs, ATTRIBUTES, threads=2)
print(os.waitstatus_to_exitcode(status), after.tobytes() == before.tobytes())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_load() -> None:
    assert in_new_process(FORK).split() == ["0", "True"]


ISA = """
from tests.ops.cases import EXPERTS, expert_ids, expert_inputs
from tests.ops.one_op import assert_equal, expected
from tests.plugins.kernels import in_kernel
from tests.plugins.test_sessions import ops_of_a_layer

cases = [case for tokens in (1, 40) for case in ops_of_a_layer(tokens)]
for form, attributes in EXPERTS.items():
    inputs = expert_inputs(attributes, expert_ids(7, 2, 4), 4, "float16", "bfloat16")
    cases.append(("ExpertMLP", inputs, {"num_experts": 4, **attributes}))
for name, inputs, attributes in cases:
    dtype = "float16" if name == "ExpertMLP" and inputs["hidden"].dtype == "float16" else "float32"
    assert_equal(name, dtype, in_kernel(name, inputs, attributes), expected(name, inputs, attributes))
print(len(cases))
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine(isa: str) -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    if {"avx2": "avx2", "avx512": "avx512vl"}.get(isa, "") not in flags:
        pytest.skip(f"this machine has no {isa}")
    assert int(in_new_process(ISA, MOE_EXPORT_CPU_ISA=isa)) >= 17


def test_an_unknown_instruction_set_is_refused() -> None:
    script = """
from tests.plugins.kernels import refusal
from tests.plugins.test_sessions import ATTRIBUTES, layer_inputs
print(refusal("ExpertMLP", layer_inputs(1), ATTRIBUTES))
"""
    said = in_new_process(script, MOE_EXPORT_CPU_ISA="mmx")
    assert "ExpertMLP" in said
    assert "MOE_EXPORT_CPU_ISA" in said
