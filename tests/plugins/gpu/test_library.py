"""Compiled kernels of a bundle are found by what they are; damaged or unfit ones are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from moe_export_plugins.gpu.bundle_kernels import expert_specs, router_specs
from moe_export_plugins.gpu.driver import Device
from moe_export_plugins.gpu.experts import ExpertShape
from moe_export_plugins.gpu.library import INDEX, KernelLibrary, kernel_key, sm_of_file

from moe_export.errors import BundleError, EnvironmentLacksError, UsageError

from .memory_launcher import stand_in_library

SHAPE = ExpertShape("float16", num_experts=5, top_k=2, hidden=24, inner=20)
GPU = Device(89, 13000, 99 * 1024, "L4")


@pytest.fixture
def library(tmp_path: Path) -> KernelLibrary:
    return stand_in_library(tmp_path, expert_specs(SHAPE), (80, 120))


def change(library: KernelLibrary, edit: Any) -> None:
    path = library.folder / INDEX
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_which_cubin_a_gpu_runs() -> None:
    assert sm_of_file((80, 89), 89) == 89
    assert sm_of_file((80, 86), 89) == 86
    assert sm_of_file((89, 120), 80) is None
    assert sm_of_file((80,), 90) is None
    # From SM90 on kernels are for one SM only.
    assert sm_of_file((120,), 121) is None and sm_of_file((100,), 103) is None


def test_kernels_are_found_by_what_they_are(library: KernelLibrary) -> None:
    library.check(GPU)
    for spec in expert_specs(SHAPE):
        found = library.cubin(spec.kernel, spec.dtype, spec.constants, spec.tile, 89)
        assert json.loads(found.code)["tile"] == spec.tile.to_dict() and found.entry.startswith(spec.kernel)
    other = expert_specs(replace(SHAPE, hidden=32))[1]
    with pytest.raises(BundleError, match="no kernel gate_up float16 .*'hidden': 32"):
        library.cubin(other.kernel, other.dtype, other.constants, other.tile, 89)


def test_floats_count_as_onnx_keeps_them() -> None:
    import numpy as np

    spec = expert_specs(replace(SHAPE, alpha=1.702))[1]
    single = {**spec.constants, "alpha": float(np.float32(1.702))}
    assert kernel_key(spec.kernel, spec.dtype, single, spec.tile) == spec.key
    other = {**spec.constants, "alpha": 1.703}
    assert kernel_key(spec.kernel, spec.dtype, other, spec.tile) != spec.key


def test_a_gpu_without_kernels(library: KernelLibrary) -> None:
    with pytest.raises(
        BundleError, match=r"are for SM80, SM120; this GPU \(H100\) is SM90: build with --sm 90"
    ):
        library.check(Device(90, 13000, 0, "H100"))


def test_an_old_driver(library: KernelLibrary) -> None:
    library.check(Device(89, 12000, 0, "L4"))
    with pytest.raises(EnvironmentLacksError, match="need a driver for CUDA 12; this one is for CUDA 11.8"):
        library.check(Device(89, 11080, 0, "L4"))


def test_a_changed_file(library: KernelLibrary) -> None:
    spec = expert_specs(SHAPE)[0]
    (library.folder / "dispatch_0").write_bytes(b"other code")
    with pytest.raises(BundleError, match="dispatch_0 is damaged: SHA-256"):
        library.cubin(spec.kernel, spec.dtype, spec.constants, spec.tile, 89)
    (library.folder / "dispatch_0").unlink()
    with pytest.raises(BundleError, match="dispatch_0 cannot be read"):
        library.ptx(spec.kernel, spec.dtype, spec.constants, spec.tile, 80)


def test_a_file_outside_the_folder(library: KernelLibrary) -> None:
    spec = expert_specs(SHAPE)[0]

    def edit(data: Any) -> None:
        data["kernels"][0]["images"]["80"]["cubin"] = "../dispatch_0"

    change(library, edit)
    with pytest.raises(BundleError, match="leaves the folder"):
        KernelLibrary.load(library.folder).cubin(spec.kernel, spec.dtype, spec.constants, spec.tile, 80)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda d: d.update(format=2), "format 2, expected 1; build the bundle again"),
        (lambda d: d.update(kernels={}), "expected an object with a list"),
        (lambda d: d["kernels"][3].pop("tile"), r"kernels\[3\]: 'tile' is missing or wrong"),
        (lambda d: d["kernels"][0]["images"]["80"].pop("shared"), r"kernels\[0\]: 'shared' is missing"),
        (lambda d: d["kernels"][0].update(tile={"rowz": 3}), r"kernels\[0\]: .*rowz"),
    ],
)
def test_a_damaged_index(library: KernelLibrary, edit: Any, text: str) -> None:
    change(library, edit)
    with pytest.raises(BundleError, match=text):
        KernelLibrary.load(library.folder)


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="kernels.json is missing: the bundle has no compiled kernels"):
        KernelLibrary.load(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(BundleError, match="cannot be read"):
        KernelLibrary.load(tmp_path)


def test_routers_have_one_kernel_per_tile() -> None:
    specs = router_specs(
        {"num_experts": 8, "top_k": 2, "score": "sigmoid", "layer": "l", "capacity": 0}, "float32"
    )
    assert len(specs) == 3 and {s.constants["score"] for s in specs} == {"sigmoid"}
    with pytest.raises(UsageError, match="capacity is not 0"):
        router_specs({"num_experts": 8, "top_k": 2, "capacity": 4}, "float32")
