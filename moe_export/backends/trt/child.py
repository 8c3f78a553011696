"""Run the builder in a process of its own: TensorRT ends its process on some errors, and keeps memory on
others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_export.errors import BuildError, EnvironmentLacksError
from moe_export.schema import EngineFile, from_json

from . import build_engine
from .library import make_link_folder

_LAST_LINES = 5
_MEMORY_PER_WEIGHT = 2.9
"""Resident memory of a build, in sizes of the weights; measured on RTX."""


def run_builder(recipe: Mapping[str, Any], folder: Path) -> tuple[EngineFile, ...]:
    """Build what ``recipe`` says into ``folder``, which holds the ONNX model.

    Raises:
        BuildError: TensorRT refused, or its process died; its last words.
        EnvironmentLacksError: this machine cannot build these plans.
    """
    with tempfile.TemporaryDirectory(prefix="moe-export-trt-") as name:
        work = Path(name)
        links = work / "lib"
        links.mkdir()
        (work / "recipe.json").write_text(json.dumps(recipe), encoding="utf-8")
        result = work / "result.json"
        command = [sys.executable, "-P", build_engine.__file__, "--folder", str(folder)]
        command += ["--recipe", str(work / "recipe.json"), "--result", str(result)]
        environment = make_link_folder(recipe["library"], links)
        with (work / "log").open("wb") as log:
            child = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
            )
            try:
                code = child.wait()
            finally:
                # Ctrl-C or SIGTERM here: the child must not go on writing into a folder that is being
                # removed.
                if child.poll() is None:
                    child.kill()
                    child.wait()
        if code != 0:
            raise _failure(code, (work / "log").read_text(encoding="utf-8", errors="replace"), recipe, folder)
        engines: tuple[EngineFile, ...] = from_json(
            tuple[EngineFile, ...], json.loads(result.read_text(encoding="utf-8")), "engines"
        )
        return engines


def _failure(code: int, log: str, recipe: Mapping[str, Any], folder: Path) -> Exception:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = lines[-1].removeprefix("error: ") if lines else "it said nothing"
    if code == 3:
        return EnvironmentLacksError(last)
    library = recipe["library"]
    if code == 1 and lines and lines[-1].startswith("error: "):
        return BuildError(f"{library}: {last}")
    words = " | ".join(lines[-_LAST_LINES:]) or "it said nothing"
    if code == -signal.SIGKILL:
        size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
        needs = size * _MEMORY_PER_WEIGHT / 2**30
        return BuildError(
            f"{library}: the building process was killed, most likely for lack of memory (a build takes "
            "about "
            f"{needs:.1f} GiB for these weights); last words: {words}"
        )
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return BuildError(f"{library}: the building process ended with {how}; last words: {words}")
