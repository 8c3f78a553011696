"""An expert-parallel bundle in one process: the ranks' graphs merged into one, run as one engine.

*Simulated*: it shows that the ranks' graphs together compute what the model computes. What carries their
exchange is not used; ``mpiexec -n RANKS moe-export verify`` uses it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..bundle.reader import Bundle
from ..errors import BundleError
from ..runtime.session import Session
from .merged_ranks import merge_ranks

MERGED = "model.onnx"
NOTE = (
    "the graphs of all {ranks} ranks ran as one, in one process; `mpiexec -n {ranks} moe-export verify` has "
    "them exchange over MPI"
)


class MergedSession(Session):
    """A :class:`Session` over all ranks of a bundle for the CPU. It takes a bundle of several ranks."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        plan = bundle.manifest.expert_parallel
        assert plan is not None
        self.merged_note = NOTE.format(ranks=plan.ranks)
        with ExitStack() as stack:
            merged = stack.enter_context(merged_bundle(bundle))
            super().__init__(merged, threads=threads)
            self._folder = stack.pop_all()

    def close(self) -> None:
        """Free the engine, and remove what was written for it."""
        super().close()
        self._folder.close()


@contextmanager
def merged_bundle(bundle: Bundle) -> Iterator[Bundle]:
    """A bundle of one rank that computes what all ranks of ``bundle`` do, for as long as the context lasts.

    It lies in a temporary folder beside ``bundle`` and shares its weights by hard links.

    Raises:
        BundleError: the ranks do not fit together.
    """
    import onnx

    manifest = bundle.manifest
    plan = manifest.expert_parallel
    assert plan is not None
    where = bundle.path.resolve().parent
    with tempfile.TemporaryDirectory(prefix=".moe-export-merged-", dir=_writable(where)) as name:
        folder = Path(name)
        models = []
        for rank in range(plan.ranks):
            own = bundle.path / plan.folder(rank)
            file = own / Path(manifest.model_file).name
            if not file.is_file():
                raise BundleError(f"bundle {bundle.path}: {plan.folder(rank)}/{file.name} is missing")
            models.append(onnx.load(file, load_external_data=False))
            _link(own, folder / plan.folder(rank))
        merged = merge_ranks(models, plan, manifest.io, manifest.moe_layers)
        (folder / MERGED).write_bytes(merged.SerializeToString())
        if bundle.tokenizer_path is not None:
            _link(bundle.tokenizer_path, folder / bundle.tokenizer_path.name)
        one = dataclasses.replace(manifest, model_file=MERGED, expert_parallel=None)
        yield Bundle(folder, one)


def _writable(folder: Path) -> Path | None:
    """``folder`` where files can be made there, so that weights can be linked; None: the usual place."""
    return folder if os.access(folder, os.W_OK) else None


def _link(source: Path, target: Path) -> None:
    """The files of a folder, linked; copied where the file system cannot."""
    target.mkdir()
    for file in source.iterdir():
        if not file.is_file():
            continue
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)
