"""Opening a bundle: everything that can be checked without running it is checked here."""

from __future__ import annotations

import dataclasses
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from moe_export.bundle.manifest import EVIDENCE_FOLDER, MANIFEST_NAME, read_manifest
from moe_export.bundle.names import shown
from moe_export.bundle.onnx_safety import check_onnx_safe
from moe_export.bundle.tools import installed_version, major_minor
from moe_export.digests import digest_file
from moe_export.errors import BundleError
from moe_export.files import bytes_text, describe_path
from moe_export.progress import NullProgress, Progress
from moe_export.schema import FileEntry, Manifest

_ROOT_EXTRAS = re.compile(r"\..*|README(\.\w+)?|.*\.lock", re.IGNORECASE)


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk. From :func:`open_bundle` it has been checked."""

    path: Path
    manifest: Manifest
    rank: int = 0
    """Which rank's engine is meant, of a bundle of several ranks."""

    @property
    def model_path(self) -> Path:
        """The engine's model file."""
        parallel = self.manifest.expert_parallel
        if parallel is None:
            return self.path / self.manifest.model_file
        return self.path / parallel.folder(self.rank) / PurePosixPath(self.manifest.model_file).name

    @property
    def rank_manifest(self) -> Manifest:
        """The manifest with no plans but those of :attr:`rank`."""
        parallel = self.manifest.expert_parallel
        if parallel is None:
            return self.manifest
        own = parallel.folder(self.rank) + "/"
        engines = tuple(engine for engine in self.manifest.engines if engine.file.startswith(own))
        return dataclasses.replace(self.manifest, engines=engines)

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer's folder, or None."""
        text = self.manifest.text
        return self.path / text.tokenizer if text is not None and text.tokenizer is not None else None


def open_bundle(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    progress: Progress | None = None,
    rank: int | None = None,
) -> Bundle:
    """Read a bundle and check it: schema, paths, sizes, hashes, runtime version, hostile ONNX content.

    ``trust`` skips the hash check and nothing else. ``rank``: of a bundle of several ranks, only this rank's
    files and those of all ranks are looked at; the others' may be elsewhere.

    Files that the manifest does not list are refused, because the hashes do not cover them and a tokenizer
    loader takes whatever lies in its folder. Exempt are ``evidence/`` (reports that ``verify`` and ``bench``
    write later, never loaded), and at the top lock files, dot-files and a README (what hosting sites and file
    managers add).

    Raises:
        BundleError: the first thing that does not fit.
    """
    folder = Path(path)
    progress = progress or NullProgress()
    manifest = open_manifest(folder)
    files = _files_of_rank(manifest, rank)
    _check_files(folder, files, rank)
    _check_extras(folder, manifest)
    _check_runtime(folder, manifest)
    if not trust:
        _check_hashes(folder, files, progress)
    listed = frozenset(entry.path for entry in files)
    for entry in files:
        if entry.path.endswith(".onnx"):
            check_onnx_safe(folder / entry.path, root=folder, allowed=listed)
    return Bundle(folder, manifest, rank or 0)


def open_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the bundle ``path``; no other file is looked at.

    Raises:
        BundleError: there is no bundle, or its manifest is damaged.
    """
    folder = Path(path)
    if not os.path.isdir(folder) or not os.path.exists(folder / MANIFEST_NAME):
        raise BundleError(_not_a_bundle(folder))
    return read_manifest(folder)


def _files_of_rank(manifest: Manifest, rank: int | None) -> tuple[FileEntry, ...]:
    """The files that ``rank`` uses; None: all."""
    parallel = manifest.expert_parallel
    if parallel is None or rank is None:
        return manifest.files
    others = tuple(parallel.folder(r) + "/" for r in range(parallel.ranks) if r != rank)
    return tuple(entry for entry in manifest.files if not entry.path.startswith(others))


def _not_a_bundle(folder: Path) -> str:
    what = describe_path(folder)
    text = f"{folder} {what}, not a moe-export bundle" if os.path.exists(folder) else f"{folder} {what}"
    if "Hugging Face" in what:
        return f"{text}; build one from it with `moe-export build {folder} -o ENGINE`"
    if os.path.isfile(folder) and folder.name == MANIFEST_NAME:
        return f"{text}; name its folder, {folder.parent}"
    if os.path.isdir(folder):
        text += f" (no {MANIFEST_NAME})"
    return f"{text}; a bundle is a folder that `moe-export build SOURCE -o FOLDER` writes"


def _check_files(folder: Path, files: tuple[FileEntry, ...], rank: int | None) -> None:
    root = folder.resolve()
    faults = []
    for entry in files:
        path = folder / entry.path
        try:
            if not path.resolve().is_relative_to(root):
                faults.append(
                    f"{entry.path} is a link that leaves the folder (copy the bundle with `cp -rL`)"
                )
                continue
            info = path.stat()
        except FileNotFoundError:
            faults.append(f"{entry.path} is missing")
        except (OSError, RuntimeError) as error:
            faults.append(f"{entry.path} cannot be read ({error})")
        else:
            if not stat.S_ISREG(info.st_mode):
                faults.append(f"{entry.path} is not a file")
            elif info.st_size != entry.size:
                faults.append(f"{entry.path} has {info.st_size} bytes instead of {entry.size}")
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        which = "" if rank is None else f" (rank {rank} needs its own files and those of all ranks)"
        raise BundleError(
            f"bundle {folder} is damaged: {'; '.join(faults[:3])}{more}; copy or build it again{which}"
        )


def _check_extras(folder: Path, manifest: Manifest) -> None:
    listed = {entry.path for entry in manifest.files} | {MANIFEST_NAME}
    extras = []
    for where, folders, names in os.walk(folder):
        at = Path(where).relative_to(folder)
        if at == Path():
            folders[:] = [name for name in folders if name != EVIDENCE_FOLDER and not name.startswith(".")]
            names = [name for name in names if not _ROOT_EXTRAS.fullmatch(name)]
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        paths = ((at / name).as_posix() for name in (*names, *links))
        extras += [path for path in paths if path not in listed]
    if extras:
        extras.sort()
        more = f" and {len(extras) - 3} more" if len(extras) > 3 else ""
        raise BundleError(
            f"bundle {folder} holds files that its manifest does not list: "
            f"{', '.join(shown(path) for path in extras[:3])}{more}; nothing vouches for them, so move them "
            "away "
            f"(reports and notes may lie in {EVIDENCE_FOLDER}/)"
        )


def _check_hashes(folder: Path, files: tuple[FileEntry, ...], progress: Progress) -> None:
    with progress.stage("check hashes", sum(entry.size for entry in files)) as advance:
        for entry in files:
            try:
                found = digest_file(folder / entry.path, advance, block=entry.block)
            except OSError as error:
                raise BundleError(
                    f"bundle {folder}: {entry.path} cannot be read: {error.strerror}"
                ) from error
            if found != entry.sha256:
                raise BundleError(
                    f"bundle {folder} is damaged: {entry.path} ({bytes_text(entry.size)}) has SHA-256 "
                    f"{found[:12]}… "
                    f"instead of {entry.sha256[:12]}…; copy or build it again (--trust skips this check)"
                )


def _check_runtime(folder: Path, manifest: Manifest) -> None:
    built = manifest.tools.get("onnxruntime", "")
    installed = installed_version("onnxruntime") or ""
    needs, has = major_minor(built), major_minor(installed)
    if needs is not None and has is not None and needs > has:
        raise BundleError(
            f"bundle {folder} was built for onnxruntime {built}, installed is {installed}; upgrade "
            "onnxruntime to "
            f"{needs[0]}.{needs[1]} or later, or build the bundle again here"
        )
