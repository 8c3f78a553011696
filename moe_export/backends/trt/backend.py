"""The half of a TensorRT target that writes: the lowered ONNX model, and its plans or the recipe for them."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from moe_export.errors import EnvironmentLacksError, UsageError
from moe_export.passes import trt_moe
from moe_export.passes.base import PassContext
from moe_export.passes.dist_collectives import collective_names
from moe_export.schema import Decision, EngineFile, ExpertParallel, Limits, to_json
from moe_export.sms import check_dtype, check_sms, sms_of

from ...schema import DTYPES
from ..base import MODEL_FILE, Backend, LayerSize, Plans, write_onnx
from . import build_engine, build_ranks
from .child import run_builder
from .kernels import check_plugin_sizes, write_plugin_kernels
from .library import DRIVER, INSTALL, MODULES, library_problem, library_version
from .machine import plugin_sms
from .profiles import Profile, make_profiles

SCRIPT = build_engine.SCRIPT
FIRST_COLLECTIVE_SM = 80
"""From NVIDIA's documentation of multi-device inference."""
MOST_TOP_K = 3840
"""TensorRT's TopK takes no larger K."""


class TensorRtBackend(Backend):
    """One ONNX model, lowered to what TensorRT's parser imports, and one plan per SM."""

    def __init__(self, name: str, summary: str, *, needs_gpu: bool) -> None:
        """``needs_gpu``: plans are built on the GPU that they are for."""
        self.name = name
        self.summary = summary
        self._needs_gpu = needs_gpu

    def environment(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What of this machine decides what a bundle holds: the SMs, the library, whether plans are built
        here.

        Raises:
            UsageError: ``sm`` was not given and no GPU here says which; or the GPU's SM is none of this
            target's.
            EnvironmentLacksError: the target cannot be built here, or its library's version here is refused.
        """
        problem = library_problem(self.name)
        # Without the library a GPU machine finishes the build; a version here that is refused is told now.
        if problem and (library_version(self.name) is not None or not self._needs_gpu):
            raise EnvironmentLacksError(f"target {self.name}: {problem}")
        here = build_engine.gpu_sm()
        if options.get("sm") is None and here is None:
            raise UsageError(
                f"sm: no NVIDIA GPU here to build for; say which with --sm, as in --sm 89; choices: "
                f"{', '.join(str(n) for n in sms_of(self.name))}"
            )
        sms = check_sms(self.name, options.get("sm") or (here,))
        check_dtype(self.name, str(options.get("dtype", "float32")), sms, DTYPES)
        if options.get("expert_lowering") == "plugin":
            self._check_plugin(sms)
        if int(options.get("ep") or 1) > 1:
            _check_ranks(sms, options)
        if options.get("native_lowering") == trt_moe.LOWERING:
            _check_trt_moe(sms, str(options.get("dtype", "float32")))
        return {
            "sm": list(sms),
            "library": None if problem else library_version(self.name),
            "lacks": self._lacks(sms),
        }

    def _check_plugin(self, sms: tuple[int, ...]) -> None:
        known = plugin_sms()
        if not known:
            raise EnvironmentLacksError(
                "expert_lowering plugin needs the package moe_export_plugins.gpu; install moe-export again"
            )
        if importlib.util.find_spec("triton") is None:
            raise EnvironmentLacksError(
                "expert_lowering plugin compiles kernels with Triton, which is not installed: pip install "
                "'moe-export[gpu]'"
            )
        for number in sms:
            if number not in known:
                raise UsageError(
                    f"expert_lowering: the plugin has no kernels for SM{number}; it has them for "
                    f"{', '.join(f'SM{n}' for n in known)}; take native, or leave SM{number} out"
                )

    def _lacks(self, sms: tuple[int, ...]) -> str:
        """Why the plans cannot be built on this machine; empty: they can."""
        if not self._needs_gpu:
            return ""
        here = build_engine.gpu_sm()
        missing = [library_problem(self.name)]
        if here is None:
            missing.append("no NVIDIA GPU (TensorRT times kernels on the GPU it builds for)")
        elif here not in sms:
            missing.append(f"the GPU here is SM{here}")
        return "; ".join(part for part in missing if part)

    def check_layers(self, layers: Iterable[LayerSize], options: Mapping[str, Any]) -> None:
        """Refuse sizes beyond what the lowering that was asked for takes."""
        for layer in layers:
            if layer.top_k is not None and layer.top_k > MOST_TOP_K:
                raise UsageError(
                    f"MoE layer {layer.name!r} chooses {layer.top_k} experts per token; TensorRT's TopK "
                    f"takes at most {MOST_TOP_K}; build for onnxruntime or portable"
                )
            if options.get("expert_lowering") == "plugin":
                check_plugin_sizes(layer, str(options.get("dtype", "float32")))

    def _write(self, context: PassContext, folder: Path) -> Plans:
        options = context.options
        sms = tuple(int(n) for n in options["sm"])
        plan: ExpertParallel | None = options.get("expert_parallel")
        limits = Limits(options["max_batch"], options["max_sequence"])
        # Of several ranks Triton runs plans of one profile only.
        profiles = make_profiles(context.io, limits, split=self._needs_gpu and plan is None, parallel=plan)
        write_onnx(context, folder)
        # Standard TensorRT takes the kernels into the plan; RTX has no such plugins.
        usual = math.prod(next(iter(profiles[-1].shapes.values()))[1])
        plugins = write_plugin_kernels(context, folder, sms, usual if self._needs_gpu else None)
        recipe = self._recipe(context, sms, profiles) | plugins
        if plan is not None:
            recipe |= {"rank": options["rank"], "evidence": f"../evidence/{folder.name}."}
            (folder.parent / "evidence").mkdir(exist_ok=True)
        if names := collective_names(context.model):
            recipe["collectives"] = names
        if layers := trt_moe.count(context.model):
            recipe["moe_layers"] = layers
        lacks = self._lacks(sms)
        if not lacks:
            engines = run_builder(recipe, folder)
            context.decisions += [_decision(engine) for engine in engines]
            missing = sorted(set(sms) - {engine.sm for engine in engines})
            if not missing:
                return Plans(sms, engines, "ready")
            lacks = f"the GPU here is no SM{', SM'.join(str(n) for n in missing)}"
        else:
            engines = ()
        shutil.copyfile(build_engine.__file__, folder / SCRIPT)
        _write_json(folder / build_engine.RECIPE, recipe)
        if plan is not None:
            shutil.copyfile(build_ranks.__file__, folder.parent / SCRIPT)
        context.notes.append(self._left(sms, engines, lacks))
        return Plans(sms, engines, "needs-gpu-build")

    def _left(self, sms: tuple[int, ...], engines: tuple[EngineFile, ...], lacks: str) -> str:
        plans = ", ".join(f"SM{n}" for n in sms if n not in {engine.sm for engine in engines})
        return (
            f"{build_engine.UNFINISHED}: the plans for {plans} are not built, because this machine lacks "
            f"what it takes: {lacks}. Left to do, on a machine with that GPU and `{INSTALL[self.name]}`: "
            f"python {SCRIPT} in the bundle's folder"
        )

    def _recipe(
        self, context: PassContext, sms: tuple[int, ...], profiles: tuple[Profile, ...]
    ) -> dict[str, Any]:
        return {
            "library": MODULES[self.name],
            "model": MODEL_FILE,
            "sms": list(sms),
            "plans": {str(n): plan_name(n) for n in sms},
            "driver": DRIVER,
            "profiles": [profile.to_json() for profile in profiles],
            "inputs": to_json(context.io.inputs),
            "outputs": to_json(context.io.outputs),
            "plugins": [],
        }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _check_ranks(sms: tuple[int, ...], options: Mapping[str, Any]) -> None:
    """Refuse what no plans of several ranks can be."""
    if options.get("native_lowering") == trt_moe.LOWERING:
        raise UsageError(
            "native_lowering: trt_moe is for one rank: of several, most choices of a token lie elsewhere, "
            "and no source says what TensorRT's MoE layer does with those; take auto"
        )
    early = [sm for sm in sms if sm < FIRST_COLLECTIVE_SM]
    if early:
        raise UsageError(
            f"ep: TensorRT exchanges between GPUs from SM{FIRST_COLLECTIVE_SM} on; leave out SM{early[0]}"
        )


def _check_trt_moe(sms: tuple[int, ...], dtype: str) -> None:
    """Refuse what no layer of any model could be with ``native_lowering`` ``trt_moe``."""
    problem = trt_moe.machine_problem(sms) or trt_moe.dtype_problem(dtype)
    if problem:
        raise UsageError(f"native_lowering: trt_moe: {problem}; take auto")


def plan_name(sm: int) -> str:
    """File of the plan for an SM."""
    return f"model.sm{sm}.plan"


def _decision(engine: EngineFile) -> Decision:
    kinds = ", ".join(f"{kind} x{count}" for kind, count in sorted(engine.layer_kinds.items()))
    return Decision(
        f"plan for SM{engine.sm}",
        f"{engine.layers} layers over {len(engine.profiles)} profile(s), {', '.join(engine.profiles)}: "
        f"{kinds}",
        f"built by {engine.library} {engine.version} in {engine.build_seconds:.1f} s; weights "
        f"{engine.weight_bytes / 2**20:.1f} MiB, activations {engine.activation_bytes / 2**20:.1f} MiB at "
        "the largest shapes; products of float32 without TF32; not run on a GPU"
        + (f"; fewer profiles than asked for: {engine.fewer_profiles}" if engine.fewer_profiles else ""),
    )
