"""docs/planning.md shows what the commands print, and its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe_export.cli.main import cli
from moe_export.inspect.config_readers import has_reader

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^```\n\$ moe-export (.*?)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("command", "shown"), SHOWN, ids=[command for command, _ in SHOWN])
def test_shown_output_is_printed(command: str, shown: str) -> None:
    result = CliRunner().invoke(cli, shlex.split(command))
    assert result.exit_code == 0, result.output
    printed = [line.rstrip() for line in result.stdout.splitlines()]
    missing = [line for line in shown.splitlines() if line != "..." and line.rstrip() not in printed]
    assert missing == []


def test_every_shown_command_was_found() -> None:
    assert len(SHOWN) == PAGE.count("$ moe-export") == 3


def test_the_python_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/planning.md", "exec"), {})
    assert capsys.readouterr().out.startswith("2 copies, each on 1 GPU ")


def test_families_of_the_page_have_readers() -> None:
    (sentence,) = re.findall(r"read the configs of ([^.]*)\.", PAGE)
    families = re.split(r",\s+|\s+and\s+", sentence)
    assert len(families) == 17
    assert all(has_reader(name.strip()) for name in families)


@pytest.mark.parametrize(
    ("gpu", "gpus", "context", "factor"), [("h200", 1, 1024, 3.6), ("h100", 8, 8192, 3.4)]
)
def test_prefill_factors_of_the_page(gpu: str, gpus: int, context: int, factor: float) -> None:
    args = ["plan", "mixtral-8x7b", "--gpu", gpu, "--gpus", str(gpus), "--context", str(context)]
    result = CliRunner().invoke(cli, [*args, "--batch", "64"])
    assert f"best layout: {factor} times" in result.stdout
    assert f"{factor} times" in PAGE
