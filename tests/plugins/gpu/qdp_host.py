"""Drives NVIDIA's own ``tensorrt.plugin`` sources without the native library, which cannot be had here.

Only the native module is a stub: plain holders for enums, descriptors and the registry, and dimension
expressions that evaluate. Everything that decides what a quickly deployable plugin may look like (signature
checks, shapes, format combinations, tactics, launch parameters, argument order) is NVIDIA's code.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DYNAMIC = -1


class Expression:
    """``IDimensionExpr``: a number, or a function of named sizes."""

    def __init__(self, value: int | Callable[[Mapping[str, int]], int]) -> None:
        self._value = value

    def is_constant(self) -> bool:
        return isinstance(self._value, int)

    def get_constant_value(self) -> int:
        if not isinstance(self._value, int):
            raise RuntimeError("not a constant")
        return self._value

    def at(self, sizes: Mapping[str, int]) -> int:
        return self._value if isinstance(self._value, int) else self._value(sizes)


class DimensionOperation(enum.Enum):
    SUM = "sum"
    PROD = "prod"
    MAX = "max"
    MIN = "min"
    SUB = "sub"
    EQUAL = "equal"
    LESS = "less"
    FLOOR_DIV = "floor_div"
    CEIL_DIV = "ceil_div"


_OPERATIONS: dict[DimensionOperation, Callable[[int, int], int]] = {
    DimensionOperation.SUM: lambda a, b: a + b,
    DimensionOperation.PROD: lambda a, b: a * b,
    DimensionOperation.MAX: max,
    DimensionOperation.MIN: min,
    DimensionOperation.SUB: lambda a, b: a - b,
    DimensionOperation.EQUAL: lambda a, b: int(a == b),
    DimensionOperation.LESS: lambda a, b: int(a < b),
    DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
    DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
}


class ExprBuilder:
    def constant(self, value: int) -> Expression:
        return Expression(int(value))

    def operation(self, operation: DimensionOperation, first: Expression, second: Expression) -> Expression:
        apply = _OPERATIONS[operation]
        if first.is_constant() and second.is_constant():
            return Expression(apply(first.get_constant_value(), second.get_constant_value()))
        return Expression(lambda sizes: apply(first.at(sizes), second.at(sizes)))


def _enum(name: str, members: Sequence[str]) -> Any:
    return enum.Enum(name, list(members))


class _Holder:
    """Base of the classes that NVIDIA's Python derives from."""

    def __init__(self, *_args: Any) -> None:
        pass


class _PluginField:
    def __init__(self, name: str, data: Any = None, type: Any = None) -> None:
        self.name, self.data, self.type = name, data, type


class _DimsExprs(list[Expression]):
    def __init__(self, given: int | Sequence[Expression]) -> None:
        super().__init__([Expression(0)] * given if isinstance(given, int) else given)


@dataclass
class PluginTensorDesc:
    dims: tuple[int, ...] = ()
    type: Any = None
    format: Any = None
    scale: float = -1.0


@dataclass
class DynamicPluginTensorDesc:
    desc: PluginTensorDesc
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


class _Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str = "") -> bool:
        key = (creator.name, creator.plugin_version, namespace)
        if key in self.creators:
            return False
        self.creators[key] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str = "") -> Any:
        return self.creators.get((name, version, namespace))


def _native() -> types.ModuleType:
    """The stub of the native ``tensorrt`` module."""
    trt = types.ModuleType("tensorrt")
    trt.__path__ = []
    for name in (
        "IPluginV3",
        "IPluginV3QuickCore",
        "IPluginV3QuickBuild",
        "IPluginV3QuickRuntime",
        "IPluginV3QuickAOTBuild",
        "IPluginCreatorV3Quick",
        "ISymExpr",
        "ITensor",
        "IExprBuilder",
    ):
        setattr(trt, name, type(name, (_Holder,), {}))
    data_types = _enum(
        "DataType", ("FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64")
    )
    registry = _Registry()

    class Logger(_Holder):
        WARNING = 2

        def log(self, *_args: Any) -> None:
            pass

    class PluginFieldCollection(list[Any]):
        pass

    class Dims(tuple[int, ...]):
        MAX_DIMS = 8

    given: dict[str, Any] = {
        "__version__": "11.4.0.106",
        "Logger": Logger,
        "DataType": data_types,
        "float32": data_types.FLOAT,
        "float16": data_types.HALF,
        "bfloat16": data_types.BF16,
        "int32": data_types.INT32,
        "int64": data_types.INT64,
        "TensorFormat": _enum("TensorFormat", ("LINEAR", "HWC", "CHW32")),
        "PluginFieldType": _enum(
            "PluginFieldType",
            ("FLOAT16", "FLOAT32", "FLOAT64", "INT8", "INT16", "INT32", "CHAR", "DIMS", "UNKNOWN", "INT64"),
        ),
        "PluginField": _PluginField,
        "PluginFieldCollection": PluginFieldCollection,
        "PluginTensorDesc": PluginTensorDesc,
        "DynamicPluginTensorDesc": DynamicPluginTensorDesc,
        "IDimensionExpr": Expression,
        "DimensionOperation": DimensionOperation,
        "DimsExprs": _DimsExprs,
        "Dims": Dims,
        "PluginArgType": _enum("PluginArgType", ("INT",)),
        "PluginArgDataType": _enum("PluginArgDataType", ("INT8", "INT16", "INT32")),
        "TensorRTPhase": _enum("TensorRTPhase", ("BUILD", "RUNTIME")),
        "QuickPluginCreationRequest": _enum(
            "QuickPluginCreationRequest",
            ("UNKNOWN", "PREFER_JIT", "PREFER_AOT", "STRICT_JIT", "STRICT_AOT"),
        ),
        "get_plugin_registry": lambda: registry,
    }
    for name, value in given.items():
        setattr(trt, name, value)
    return trt


def sources() -> Path:
    """The folder of NVIDIA's sources, found without importing the package (its native library is absent)."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    assert spec is not None and spec.submodule_search_locations, "pip install tensorrt-cu13-bindings"
    return Path(next(iter(spec.submodule_search_locations))) / "plugin"


@contextmanager
def nvidia_plugin_api() -> Iterator[types.ModuleType]:
    """``tensorrt`` with NVIDIA's ``tensorrt.plugin`` inside; everything is taken back afterwards."""
    before = {k: v for k, v in sys.modules.items() if k == "tensorrt" or k.startswith("tensorrt.")}
    for name in before:
        del sys.modules[name]
    trt = _native()
    sys.modules["tensorrt"] = trt
    folder = sources()
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tensorrt.plugin"] = module
    trt.plugin = module  # type: ignore[attr-defined]  # a module made here
    try:
        spec.loader.exec_module(module)
        yield trt
    finally:
        for name in [k for k in sys.modules if k == "tensorrt" or k.startswith("tensorrt.")]:
            del sys.modules[name]
        sys.modules.update(before)


@dataclass(frozen=True)
class Tensor:
    """An input as the network knows it: symbolic sizes by name, numbers fixed."""

    shape: tuple[int | str, ...]
    dtype: str


@dataclass
class Launch:
    """What a plan would hold for one tactic; grid, block, shared and scalars are expressions."""

    name: str
    code: bytes
    grid: tuple[Expression, ...]
    block: tuple[Expression, ...]
    shared: Expression
    scalars: tuple[Expression, ...]
    scalar_types: tuple[str, ...]


@dataclass
class Driven:
    """What the builder learns from a plugin."""

    output_types: list[str]
    output_shapes: list[list[Expression]]
    combinations: list[tuple[str, ...]]
    tactics: list[int]
    launches: dict[int, Launch] = field(default_factory=dict)


def drive(
    trt: Any,
    plugin_id: str,
    inputs: Sequence[Tensor],
    attributes: Mapping[str, Any],
    profile: Mapping[str, tuple[int, int, int]],
) -> Driven:
    """The calls a builder makes on a quickly deployable plugin with an ahead-of-time implementation, in the
    order of the documentation of ``IPluginV3QuickAOTBuild``."""
    import numpy as np

    # NVIDIA's code keeps the last builder when a plugin raises; a real build ends there.
    sys.modules["tensorrt.plugin._tensor"].SymIntExpr._exprBuilder = None  # type: ignore[attr-defined]
    namespace, name = plugin_id.split("::")
    creator = trt.get_plugin_registry().get_creator(name, "1", namespace)
    # As the ONNX parser gives them (measured): 32-bit numbers, in the order of the creator's field names.
    kinds = {int: (np.int32, trt.PluginFieldType.INT32), float: (np.float32, trt.PluginFieldType.FLOAT32)}
    fields = trt.PluginFieldCollection(
        trt.PluginField(k, np.array([v], kinds[type(v)][0]), kinds[type(v)][1]) for k, v in attributes.items()
    )
    plugin = creator.create_plugin(
        name, namespace, fields, trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest.STRICT_AOT
    )
    types_in = [trt.DataType[t.dtype] for t in inputs]
    types_out = plugin.get_output_data_types(types_in, [len(t.shape) for t in inputs])
    shapes_in = [_DimsExprs([_expression(d) for d in t.shape]) for t in inputs]
    shapes_out = plugin.get_output_shapes(shapes_in, [], ExprBuilder())
    in_out = [
        *(_described(trt, t.shape, d, profile) for t, d in zip(inputs, types_in, strict=True)),
        *(_result(trt, s, d, profile) for s, d in zip(shapes_out, types_out, strict=True)),
    ]
    flat = plugin.get_supported_format_combinations(in_out, len(inputs))
    combinations = [
        tuple(d.type.name for d in flat[i : i + len(in_out)]) for i in range(0, len(flat), len(in_out))
    ]
    assert all(d.format is trt.TensorFormat.LINEAR for d in flat)
    plugin.configure_plugin(in_out[: len(inputs)], in_out[len(inputs) :])
    driven = Driven([t.name for t in types_out], shapes_out, combinations, sorted(plugin.get_valid_tactics()))
    for tactic in driven.tactics:
        plugin.set_tactic(tactic)
        launch, setter = types.SimpleNamespace(), _Scalars()
        plugin.get_launch_params(shapes_in, in_out, len(inputs), launch, setter, ExprBuilder())
        kernel, code = plugin.get_kernel(
            [d.desc for d in in_out[: len(inputs)]], [d.desc for d in in_out[len(inputs) :]]
        )
        driven.launches[tactic] = Launch(
            name=kernel if isinstance(kernel, str) else kernel.decode(),
            code=code,
            grid=tuple(getattr(launch, f"grid_{a}").expr for a in "xyz"),
            block=tuple(getattr(launch, f"block_{a}").expr for a in "xyz"),
            shared=launch.shared_mem.expr,
            scalars=tuple(e.expr for e in setter.given),
            scalar_types=tuple(e.dtype.name for e in setter.given),
        )
    return driven


class _Scalars:
    """``ISymExprs``: set the number, then each."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "nbSymExprs":
            self.given = [None] * value
        else:
            super().__setattr__(name, value)

    def __setitem__(self, index: int, value: Any) -> None:
        self.given[index] = value


def _expression(size: int | str) -> Expression:
    return Expression(size) if isinstance(size, int) else Expression(lambda sizes: sizes[size])


def _described(
    trt: Any, shape: Sequence[int | str], dtype: Any, profile: Mapping[str, tuple[int, int, int]]
) -> DynamicPluginTensorDesc:
    fixed = tuple(d if isinstance(d, int) else DYNAMIC for d in shape)
    desc = PluginTensorDesc(fixed, dtype, trt.TensorFormat.LINEAR)
    low, opt, high = (tuple(d if isinstance(d, int) else profile[d][i] for d in shape) for i in range(3))
    return DynamicPluginTensorDesc(desc, low, opt, high)


def _result(
    trt: Any, shape: Sequence[Expression], dtype: Any, profile: Mapping[str, tuple[int, int, int]]
) -> DynamicPluginTensorDesc:
    fixed = tuple(e.get_constant_value() if e.is_constant() else DYNAMIC for e in shape)
    desc = PluginTensorDesc(fixed, dtype, trt.TensorFormat.LINEAR)
    low, opt, high = (tuple(e.at({k: v[i] for k, v in profile.items()}) for e in shape) for i in range(3))
    return DynamicPluginTensorDesc(desc, low, opt, high)
