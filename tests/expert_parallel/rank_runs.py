"""Runs on ranks with a time limit, and what one that goes wrong has to look like."""

from __future__ import annotations

import re
from pathlib import Path

from tests.expert_parallel.mpi import COMMAND, Done, mpiexec

LIMIT = 4.0
"""The ranks' time limit in these tests, in seconds."""
SLACK = 12.0
"""What starting and ending processes may take on a busy machine."""


def run(bundle: Path, ranks: int = 3, *words: str) -> Done:
    prompt = words or ("--prompt", "hello", "--max-new-tokens", "3")
    return mpiexec(ranks, COMMAND, "run", bundle, *prompt, MOE_EXPORT_EP_TIMEOUT=str(LIMIT))


def check(done: Done, pattern: str, code: int = 2) -> None:
    """One error, which says what happened; no numbers; ended in time."""
    assert done.code == code, (done.code, done.err)
    assert len(done.errors) == 1, done.err
    assert re.search(pattern, done.errors[0]), done.errors[0]
    assert done.out == ""
    assert "Traceback" not in done.err
    assert done.seconds < LIMIT + 10 + SLACK
