"""Fetch ONNX Runtime's C headers from a package of the Python index that carries them.

    python fetch_ort_headers.py FOLDER

ONNX Runtime's own wheels hold no headers. ``amd-quark`` (MIT) holds those of API 17, which are enough: the
C API only grows. pip downloads the wheel without its dependencies, its SHA-256 is compared, and only the
headers and the licence are unpacked into FOLDER.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

REQUIREMENT = "amd-quark==0.13"
WHEEL_SHA256 = "3b3e58a4cbbcff20d27815b641aa4de4d698efde3c782306cb4a6a05bcf55c8c"
HEADERS = "quark/onnx/operators/custom_ops/include/onnxruntime-1.17.0/onnxruntime/core/session/"
LICENSE = "amd_quark-0.13.dist-info/licenses/LICENSE"


def main() -> int:
    """Exit code 0 when the headers lie in the folder; otherwise a message on standard error."""
    if len(sys.argv) != 2:
        print("usage: fetch_ort_headers.py FOLDER", file=sys.stderr)
        return 2
    try:
        fetch(Path(sys.argv[1]))
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        print(f"fetch_ort_headers.py: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(folder: Path) -> None:
    """Download, check and unpack.

    Raises:
        RuntimeError: pip failed, or the wheel is not the one whose hash is known.
    """
    with tempfile.TemporaryDirectory() as temporary:
        wheel = download(Path(temporary))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise RuntimeError(f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if (name.startswith(HEADERS) and name.endswith(".h")) or name == LICENSE:
                    (folder / PurePosixPath(name).name).write_bytes(archive.read(name))


def download(folder: Path) -> Path:
    """The wheel, downloaded into ``folder`` by pip."""
    arguments = ["download", "--quiet", "--disable-pip-version-check", "--no-deps",
                 "--ignore-requires-python", "--only-binary", ":all:", "--dest", str(folder),
                 REQUIREMENT]  # fmt: skip
    # Inside pip's own build isolation only -I sees the pip of the environment it runs in.
    said = []
    for command in ([sys.executable, "-m", "pip"], [sys.executable, "-I", "-m", "pip"], ["pip"], ["pip3"]):
        try:
            done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            continue
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        said.append(f"{' '.join(command)} download {REQUIREMENT}: {(done.stderr or done.stdout).strip()}")
        if "No module named pip" not in done.stderr:
            break
    raise RuntimeError("\n".join(said) or "pip was not found")


if __name__ == "__main__":
    sys.exit(main())
