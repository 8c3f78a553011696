"""The command group: errors, exit codes, help, versions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import moe_export
from moe_export.cli.main import COMMANDS, cli, run_guarded
from moe_export.errors import CheckFailed, EnvironmentLacksError, UsageError


def invoke(*args: str, **options: Any) -> Result:
    return CliRunner().invoke(cli, list(args), **options)


def test_version() -> None:
    for flag in ("-V", "--version"):
        result = invoke(flag)
        assert (result.exit_code, result.stdout) == (0, f"moe-export {moe_export.__version__}\n")


def test_help_names_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout


def test_every_help_is_fast_and_needs_no_heavy_library() -> None:
    """One process imports every command and renders its help; nothing heavy may be loaded by that."""
    script = """
import sys
from click.testing import CliRunner
from moe_export.cli.main import COMMANDS, cli
for name in COMMANDS:
    for args in ([name, "--help"], [name, "-h"]):
        result = CliRunner().invoke(cli, args)
        assert result.exit_code == 0 and "Usage:" in result.output, (args, result.output)
for child in ("families", "ops", "targets"):
    assert CliRunner().invoke(cli, ["list", child, "--help"]).exit_code == 0
heavy = {"torch", "transformers", "onnx", "onnxruntime", "onnxscript", "onnx_ir", "numpy", "matplotlib"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bild"], "error: no command 'bild'; nearest: build; choices: bench, build"),
        (["build"], "error: missing argument 'SOURCE' (see 'moe-export build --help')"),
        (["build", "x"], "error: missing option '-o' / '--output' (see 'moe-export build --help')"),
        (
            ["list", "families", "--nope"],
            "error: no such option '--nope' (see 'moe-export list families --help')",
        ),
        (["build", "x", "-o", "y", "--tolerance", "logits"], "'logits' is not NAME=VALUE"),
        (["build", "x", "-o", "y", "--tolerance", "logits=-1"], "'logits=-1' is not NAME=VALUE"),
        (["build", "x", "-o", "y", "--tolerance", "logits=nan"], "'logits=nan' is not NAME=VALUE"),
        (["build", "x", "-o", "y", "--target", "tpu"], "'tpu' is not one of 'onnxruntime', 'portable'"),
        (["build", "x", "-o", "y", "--max-batch", "0"], "0 is not in the range x>=1"),
        (["build", "x", "-o", "y", "--config", "no-such.toml"], "no-such.toml"),
        (["inspect", "no-such-folder"], "error: no-such-folder: no such folder; expected a bundle"),
    ],
)
def test_wrong_use_is_one_line_and_exits_2(args: list[str], message: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")


def _raises(error: BaseException) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("bad\nvalue"), 2, "error: bad value"),
        (CheckFailed("parity outside tolerance"), 1, "error: parity outside tolerance"),
        (EnvironmentLacksError("no CUDA"), 3, "error: no CUDA"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (click.Abort(), 130, "interrupted; nothing was written"),
        (ModuleNotFoundError("x", name="transformers.models"), 3, "pip install 'moe-export[hf]'"),
        (ModuleNotFoundError("x", name="onnx"), 3, "pip install onnx"),
        (ModuleNotFoundError("x", name="moe_export.nothing"), 70, "an error of moe-export itself"),
        (OSError(28, "No space left on device", "out/x"), 2, "error: out/x: No space left on device"),
        (MemoryError(), 3, "out of memory"),
        (
            ZeroDivisionError("division by zero"),
            70,
            "ZeroDivisionError: division by zero (an error of moe-export",
        ),
    ],
)
def test_exit_codes(error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(_raises(error)) == code
    err = capsys.readouterr().err
    assert text in err
    assert "Traceback" not in err
    assert err.count("\n") == 1
    assert run_guarded(_raises(error), debug=True) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_returned_number_is_the_exit_code() -> None:
    assert run_guarded(lambda: 1) == 1
    assert run_guarded(lambda: None) == 0
    assert run_guarded(lambda: True) == 0


@pytest.mark.parametrize("args", [("--debug", "inspect", "nothing"), ("inspect", "nothing", "--debug")])
def test_debug_before_and_after_the_command(args: tuple[str, ...]) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "SourceError" in result.stderr


def test_reader_that_goes_away() -> None:
    """Like ``moe-export list families | head -1``: quiet, and not a success."""
    process = subprocess.Popen(
        [sys.executable, "-m", "moe_export", "list", "families", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() == 141


def test_terminated_process_unwinds() -> None:
    script = """
import os, signal
import moe_export.cli.main as main
main.cli.invoke = lambda ctx: os.kill(os.getpid(), signal.SIGTERM)
import sys; sys.argv = ["moe-export", "doctor"]
try:
    main.run()
finally:
    print("unwound")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "unwound\n")


def test_completion_script() -> None:
    environment = {**os.environ, "_MOE_EXPORT_COMPLETE": "bash_source"}
    done = subprocess.run(
        [sys.executable, "-c", "from moe_export.cli.main import run; run()"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0
    assert "_moe_export_completion" in done.stdout


def test_list_families_json() -> None:
    rows = json.loads(invoke("list", "families", "--json").stdout)
    assert len(rows) > 60
    assert {"name", "status", "reason"} <= set(rows[0])
    assert {row["status"] for row in rows} <= {"works", "limited", "refused"}
    assert all(bool(row["reason"]) == (row["status"] != "works") for row in rows)
    limited = json.loads(invoke("list", "families", "--status", "limited", "--json").stdout)
    assert [row for row in rows if row["status"] == "limited"] == limited


@pytest.mark.parametrize(
    ("what", "name"), [("ops", "Router"), ("targets", "onnxruntime"), ("families", "mixtral")]
)
def test_list_as_text_and_json(what: str, name: str) -> None:
    rows = json.loads(invoke("list", what, "--json").stdout)
    assert name in [row["name"] for row in rows]
    text = invoke("list", what)
    assert text.exit_code == 0
    assert any(line.startswith(f"{name} ") for line in text.stdout.splitlines())


def test_doctor() -> None:
    result = invoke("doctor", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    available = {t["name"]: t["available"] for t in found["targets"]}
    assert (available["onnxruntime"], available["portable"]) == (True, True)
    assert {t["name"]: t["builds"] for t in found["targets"]}["tensorrt-rtx"]
    text = invoke("doctor", "--target", "portable")
    assert text.exit_code == 0
    assert "torch" in text.stdout


def test_doctor_exits_3_when_something_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_export.inspect import environment

    needs = (("no_such_module",), ())
    known = environment._Known(
        "no_such_module", ("no-such-package",), "nothing", "pip install no-such-package"
    )
    monkeypatch.setattr(environment, "_PACKAGES", (*environment._PACKAGES, known))
    monkeypatch.setitem(environment._TARGET_NEEDS, "portable", needs)
    result = invoke("doctor")
    assert result.exit_code == 3
    assert (
        "target portable lacks no-such-package (not installed): pip install no-such-package" in result.stderr
    )
    assert invoke("doctor", "--target", "onnxruntime").exit_code == 0
