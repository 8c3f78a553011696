"""The ahead-of-time plugins with kernels compiled for real: a plan would hold PTX of one function that takes
exactly the arguments TensorRT passes."""

from __future__ import annotations

import re

import pytest
from moe_export_plugins.gpu.aot import register
from moe_export_plugins.gpu.aot_plugins import PLUGINS, SHARING
from moe_export_plugins.gpu.bundle_kernels import CompilerSource

from .qdp_host import nvidia_plugin_api
from .test_aot_contract import driven

pytest.importorskip("triton", reason="pip install 'moe-export[gpu]'")

CASES = [("GateUp", "float16", 80), ("Combine", "bfloat16", 120)]
SLOW = [
    (name, dtype, sm)
    for name in PLUGINS
    for dtype, sm in (("float32", 89), ("bfloat16", 100), ("float16", 90))
]


def check(name: str, dtype: str, sm: int) -> None:
    plugin = PLUGINS[name]
    with nvidia_plugin_api() as trt:
        register(trt, CompilerSource(sm))
        found, constants, _ = driven(trt, plugin, dtype, 16 if plugin.kernel in SHARING else None)
    for launch in found.launches.values():
        text = launch.code.decode()
        (entry,) = re.findall(r"\.entry\s+(\w+)\s*\(([^)]*)\)", text)
        sizes = re.findall(r"\.param\s+\.([a-z])(\d+)", entry[1])
        # Inputs, then the scalars, then outputs, as TensorRT passes them; none that Triton would append.
        wanted = [("64" if kind == "pointer" else "32") for _, kind in plugin.contract.parameters(constants)]
        assert entry[0] == launch.name and [bits for _, bits in sizes] == wanted
        assert len(wanted) == len(plugin.inputs) + len(launch.scalars) + len(plugin.contract.outputs)
        assert re.search(rf"\.target sm_{sm}a?\b", text)
        assert launch.shared.get_constant_value() <= 48 * 1024


@pytest.mark.parametrize(("name", "dtype", "sm"), CASES)
def test_ptx_of_a_plan(name: str, dtype: str, sm: int) -> None:
    check(name, dtype, sm)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "sm"), SLOW)
def test_ptx_of_every_plugin(name: str, dtype: str, sm: int) -> None:
    check(name, dtype, sm)
