"""Checks of ``tools/gpu_acceptance.py`` on plans: one that carries its kernels, and whole engines.

    python tools/acceptance_plans.py CHECK [ARGUMENT...]        runs any check, prints one line of JSON

*Not run on a GPU yet*: only their refusal without one was seen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from acceptance_core import rank_gpus
from acceptance_gpu import (
    Array,
    Gpu,
    Result,
    expert_inputs,
    marshalling,
    reference_error,
    shared_memory,
    tensor_cores,
)
from moe_export_plugins.gpu.contract import LIMITS

from moe_export.errors import EnvironmentLacksError, MoeExportError
from moe_export.ops import DOMAIN, OPS

TOKENS = 37
LAYER = "layer"


def bare_plan() -> Result:
    """A plan with ahead-of-time plugins, run in a process that has nothing of moe-export."""
    try:
        import tensorrt as trt
    except ImportError as error:
        raise EnvironmentLacksError(f"standard TensorRT cannot be imported: {error}") from error
    from moe_export_plugins.gpu import aot_graph
    from moe_export_plugins.gpu.bundle_kernels import expert_specs, write_kernels
    from moe_export_plugins.gpu.experts import ExpertShape

    shape = ExpertShape("float16", num_experts=11, top_k=3, hidden=72, inner=40)
    given = expert_inputs(shape, TOKENS)
    sm = Gpu().device.sm
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_kernels(folder / "kernels", expert_specs(shape), [sm])
        write_model(folder / "model.onnx", shape.num_experts, given)
        parsed = folder / aot_graph.MODEL_FILE
        aot_graph.write_aot_model(folder / "model.onnx", parsed, {LAYER: shape.top_k}, TOKENS, sm)
        aot_graph.register(trt, folder / "kernels")
        (folder / "plan.engine").write_bytes(build_plan(trt, parsed, given))
        for key in ("hidden", "expert_ids", "weights"):
            np.save(folder / f"{key}.npy", given[key])
        bare = Path(__file__).with_name("acceptance_bare.py")
        done = subprocess.run(
            [sys.executable, "-I", str(bare), str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return {"passed": False, "reason": f"bare process: {done.stderr.strip()[-400:]}"}
        worst = reference_error(np.load(folder / "out.npy"), shape, given)
    passed = worst <= LIMITS["float16"]
    return {"passed": passed, "reason": "" if passed else f"off by {worst:.3g}", "max_error": worst, "sm": sm}


def write_model(path: Path, num_experts: int, given: Mapping[str, Array]) -> None:
    """One ExpertMLP node; tokens are dynamic, weights constants."""
    import onnx
    import onnx.helper
    from onnx import numpy_helper

    from moe_export.graph.functions import PLUGIN_ATTRIBUTES

    attributes = OPS["ExpertMLP"].complete({"num_experts": num_experts, "layer": LAYER})
    node = onnx.helper.make_node(
        "ExpertMLP", list(given), ["out"], "experts", domain=DOMAIN, **attributes, **PLUGIN_ATTRIBUTES
    )
    fixed = ("up", "down")
    inputs = [
        onnx.helper.make_tensor_value_info(
            n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), ["tokens", a.shape[1]]
        )
        for n, a in given.items()
        if n not in fixed
    ]
    out = onnx.helper.make_tensor_value_info(
        "out", inputs[0].type.tensor_type.elem_type, ["tokens", given["hidden"].shape[1]]
    )
    stored = [numpy_helper.from_array(given[n], n) for n in fixed]
    graph = onnx.helper.make_graph([node], "experts", inputs, [out], stored)
    bodies = [("Dispatch", {"num_experts": num_experts}), ("GroupedMatMul", {}), ("Combine", {})]
    functions = [OPS[n].function(a, 20) for n, a in (*bodies, ("ExpertMLP", attributes))]
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(DOMAIN, 1)]
    model = onnx.helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    onnx.save(model, path)


def build_plan(trt: Any, path: Path, given: Mapping[str, Array]) -> bytes:
    """The plan of a model whose inputs are hidden, expert_ids and weights."""
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise EnvironmentLacksError(f"TensorRT {trt.__version__} does not take the plugins' nodes: {errors}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name in ("hidden", "expert_ids", "weights"):
        width = given[name].shape[1]
        profile.set_shape(name, (1, width), (TOKENS, width), (4 * TOKENS, width))
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EnvironmentLacksError(
            f"TensorRT {trt.__version__} builds no plan with the plugins; see its log"
        )
    return bytes(plan)


def target(
    name: str, lowering: str, dtype: str, sm: str, source: str = "examples/byte-mixtral", speedup: str = "1.0"
) -> Result:
    """Build, verify and bench one engine with the command line, as a user does."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = str(Path(folder) / "engine")
        build = ("--target", name, "--sm", sm, "--expert-lowering", lowering, "--dtype", dtype)
        code, _, told = command("build", source, *build, "--no-verify", "--no-bench", "-o", bundle)
        if code:
            return {"passed": False, "reason": f"build ends with {code}: {told}"}
        code, parity, told = command("verify", bundle)
        if code:
            return {"passed": False, "reason": f"verify ends with {code}: {told}", "parity": parity}
        code, bench, told = command("bench", bundle, "--min-speedup", speedup, "--rounds", "3")
    reason = f"bench ends with {code}: {told}" if code else ""
    return {"passed": not code, "reason": reason, "parity": parity, "bench": bench}


def ranks(name: str, mode: str, sm: str, source: str = "examples/byte-mixtral") -> Result:
    """Build two ranks, and compare them with the source model: two processes, a GPU each."""
    pair = rank_gpus(int(sm))
    if not pair:
        raise EnvironmentLacksError(f"two ranks need two GPUs of SM{sm}")
    beside = Path(sys.executable).with_name("mpiexec")
    started = (str(beside) if beside.is_file() else "mpiexec", "-n", "2")
    seen = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, pair))}
    with tempfile.TemporaryDirectory() as folder:
        bundle = str(Path(folder) / "engine")
        build = ("--target", name, "--sm", sm, "--ep", "2", "--ep-mode", mode)
        code, _, told = command("build", source, *build, "--no-verify", "--no-bench", "-o", bundle)
        if code:
            return {"passed": False, "reason": f"build ends with {code}: {told}"}
        code, parity, told = command("verify", bundle, launcher=started, environment=seen)
    reason = f"verify ends with {code}: {told}" if code else ""
    return {"passed": not code, "reason": reason, "parity": parity}


def command(
    *words: str, launcher: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
) -> tuple[int, Any, str]:
    """A command of moe-export: its exit code, the summary of its report, its last words."""
    line = [*launcher, sys.executable, "-m", "moe_export", *words, "--quiet", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    try:
        report = json.loads(done.stdout or "null")
    except json.JSONDecodeError:
        report = None
    summary = report.get("summary") if isinstance(report, dict) else None
    return done.returncode, summary, done.stderr.strip()[-400:]


CHECKS: dict[str, Callable[..., Result]] = {
    "marshalling": marshalling,
    "shared-memory": shared_memory,
    "tensor-cores": tensor_cores,
    "bare-plan": bare_plan,
    "target": target,
    "ranks": ranks,
}


def main(arguments: list[str]) -> int:
    """Run one check and print its result; a refusal is a result, too."""
    if not arguments or arguments[0] not in CHECKS:
        print(f"usage: acceptance_plans.py {'|'.join(CHECKS)} [ARGUMENT...]", file=sys.stderr)
        return 2
    try:
        result = CHECKS[arguments[0]](*arguments[1:])
    except MoeExportError as error:
        result = {"passed": False, "reason": str(error)}
    print(json.dumps(result))
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
