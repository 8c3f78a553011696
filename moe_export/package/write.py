"""Writing a package: whole or not at all, from a bundle whose hashes were checked."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import moe_export
from moe_export.bundle import Bundle, open_bundle
from moe_export.bundle.folder_writer import FolderWriter
from moe_export.errors import UsageError
from moe_export.files import sha256_file
from moe_export.package.base import Package, PackageOptions, Plan
from moe_export.package.registry import get_format
from moe_export.progress import NullProgress, Progress

RECORD = "package.json"
"""At the top of a package: its format, model, source, and all files with their hashes."""
_LINKED_FROM = 1 << 20
"""Bytes from which a file of the bundle is linked instead of copied."""
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES})


class PackageWriter(FolderWriter):
    """Makes the folder of a package, whole or not at all."""

    what = "package"
    plural = "packages"
    marker = RECORD
    marker_key = "package_version"


def package_bundle(
    bundle: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    format: str = "triton",
    name: str | None = None,
    server_path: str = "/models",
    gpus: Iterable[int] | None = None,
    sm: int | None = None,
    overwrite: bool = False,
    trust: bool = False,
    progress: Progress | None = None,
) -> Package:
    """Write ``bundle`` into the folder ``output`` as a server of ``format`` wants it.

    Large files of the bundle are shared by hard links where that is possible; all else is copied.

    Args:
        bundle: the bundle's folder; its hashes are checked first (``trust`` skips that, and nothing else).
        format: one of :data:`FORMATS`.
        name: the model's name on the server; None: that of the bundle's folder.
        server_path: where the server will see ``output``.
        gpus: ids of the GPUs to run on; of an expert-parallel bundle one per rank.
        sm: whose plans, of an expert-parallel bundle with plans for several.
        overwrite: replace a package that is there; another kind of folder is never replaced.

    Raises:
        UsageError: the output exists, or the bundle or the options do not fit the format.
        BundleError: the bundle is damaged.
        EnvironmentLacksError: no space, or something that the package needs is not on this machine.
    """
    kind = get_format(format)
    options = PackageOptions(name, server_path, None if gpus is None else tuple(gpus), sm)
    progress = progress or NullProgress()
    writer = PackageWriter(output, overwrite=overwrite, progress=progress)
    writer.check()
    source, target = Path(bundle).resolve(), Path(output).resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise UsageError(f"{output} and the bundle {bundle} lie in each other; choose another -o")
    opened = open_bundle(bundle, trust=trust, progress=progress)
    plan = kind.plan(opened, options)
    with writer:
        with progress.stage(f"write the {format} package"):
            _fill(writer.path, plan, opened.path)
            record = _record(writer.path, plan, opened, format)
            (writer.path / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        path = writer.place()
    for note in plan.notes:
        progress.note(note)
    return Package(path, format, plan.model, plan.backend, plan.notes)


def _fill(folder: Path, plan: Plan, bundle: Path) -> None:
    for relative, source in plan.files.items():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        _take(source.resolve(), target, shared=source.is_relative_to(bundle))
    for relative, text in plan.texts.items():
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    for relative, points_to in plan.links.items():
        (folder / relative).symlink_to(points_to)


def _take(source: Path, target: Path, shared: bool) -> None:
    """Give a large file of the bundle a second name; copy other files, and where there can be no such "
    "name."""
    if shared and source.stat().st_size >= _LINKED_FROM:
        try:
            os.link(source, target)
            return
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
    shutil.copyfile(source, target)


def _record(folder: Path, plan: Plan, bundle: Bundle, format: str) -> dict[str, object]:
    known = {(bundle.path / entry.path): entry.sha256 for entry in bundle.manifest.files if not entry.block}
    files = []
    for relative in sorted([*plan.files, *plan.texts]):
        source = plan.files.get(relative)
        digest = known.get(source) if source is not None else None
        path = folder / relative
        files.append(
            {"path": relative, "size": path.stat().st_size, "sha256": digest or sha256_file(path)}
        )
    return {
        "package_version": 1,
        "format": format,
        "model": plan.model,
        "backend": plan.backend,
        "source": bundle.manifest.source.hash,
        "moe_export": moe_export.__version__,
        "notes": list(plan.notes),
        "files": files,
    }
