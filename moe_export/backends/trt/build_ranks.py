"""Build the TensorRT plans of a moe-export bundle of several ranks. Needs Python 3.11 and TensorRT only.

    python build_engine.py              all ranks, in the bundle's folder, on a machine with the GPU
    python build_engine.py --check      only say whether this machine can
    python build_engine.py --rank 1     the plans of one rank; --rank may be given several times
    python build_engine.py --collect    build nothing; list plans that were built elsewhere and copied here

One GPU suffices: ranks meet when plans run. Each rank is built by its own ``rank<r>/build_engine.py``, in a
process of its own, so that memory is needed for one rank at a time. ``manifest.json`` then lists the plans.

To build on several machines: copy the bundle to each, build some ranks on each, copy ``rank<r>/*.plan`` and
``evidence/rank<r>.*`` of all into one folder, and ``--collect`` there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Failed(Exception):
    """``code``: with which to end. Empty text: the reason is printed already."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def build_rank(folder: Path, rank: int) -> None:
    """Build the plans of one rank, and write down what there is to say of each (:func:`note_of`).

    Raises:
        Failed: its script has said why.
    """
    own = folder / f"rank{rank}"
    with tempfile.TemporaryDirectory(prefix="moe-export-rank-") as name:
        result = Path(name) / "result.json"
        words = [sys.executable, "-P", str(own / "build_engine.py"), "--folder", str(own)]
        code = subprocess.run([*words, "--result", str(result)], check=False).returncode
        if code != 0:
            text = "" if code in (1, 3) else f"rank {rank}: the building process ended with {code}"
            raise Failed(text, code if code in (1, 3) else 1)
        engines = json.loads(result.read_text(encoding="utf-8"))
    for engine in engines:
        size = (own / engine["file"]).stat().st_size
        entry = {**engine, "file": f"rank{rank}/{engine['file']}", "rank": rank, "bytes": size}
        note = note_of(folder, rank, engine["file"])
        note.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


def note_of(folder: Path, rank: int, name: str) -> Path:
    """Where the entry of a rank's plan for the manifest lies."""
    return folder / "evidence" / f"rank{rank}.{name}.json"


def collect(folder: Path, ranks: Iterable[int]) -> bool:
    """Enter every plan that lies here with its note into ``manifest.json``; whether none is missing.

    Raises:
        Failed: there is none, or one is of another build than its note.
    """
    engines: list[dict[str, Any]] = []
    recipe: dict[str, Any] = {}
    for rank in ranks:
        recipe = json.loads((folder / f"rank{rank}" / "build_engine.json").read_text(encoding="utf-8"))
        for name in recipe["plans"].values():
            file, note = folder / f"rank{rank}" / name, note_of(folder, rank, name)
            if not (file.is_file() and note.is_file()):
                continue
            engine = json.loads(note.read_text(encoding="utf-8"))
            if engine.pop("bytes") != file.stat().st_size:
                raise Failed(f"rank{rank}/{name} is not the plan of evidence/{note.name}; build it again")
            engines.append(engine)
    if not engines:
        raise Failed("no plan lies here with the note of its build (evidence/rank<r>.*.plan.json)")
    return bool(_one_rank(folder).finish_manifest(folder, recipe, engines))


def _one_rank(folder: Path) -> Any:
    """The script of rank 0 as a module: it knows the manifest."""
    spec = importlib.util.spec_from_file_location("build_one_rank", folder / "rank0" / "build_engine.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: done. 1: TensorRT refuses, or files do not fit. 2: no such rank. 3: this machine lacks
    something."""
    parser = argparse.ArgumentParser(description="Build the TensorRT plans of this bundle of several ranks.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="the bundle")
    parser.add_argument("--check", action="store_true", help="only say whether this machine can")
    parser.add_argument("--rank", type=int, action="append", help="only this one; several times: only these")
    parser.add_argument("--collect", action="store_true", help="build nothing; list plans copied here")
    chosen = parser.parse_args(arguments)
    folder: Path = chosen.folder
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    ranks = range(manifest["expert_parallel"]["ranks"])
    unknown = [rank for rank in chosen.rank or () if rank not in ranks]
    if unknown:
        print(f"error: --rank {unknown[0]}: the bundle has ranks 0 to {ranks[-1]}", file=sys.stderr)
        return 2
    if chosen.check:
        script = folder / "rank0" / "build_engine.py"
        return subprocess.run([sys.executable, "-P", str(script), "--check"], check=False).returncode
    try:
        for rank in () if chosen.collect else chosen.rank or ranks:
            print(f"rank {rank} of {len(ranks)}", flush=True)
            build_rank(folder, rank)
        ready = collect(folder, ranks)
    except Failed as error:
        if str(error):
            print(f"error: {error}", file=sys.stderr)
        return error.code
    print("manifest.json lists the plans that are here" + ("" if ready else "; some are still missing"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
