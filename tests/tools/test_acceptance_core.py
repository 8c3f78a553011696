"""Which acceptance checks run, what becomes of those that break, and what the report says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from moe_export.errors import UsageError
from tests.helpers.processes import has_ended
from tools.acceptance_core import (
    EXIT_FAILED,
    EXIT_PASSED,
    EXIT_SKIPPED,
    Check,
    Machine,
    Outcome,
    exit_code,
    markdown,
    run_checks,
    run_child,
    select,
    write_report,
)

BARE = Machine({}, {"gpu": "no NVIDIA driver", "tensorrt": "pip install it"})
FULL = Machine({"gpu": "one", "tensorrt": "11.4"}, {}, (89,))


def check(name: str, code: str = "print('{\"passed\": true}')", **more: object) -> Check:
    given = {"group": "risk", "title": name, "needs": (), **more}
    return Check(name, command=(sys.executable, "-c", code), **given)


def outcome(status: str, name: str = "a", **more: object) -> Outcome:
    return Outcome(name, "risk", "what", status, "why" if status != "passed" else "", **more)


def test_risks_come_first_and_only_what_was_asked_for() -> None:
    checks = [
        check("rtx/sm89", group="target", sm=89),
        check("marshalling"),
        check("rtx/sm80", group="target", sm=80),
    ]
    assert [c.name for c in select(checks, (), ())] == ["marshalling", "rtx/sm89", "rtx/sm80"]
    assert [c.name for c in select(checks, ("rtx",), ())] == ["rtx/sm89", "rtx/sm80"]
    assert [c.name for c in select(checks, (), (80,))] == ["marshalling", "rtx/sm80"]
    with pytest.raises(UsageError, match="marshaling.*nearest: marshalling"):
        select(checks, ("marshaling",), ())
    with pytest.raises(UsageError, match="leave no check"):
        select(checks, ("rtx/sm80",), (89,))
    with pytest.raises(UsageError, match="no check is for SM120 here; choices: 80, 89"):
        select(checks, ("rtx",), (80, 120))


def test_what_is_missing_is_told_for_each_check_and_nothing_is_started(tmp_path: Path) -> None:
    mark = tmp_path / "started"
    code = f"open({str(mark)!r}, 'w')"
    checks = [check("a", code, needs=("gpu", "tensorrt")), check("b", code, needs=("gpu",))]
    found = run_checks(checks, BARE)
    assert [o.status for o in found] == ["skipped", "skipped"]
    assert found[0].reason == "no NVIDIA driver; pip install it" and not mark.exists()
    assert exit_code(found) == EXIT_SKIPPED
    text = markdown(BARE, found)
    assert "0 passed, 0 failed, 0 error, 2 skipped" in text
    assert (
        "## Skipped: nothing is shown for these\n\n- no NVIDIA driver; pip install it: a\n- no NVIDIA" in text
    )


def test_a_gpu_of_another_sm_is_no_proof() -> None:
    (found,) = run_checks([check("a", needs=("gpu",), sm=120)], FULL)
    assert found.status == "skipped" and found.reason == "needs a GPU of SM120; this machine has SM89"


def test_a_result_with_its_measurements() -> None:
    code = "import json; print('noise'); print(json.dumps({'passed': True, 'max_error': 1e-4}))"
    (found,) = run_checks([check("a", code, needs=("gpu",), sm=89)], FULL)
    assert found.status == "passed" and found.details == {"max_error": 1e-4}
    assert "| a | a | passed |" in markdown(FULL, [found]) and "max_error 0.0001" in markdown(FULL, [found])
    assert exit_code([found]) == EXIT_PASSED


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ('print(\'{"passed": false, "reason": "off by 3"}\')', "failed", "off by 3"),
        ("print('{\"passed\": false}')", "failed", "no reason given"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", "error", "killed by signal 6"),
        ("raise RuntimeError('illegal address')", "error", "exit code 1 without a result: .*illegal address"),
        ("print('done')", "error", "exit code 0 without a result"),
        ("print('{\"passed\": 1}')", "error", "without a result"),
        (
            "import sys; print('{\"passed\": true}'); sys.exit(2)",
            "error",
            "said passed, but its exit code is 2",
        ),
    ],
)
def test_a_check_that_breaks_is_no_pass_and_stops_no_other(code: str, status: str, reason: str) -> None:
    import re

    found = run_checks([check("a", code), check("b")], FULL)
    assert [o.status for o in found] == [status, "passed"]
    assert re.search(reason, found[0].reason), found[0].reason
    assert exit_code(found) == EXIT_FAILED


def test_a_check_that_hangs_is_stopped() -> None:
    found = run_child(check("a", "import time; time.sleep(60)", timeout=0.5))
    assert found.status == "error" and found.reason == "stopped after 0.5 s"


def test_what_a_stopped_check_started_is_stopped_too(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(mark)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    assert run_child(check("a", code, timeout=3)).reason == "stopped after 3 s"
    assert has_ended(int(mark.read_text()))


def test_a_check_sees_its_own_gpu_only() -> None:
    code = "import json, os; print(json.dumps({'passed': os.environ['CUDA_VISIBLE_DEVICES'] == '2'}))"
    assert run_child(check("a", code, gpu=2)).status == "passed"


def test_a_program_that_is_not_there() -> None:
    found = run_child(Check("a", "risk", "what", (), ("/nowhere/python",)))
    assert found.status == "error" and "could not be started" in found.reason


def test_exit_codes() -> None:
    assert exit_code([outcome("passed")]) == EXIT_PASSED
    assert exit_code([outcome("passed"), outcome("skipped")]) == EXIT_SKIPPED
    assert exit_code([outcome("skipped"), outcome("failed")]) == EXIT_FAILED
    assert exit_code([]) == EXIT_SKIPPED


def test_report_files(tmp_path: Path) -> None:
    outcomes = [outcome("failed", "x|y"), outcome("skipped", "z"), outcome("passed", "w")]
    as_json, as_markdown = write_report(tmp_path / "new", FULL, outcomes)
    data = json.loads(as_json.read_text())
    assert data["exit_code"] == EXIT_FAILED and [c["status"] for c in data["checks"]] == [
        "failed",
        "skipped",
        "passed",
    ]
    assert data["machine"]["sms"] == [89]
    text = as_markdown.read_text()
    assert text.index("## Failed") < text.index("## Risks") < text.index("## Skipped")
    assert "x\\|y" in text
