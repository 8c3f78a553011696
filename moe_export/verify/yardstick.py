"""What a bundle is verified against: a running reference, a source model, or a golden file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..files import describe_path, runs_code
from .golden import Golden, check_golden_fits, load_golden
from .inputs import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..schema import Manifest
    from ..trace import Reference, TracedRun


class Yardstick:
    """Gives the reference's run of a case. ``kind``: ``reference``, ``source`` or ``golden``; ``name`` says
    which."""

    def __init__(
        self, kind: str, name: str, *, reference: Reference | None = None, golden: Golden | None = None
    ) -> None:
        self.kind, self.name, self.golden = kind, name, golden
        self._reference = reference
        self._runs: dict[str, TracedRun] = {}

    def cases(self, manifest: Manifest) -> tuple[list[Case], list[str]] | None:
        """A golden's own cases within the engine's limits, and notes on those left out; None: make them."""
        if self.golden is None:
            return None
        fitting = [c for c in self.golden.cases if not _too_large(c, manifest)]
        notes = list(self.golden.metadata.get("notes", ()))
        notes += [
            f"case {c.name!r} of the golden was left out: {_too_large(c, manifest)}"
            for c in self.golden.cases
            if _too_large(c, manifest)
        ]
        if not fitting:
            raise UsageError(
                f"golden file {self.name}: every case is beyond the engine's limits; write a new one"
            )
        return fitting, notes

    def run(self, case: Case) -> TracedRun:
        """The reference's run of the whole input in one piece; equal inputs are run once."""
        if self.golden is not None:
            return self.golden.references[[c.name for c in self.golden.cases].index(case.name)]
        key = _digest(case.inputs)
        if key not in self._runs:
            if self._reference is None:
                raise UsageError("nothing to verify against")
            self._runs[key] = self._reference.run({k: _plain(v) for k, v in case.inputs.items()})
        return self._runs[key]

    def forget(self, later: Sequence[Case]) -> None:
        """Drop runs that none of the ``later`` cases needs."""
        needed = {_digest(c.inputs) for c in later}
        self._runs = {k: v for k, v in self._runs.items() if k in needed}


def find_yardstick(against: Reference | str | os.PathLike[str] | None, manifest: Manifest) -> Yardstick:
    """Resolve what the user gave (None: the source that the manifest records).

    Raises:
        UsageError: there is nothing there, or a golden file does not fit the bundle.
        SourceError: the source model cannot be loaded.
    """
    if against is None:
        recorded = manifest.source.path
        if recorded is None:
            raise UsageError(
                "the bundle does not record where its source model is; name it (--against FOLDER) or a "
                "golden file (--against FILE.npz)"
            )
        if runs_code(recorded):
            raise UsageError(
                f"the bundle was built from {recorded}; code that a manifest names is not run unasked: name "
                f"it yourself if you trust it (--against {recorded}), or a golden file (--against FILE.npz)"
            )
        if not Path(recorded).exists():
            raise UsageError(
                f"the source model {recorded} that the bundle was built from does not exist here; name its "
                "folder (--against FOLDER) or a golden file (--against FILE.npz)"
            )
        against = recorded
    if not isinstance(against, (str, os.PathLike)):
        return Yardstick("reference", type(against).__name__, reference=against)
    path = Path(against)
    if path.suffix == ".npz":
        golden = load_golden(path)
        check_golden_fits(golden, manifest, path)
        return Yardstick("golden", str(path), golden=golden)
    if path.is_file():
        raise UsageError(
            f"{path} {describe_path(path)}; verify against a model folder or a golden file (.npz)"
        )
    from ..models.reference import load_reference

    return Yardstick("source", str(path), reference=load_reference(path, manifest))


def _too_large(case: Case, manifest: Manifest) -> str:
    """Why the engine may not take the case; empty when it may."""
    limits = manifest.limits
    if manifest.task == "module":
        return ""
    for name, value in case.inputs.items():
        if value.ndim != 2:
            continue
        if limits.max_batch is not None and value.shape[0] > limits.max_batch:
            return f"{name} has batch {value.shape[0]}, the engine takes {limits.max_batch}"
        if limits.max_sequence is not None and value.shape[1] > limits.max_sequence:
            return f"{name} has length {value.shape[1]}, the engine takes {limits.max_sequence}"
    return ""


def _digest(inputs: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(inputs):
        value = inputs[name]
        digest.update(f"{name}:{value.dtype.name}:{value.shape};".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _plain(value: NDArray[Any]) -> NDArray[Any]:
    """Inputs as the float32 reference takes them: low-precision floats widened, their values unchanged."""
    import numpy as np

    low = value.dtype.name in ("float16", "bfloat16")
    return value.astype(np.float32) if low else value
