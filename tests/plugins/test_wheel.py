"""What ``pip wheel`` puts into the wheel. Built without the plugin, so without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        ".",
    ]
    environment = {**os.environ, "MOE_EXPORT_CPU_PLUGIN": "off"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "moe_export"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    assert len(tracked) > 100
    missing = {name for name in tracked if (ROOT / name).is_file()} - names
    assert not missing
    assert "moe_export_plugins/__init__.py" in names
    strangers = {n for n in names if not n.startswith(("moe_export/", "moe_export_plugins/", "moe_export-"))}
    assert not strangers
    assert not [name for name in names if name.endswith((".so", ".cc", ".h", ".pyc"))]
