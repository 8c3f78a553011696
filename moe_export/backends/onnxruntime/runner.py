"""ONNX Runtime sessions on the CPU: options, error text, and no silent change of provider."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moe_export.errors import BundleError, EnvironmentLacksError, InputError

from .plugin import cpu_plugin_problem, register_cpu_plugin

if TYPE_CHECKING:
    import onnxruntime as ort

PROVIDERS = ["CPUExecutionProvider"]
_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_FATAL = 4


def default_threads() -> int:
    """Physical cores that this process may use: the machine's, its CPU affinity and its cgroup quota."""
    import psutil

    usable = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        usable = min(usable, len(os.sched_getaffinity(0)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            usable = min(usable, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass  # No cgroup v2: no quota to respect.
    return max(usable, 1)


def one_line(error: BaseException, limit: int = 400) -> str:
    """ONNX Runtime's message on one line, without its code prefix."""
    text = " ".join(_CODE.sub("", str(error)).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


@cache
def ort_error_types() -> tuple[type[BaseException], ...]:
    """Everything ONNX Runtime raises."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    codes = (
        "Fail InvalidArgument NoSuchFile NoModel EngineError RuntimeException InvalidProtobuf ModelLoaded "
        "NotImplemented InvalidGraph EPFail NotFound ModelLoadCanceled ModelRequiresCompilation"
    )
    kinds = (getattr(state, name, None) for name in codes.split())
    return (*(kind for kind in kinds if kind is not None), RuntimeError, ValueError, MemoryError)


def create_session(
    model: Path | bytes,
    *,
    threads: int | None = None,
    folder: Path | None = None,
    prepack: bool = True,
    optimize: bool = True,
    label: str | None = None,
    plugin: bool = True,
) -> ort.InferenceSession:
    """An ONNX Runtime session on the CPU provider and no other.

    Args:
        model: file, or a serialised model whose external data lies in ``folder``.
        threads: threads inside one operator; None: :func:`default_threads`.
        folder: where external data of a model given as bytes lies.
        prepack: let ONNX Runtime keep a second, faster copy of constant weights. Without it, external weights
            stay memory-mapped and are shared by all sessions over the same file.
        optimize: let ONNX Runtime rewrite the graph. Without it, no constant is computed when it is loaded,
            and with ``prepack`` off no weight is read.
        label: what error messages call a model given as bytes.
        plugin: use the CPU plugin's kernels for the ops of moe-export when it is installed; otherwise, and
            without it, their ONNX bodies run.

    Raises:
        InputError: ``threads`` is not a whole number of 1 or more.
        BundleError: ONNX Runtime refuses the model; the message names it.
        EnvironmentLacksError: this build of ONNX Runtime has no CPU provider, ``MOE_EXPORT_CPU_PLUGIN``
            names a library that is missing or cannot be loaded, or an op without an ONNX body needs it.
    """
    import onnxruntime as ort

    if threads is not None and (type(threads) is not int or threads < 1):
        raise InputError(f"threads is {threads!r}; expected a whole number of 1 or more, or None")
    missing = set(PROVIDERS) - set(ort.get_available_providers())
    if missing:
        raise EnvironmentLacksError(
            f"the installed onnxruntime {ort.__version__} lacks {', '.join(missing)}; install it again"
        )
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads or default_threads()
    options.inter_op_num_threads = 1
    # Threads spin between the operators of a run, where waking them would cost more, and sleep between runs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # ONNX Runtime would keep a memory plan for every input shape it ever saw, and decoding makes a new one
    # each step.
    options.enable_mem_pattern = False
    # Errors are raised, so logging them as well would only print them twice.
    options.log_severity_level = _FATAL
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if isinstance(model, bytes):
        source: str | bytes = model
        if folder is not None:
            key = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(key, str(folder))
    else:
        source = str(model)
    if plugin:
        register_cpu_plugin(options)
    name = label or (source if isinstance(source, str) else "the model")
    try:
        session = ort.InferenceSession(
            source, options, providers=PROVIDERS, enable_fallback=0, read_config_from_model=0
        )
    except ort_error_types() as error:
        told = one_line(error)
        problem = cpu_plugin_problem() if plugin and "is not a registered function/op" in told else ""
        if problem:
            raise EnvironmentLacksError(
                f"{name}: an op of it runs only in the CPU plugin, and there is none ({problem}): {told}"
            ) from error
        raise BundleError(f"{name}: ONNX Runtime cannot load it: {told}") from error
    if session.get_providers() != PROVIDERS:
        raise BundleError(
            f"{name}: ONNX Runtime runs it with {session.get_providers()}, asked was {PROVIDERS}"
        )
    return session
