"""Launches through the real cuda-bindings, on a libcuda that records what it is given; and refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from moe_export_plugins.gpu.driver import CudaDriver

from moe_export.backends.trt.build_engine import gpu_sm
from moe_export.errors import EnvironmentLacksError

pytest.importorskip("cuda.bindings", reason="pip install 'moe-export[gpu]'")
SOURCE = Path(__file__).with_name("recording_libcuda.c")
COMPILER = shutil.which("cc")

LAUNCH = """
from moe_export_plugins.gpu.contract import Launch
from moe_export_plugins.gpu.driver import CudaDriver
driver = CudaDriver()
driver.open(0)
device = driver.device()
assert driver.device() is device
assert (device.sm, device.driver, device.shared_limit, device.name) == (89, 13000, 101376, "recorder"), device
for image, shared in ((b"\\x7fELFabcdef", 60000), (b"\\x7fELFabcdef", 1024), (b"//  ptx text", 0)):
    kernel = driver.load(image, "entry", shared)
    launch = Launch((3, 2, 1), 128, (-5,), ())
    given = launch.arguments([("a", "pointer"), ("n", "int32"), ("b", "pointer")], {"a": 2**40 + 1, "b": 9})
    driver.launch(kernel, launch, shared, 77, given)
"""
OPEN = """
from moe_export.errors import MoeExportError
from moe_export_plugins.gpu.driver import CudaDriver
try:
    driver = CudaDriver()
    driver.open(0)
    driver.load(b"\\x7fELFabcdef", "missing", 0)
except MoeExportError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler on Linux")
    folder = tmp_path_factory.mktemp("libcuda")
    command = [
        COMPILER,
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-o",
        str(folder / "libcuda.so.1"),
    ]
    subprocess.run([*command, str(SOURCE)], check=True)
    return folder


def run(library: Path, code: str, record: Path, **more: str) -> str:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "RECORD_FILE": str(record), **more}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_the_driver_is_given(library: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    run(library, LAUNCH, record, PARAMETER_BYTES="8,4,8")
    launched = "launch 0x33 3,2,1 128,1,1 {} 0x4d (nil) 1099511627777 -5 9"
    assert record.read_text().splitlines() == [
        # The device is looked at once per context.
        "device",
        # A library is loaded once; shared memory is asked for only above 48 KiB; PTX ends in a NUL.
        "load ELFa 6 0 0",
        "kernel 0x11 entry",
        "device",
        "attribute 8 60000 0x22 0",
        launched.format(60000),
        "kernel 0x11 entry",
        launched.format(1024),
        "load /  p 8 0 0",
        "kernel 0x11 entry",
        launched.format(0),
    ]


@pytest.mark.parametrize(
    ("machine", "text"),
    [
        ({}, "CudaError CUDA driver: cuLibraryGetKernel failed with CUDA_ERROR_NOT_FOUND (500)"),
        ({"NO_DEVICE": "1"}, "EnvironmentLacksError the NVIDIA driver sees no GPU"),
        (
            {"INIT_FAILS": "1"},
            "EnvironmentLacksError no GPU that the NVIDIA driver can use: CUDA driver: cuInit",
        ),
    ],
)
def test_faults_are_one_line(library: Path, machine: dict[str, str], text: str, tmp_path: Path) -> None:
    told = run(library, OPEN, tmp_path / "record", **machine)
    assert told.startswith(text) and len(told.splitlines()) == 1


@pytest.mark.skipif(gpu_sm() is not None, reason="this machine has a GPU")
def test_without_a_driver() -> None:
    with pytest.raises(EnvironmentLacksError, match="no NVIDIA driver on this machine"):
        CudaDriver()
