"""Golden files: inputs and the reference's answers in one ``.npz``, so that CI verifies without torch and
source."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .inputs import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..schema import Manifest
    from ..trace import LayerTrace, TracedRun

GOLDEN_SCHEMA_VERSION = 1
FORMAT = "moe-export golden"
_META = "metadata"
_LAYER_FIELDS = ("expert_ids", "weights", "hidden", "output", "logits")


@dataclass(frozen=True)
class Golden:
    """Cases and the reference's run of each (same order), and the metadata they were written with."""

    cases: tuple[Case, ...]
    references: tuple[TracedRun, ...]
    metadata: dict[str, Any]


def save_golden(
    path: str | os.PathLike[str],
    manifest: Manifest,
    cases: Sequence[Case],
    references: Sequence[TracedRun],
    seed: int,
    notes: Sequence[str] = (),
) -> None:
    """Write a golden file, replacing one that is there; a crash leaves the old one.

    Raises:
        UsageError: the name does not end in ``.npz``, or the file cannot be written.
    """
    import datetime
    import tempfile

    import numpy as np

    from ..bundle.tools import tool_versions

    path = Path(path)
    check_golden_target(path)
    store = _Store()
    runs: dict[int, int] = {}
    stored_runs: list[dict[str, Any]] = []
    stored_cases = []
    for case, run in zip(cases, references, strict=True):
        if id(run) not in runs:
            runs[id(run)] = len(stored_runs)
            stored_runs.append(_run_entry(run, store))
        stored_cases.append(
            {
                "name": case.name,
                "description": case.description,
                "tags": list(case.tags),
                "seed": case.seed,
                "chunks": list(case.chunks),
                "run": runs[id(run)],
                "inputs": {name: store.add(value) for name, value in case.inputs.items()},
            }
        )
    metadata = {
        "format": FORMAT,
        "schema_version": GOLDEN_SCHEMA_VERSION,
        **_identity(manifest),
        "source": {"model_type": manifest.source.model_type, "class_name": manifest.source.class_name},
        "reference_dtype": "float32",
        "seed": seed,
        "notes": list(notes),
        "tools": tool_versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cases": stored_cases,
        "runs": stored_runs,
        "arrays": store.table,
    }
    text = json.dumps(metadata, sort_keys=True).encode()
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as stream:
            temporary = Path(stream.name)
            try:
                arrays: dict[str, Any] = {_META: np.frombuffer(text, np.uint8), **store.arrays}
                np.savez_compressed(stream, **arrays)
                stream.close()
                temporary.chmod(0o644)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"golden file {path} cannot be written: {error.strerror or error}") from error


def load_golden(path: str | os.PathLike[str]) -> Golden:
    """Read a golden file completely and check it against its own table. No pickle is loaded, torch is not
    needed.

    Raises:
        UsageError: no such file, not a golden file, of a newer schema, damaged or cut short.
    """
    import numpy as np

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"golden file {path} {'is not a file' if path.exists() else 'does not exist'}")
    damage = (
        zipfile.BadZipFile,
        zlib.error,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        RecursionError,
    )
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile) or _META not in archive.files:
                raise UsageError(f"{path} is not a golden file of moe-export (no {_META!r} in it)")
            metadata = json.loads(bytes(archive[_META]))
            _check_format(path, metadata)
            arrays = _Arrays(archive, metadata["arrays"])
            runs = [_read_run(entry, arrays) for entry in metadata["runs"]]
            cases = tuple(_read_case(entry, arrays) for entry in metadata["cases"])
            references = tuple(runs[entry["run"]] for entry in metadata["cases"])
    except OSError as error:
        raise UsageError(f"golden file {path} cannot be read: {error.strerror or error}") from error
    except damage as error:
        raise UsageError(
            f"golden file {path} is damaged ({error}); write it again (moe-export verify --save-golden)"
        ) from error
    return Golden(cases, references, metadata)


def check_golden_fits(golden: Golden, manifest: Manifest, path: str | os.PathLike[str]) -> None:
    """Refuse a golden of another model.

    Raises:
        UsageError: source hash, task, inputs and outputs, or MoE layers differ; the first difference is
        named.
    """
    mine = json.loads(json.dumps(_identity(manifest)))
    names = {
        "source_hash": "was made from another source model",
        "task": "is for another task",
        "io": "has other inputs or outputs",
        "moe_layers": "has other MoE layers",
    }
    for field, words in names.items():
        theirs = golden.metadata.get(field)
        if theirs != mine[field]:
            raise UsageError(
                f"golden file {path} {words} than the bundle: {_short(theirs)} in the golden, "
                f"{_short(mine[field])} in the bundle; write a new one (moe-export verify --save-golden)"
            )


def check_golden_target(path: Path) -> None:
    """Before a long run: can ``path`` be written, and will it be known for a golden?

    Raises:
        UsageError: the name does not end in ``.npz``, it is a folder, or its folder cannot be written.
    """
    if path.suffix != ".npz":
        raise UsageError(
            f"golden file {path}: the name must end in .npz, so that --against knows it for a golden"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"golden file {path} cannot be written: {error.strerror or error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        what = "it is a folder" if path.is_dir() else "its folder is read-only"
        raise UsageError(f"golden file {path} cannot be written: {what}")


def _identity(manifest: Manifest) -> dict[str, Any]:
    """What must be equal for a golden to speak about a bundle (limits, dtype and target may differ)."""
    return {
        "source_hash": manifest.source.hash,
        "task": manifest.task,
        "io": {
            "inputs": sorted(t.name for t in manifest.io.inputs if t.role not in ("cache", "positions")),
            "outputs": sorted(t.name for t in manifest.io.outputs if t.role != "cache"),
        },
        "moe_layers": [[m.index, m.name, m.num_experts, m.top_k] for m in manifest.moe_layers],
    }


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _check_format(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise UsageError(f"{path} is not a golden file of moe-export")
    version = metadata.get("schema_version")
    if version != GOLDEN_SCHEMA_VERSION:
        raise UsageError(
            f"golden file {path} has schema version {version!r}, this moe-export reads "
            f"{GOLDEN_SCHEMA_VERSION}; update moe-export or write the golden again"
        )


class _Store:
    """Arrays to be written, by key, and the table that says what each is."""

    def __init__(self) -> None:
        self.arrays: dict[str, Any] = {}
        self.table: dict[str, dict[str, Any]] = {}

    def add(self, value: NDArray[Any]) -> str:
        import numpy as np

        key = f"a{len(self.arrays)}"
        self.table[key] = {"dtype": value.dtype.name, "shape": list(value.shape)}
        # The file format has no bfloat16.
        self.arrays[key] = value.view(np.uint16) if value.dtype.name == "bfloat16" else value
        return key


class _Arrays:
    """Reads arrays by key and refuses one that is not what the table says."""

    def __init__(self, archive: Mapping[str, Any], table: Mapping[str, Any]) -> None:
        self._archive, self._table = archive, table

    def __getitem__(self, key: str) -> NDArray[Any]:
        entry = self._table[key]
        value: NDArray[Any] = self._archive[key]
        if entry["dtype"] == "bfloat16":
            import ml_dtypes

            value = value.view(ml_dtypes.bfloat16)
        if value.dtype.name != entry["dtype"] or list(value.shape) != entry["shape"]:
            raise ValueError(
                f"array {key} is {value.dtype.name} {list(value.shape)}, its table says {entry['dtype']} "
                f"{entry['shape']}"
            )
        return value


def _run_entry(run: TracedRun, store: _Store) -> dict[str, Any]:
    return {
        "outputs": {name: store.add(value) for name, value in run.outputs.items()},
        "layers": [
            {
                "index": layer.index,
                "name": layer.name,
                **{f: store.add(v) for f in _LAYER_FIELDS if (v := getattr(layer, f)) is not None},
            }
            for layer in run.layers
        ],
    }


def _read_run(entry: dict[str, Any], arrays: _Arrays) -> TracedRun:
    from ..trace import TracedRun

    outputs = {name: arrays[key] for name, key in entry["outputs"].items()}
    return TracedRun(outputs, tuple(_read_layer(layer, arrays) for layer in entry["layers"]))


def _read_layer(entry: dict[str, Any], arrays: _Arrays) -> LayerTrace:
    from ..trace import LayerTrace

    fields = {f: arrays[entry[f]] for f in _LAYER_FIELDS if f in entry}
    return LayerTrace(index=int(entry["index"]), name=str(entry["name"]), **fields)


def _read_case(entry: dict[str, Any], arrays: _Arrays) -> Case:
    return Case(
        name=str(entry["name"]),
        description=str(entry["description"]),
        tags=tuple(str(t) for t in entry["tags"]),
        inputs={name: arrays[key] for name, key in entry["inputs"].items()},
        seed=entry["seed"],
        chunks=tuple(int(c) for c in entry["chunks"]),
    )
