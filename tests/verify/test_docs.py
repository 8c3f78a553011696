"""The pages on parity say what the code does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from moe_export.schema import DTYPES
from moe_export.verify.result import FINDING_KINDS
from moe_export.verify.tolerance import default_tolerances
from tests.helpers.tiny_bundle import TinyReference, make_tiny_bundle

DOCS = Path(__file__).parents[2] / "docs"

GUARD = """
import importlib.abc, importlib.machinery, sys
ALLOWED = set({allowed!r})

class Guard(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ALLOWED or top in sys.stdlib_module_names:
            return None
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Guard())
sys.argv = ["moe-export", "verify", {bundle!r}, "--threads", "1"]
sys.argv += ["--against", {golden!r}, "--output", {out!r}]
from moe_export.cli.main import run
run()
"""


def tolerance_table() -> str:
    tables = {d: default_tolerances(d, ["OUTPUT"]).limits for d in DTYPES}
    lines = [f"| name | {' | '.join(DTYPES)} | what it bounds |", "| --- | --- | --- | --- | --- |"]
    for name, limit in tables["float32"].items():
        values = " | ".join(f"{tables[d][name].value:g}" for d in DTYPES)
        lines.append(f"| `{name}` | {values} | {limit.measures.replace('|', '&#124;')} |")
    return "\n".join(lines)


def test_table_of_limits() -> None:
    table = tolerance_table()
    assert table in (DOCS / "parity.md").read_text(), f"docs/parity.md is stale; the table is now:\n{table}"


@pytest.mark.parametrize("kind", FINDING_KINDS)
def test_every_kind_of_finding_is_explained(kind: str) -> None:
    assert f"`{kind}`" in (DOCS / "parity.md").read_text()


def test_the_packages_named_for_ci_are_enough(tmp_path: Path) -> None:
    line = next(
        line
        for line in (DOCS / "ci.md").read_text().splitlines()
        if line.strip().startswith("pip install numpy")
    )
    named = line.split()[2:]
    their_needs = [
        "google",
        "flatbuffers",
        "packaging",
        "sympy",
        "mpmath",
        "typing_extensions",
        "pygments",
        "markdown_it",
        "mdurl",
        "colorama",
    ]
    bundle = make_tiny_bundle(tmp_path / "b")
    from moe_export.verify import verify_bundle

    verify_bundle(bundle, against=TinyReference(), save_golden=tmp_path / "golden.npz", threads=1)
    code = GUARD.format(
        allowed=["moe_export", *named, *their_needs],
        bundle=str(bundle),
        golden=str(tmp_path / "golden.npz"),
        out=str(tmp_path / "report"),
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verified against golden" in done.stdout
    assert (tmp_path / "report" / "parity.junit.xml").is_file()
