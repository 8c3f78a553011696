"""Build the TensorRT plans of a moe-export bundle. Needs Python 3.11 and TensorRT, nothing else.

    python build_engine.py              in the bundle's folder, on the machine with the GPU
    python build_engine.py --check      only say whether this machine can

What to build is in ``build_engine.json`` beside this file. Plans are written beside it, and ``manifest.json``
then lists them, so that the bundle is whole.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import datetime
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

SCRIPT, RECIPE = "build_engine.py", "build_engine.json"
_OLDEST = {"tensorrt": (10, 15), "tensorrt_rtx": (1, 7)}
UNFINISHED = "no finished engine"
"""How the note of a bundle begins whose plans are still to be built."""
_LAST_WORDS = 12
_DTYPES = {
    "float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64",
    "int32": "INT32", "bool": "BOOL", "int8": "INT8", "uint8": "UINT8",
}  # fmt: skip
_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+),")
_ONNX_LAYERS = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")


class CannotBuild(Exception):
    """Why no plan can be built, in one line."""


def version_fault(library: str, version: str) -> str:
    """Why ``version`` of ``library`` cannot be used; empty: it can."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        return f"{library} {version}: not a version"
    found = int(match[1]), int(match[2])
    if library == "tensorrt" and found == (10, 14):
        return f"TensorRT {version} is refused: the plugin API of 10.14 is broken; install 10.15 or later"
    oldest = _OLDEST[library]
    if found < oldest:
        return f"{library} {version} is too old; {oldest[0]}.{oldest[1]} or later is needed"
    return ""


def load_library(name: str) -> Any:
    """Import ``tensorrt`` or ``tensorrt_rtx``.

    Raises:
        CannotBuild: it is not installed, or this version of it cannot be used.
    """
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        module = name.replace("_", "-")
        raise CannotBuild(f"{name} cannot be imported ({error}); pip install {module}-cu13") from error
    fault = version_fault(name, str(library.__version__))
    if fault:
        raise CannotBuild(fault)
    return library


def gpu_sm() -> int | None:
    """Compute capability of the first NVIDIA GPU (89 is 8.9), asked of the driver; None without one."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    value, device, found = ctypes.c_int(), ctypes.c_int(), [0, 0]
    if driver.cuInit(0) != 0 or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    for index, attribute in enumerate((75, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
        found[index] = value.value
    return 10 * found[0] + found[1]


def check_machine(recipe: dict[str, Any]) -> tuple[Any, list[int]]:
    """The library, and the SMs of ``recipe`` whose plans can be built here.

    Raises:
        CannotBuild: none, and why.
    """
    trt = load_library(recipe["library"])
    wanted = [int(sm) for sm in recipe["sms"]]
    if recipe["library"] == "tensorrt_rtx":
        lacking = [sm for sm in wanted if not hasattr(trt.ComputeCapability, f"SM{sm}")]
        if lacking:
            raise CannotBuild(f"tensorrt_rtx {trt.__version__} builds no plans for SM{lacking[0]}")
        return trt, wanted
    here = gpu_sm()
    if here is None:
        raise CannotBuild(
            "TensorRT times kernels on the GPU that it builds for, and this machine has none (or no NVIDIA "
            f"driver); run this on a machine with SM{', SM'.join(str(sm) for sm in wanted)}"
        )
    if here not in wanted:
        raise CannotBuild(
            f"the GPU here is SM{here}; the plans are for SM{', SM'.join(str(s) for s in wanted)}"
        )
    return trt, [here]


def build(recipe: dict[str, Any], folder: Path, trt: Any, sms: list[int]) -> list[dict[str, Any]]:
    """Build the plans of ``sms`` into ``folder``; one entry each, as ``engines`` of a manifest has them.

    Raises:
        CannotBuild: TensorRT refuses the model or cannot build it; its last words.
    """
    logger = make_logger(trt)
    loaded = [_load_plugins(m, folder, folder / recipe["kernels"], trt) for m in recipe.get("plugins", [])]
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if recipe.get("plugins"):
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    if not parser.parse_from_file(str(folder / recipe["model"])):
        errors = [_one_line(str(parser.get_error(i))) for i in range(parser.num_errors)]
        more = f" (and {len(errors) - 2} more)" if len(errors) > 2 else ""
        raise CannotBuild(f"the parser refuses {recipe['model']}: {'; '.join(errors[:2])}{more}")
    _check_io(recipe, network)
    _check_moe(recipe, network)
    engines = []
    for sm in sms:
        started = time.perf_counter()
        # The last profile covers every shape: the compiler of some versions fails on conditionals under
        # several.
        attempts = [recipe["profiles"], recipe["profiles"][-1:]][: 1 + (len(recipe["profiles"]) > 1)]
        fewer = ""
        for profiles in attempts:
            logger.start()
            plan = builder.build_serialized_network(network, _config(recipe, profiles, trt, builder, sm))
            if plan is not None:
                break
            tried = ", ".join(profile["name"] for profile in profiles)
            fewer = f"no plan with {tried}: {logger.last_words()}"
            print(f"SM{sm}: {fewer}", flush=True)
        if plan is None:
            # Of a plugin that refuses, TensorRT itself only says that it failed.
            refused = [text for module in loaded for text in getattr(module, "problems", tuple)()]
            raise CannotBuild(f"no plan for SM{sm}: {'; '.join(refused) or logger.last_words()}")
        name = recipe["plans"][str(sm)]
        layers = logger.layers
        _check_collectives(recipe, layers, len(profiles), name)
        partial = folder / f".{name}.partial"
        partial.write_bytes(memoryview(plan))
        os.replace(partial, folder / name)
        engines.append(
            {
                "file": name,
                "sm": sm,
                "library": recipe["library"],
                "version": str(trt.__version__),
                "driver": recipe["driver"],
                "profiles": [profile["name"] for profile in profiles],
                "layers": len(layers),
                "layer_kinds": dict(collections.Counter(layer["kind"] for layer in layers)),
                "weight_bytes": logger.memory.get("Weights", 0),
                "activation_bytes": logger.memory.get("Activation", 0),
                "build_seconds": round(time.perf_counter() - started, 3),
                "fewer_profiles": fewer,
            }
        )
        listed = folder / f"{recipe.get('evidence', 'evidence/')}{name}.layers.json"
        listed.parent.mkdir(exist_ok=True)
        listed.write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")
        print(f"built {name}: {len(layers)} layers, {plan.nbytes} bytes", flush=True)
        del plan
    return engines


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that keeps what is read back: layers, memory, the last warnings and errors."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.start()

        def start(self) -> None:
            self.layers: list[dict[str, Any]] = []
            self.memory: dict[str, int] = {}
            self._words: collections.deque[str] = collections.deque(maxlen=_LAST_WORDS)
            self._errors: collections.deque[str] = collections.deque(maxlen=_LAST_WORDS)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                wrong = severity <= trt.ILogger.Severity.ERROR
                (self._errors if wrong else self._words).append(_one_line(message))
                print(message, file=sys.stderr, flush=True)
            for line in message.splitlines():
                layer = _LAYER.match(line)
                if layer is not None:
                    onnx = [name for found in _ONNX_LAYERS.findall(line) for name in found.split("\x1e")]
                    self.layers.append({"name": layer["name"], "kind": layer["kind"], "onnx": onnx})
                memory = _MEMORY.search(line)
                if memory is not None:
                    self.memory[memory[1]] = int(memory[2])

        def last_words(self) -> str:
            return "; ".join(list(self._errors or self._words)[-2:]) or "TensorRT gave no reason"

    return Logger()


def _config(recipe: dict[str, Any], profiles: list[dict[str, Any]], trt: Any, builder: Any, sm: int) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # float32 means float32: TF32 keeps 10 bits of a product's factors, and routing flips with less.
    config.clear_flag(trt.BuilderFlag.TF32)
    if recipe["library"] == "tensorrt_rtx":
        # Without it very large tensors are missing from the activation memory that is reported.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    for profile in profiles:
        made = builder.create_optimization_profile()
        for name, (low, best, high) in profile["shapes"].items():
            made.set_shape(name, low, best, high)
        if config.add_optimization_profile(made) < 0:
            raise CannotBuild(f"TensorRT refuses the profile {profile['name']!r}")
    return config


def _check_io(recipe: dict[str, Any], network: Any) -> None:
    """The network's inputs and outputs are those of the recipe, in name, dtype and rank."""
    found = {
        "inputs": [network.get_input(i) for i in range(network.num_inputs)],
        "outputs": [network.get_output(i) for i in range(network.num_outputs)],
    }
    for kind, tensors in found.items():
        want = {spec["name"]: (_DTYPES[spec["dtype"]], len(spec["shape"])) for spec in recipe[kind]}
        have = {tensor.name: (tensor.dtype.name, len(tensor.shape)) for tensor in tensors}
        if want != have:
            wrong = sorted(name for name in {*want, *have} if want.get(name) != have.get(name))
            raise CannotBuild(
                f"{kind} of the parsed network differ from the manifest's at {', '.join(wrong[:3])}"
            )


def _check_collectives(
    recipe: dict[str, Any], layers: list[dict[str, Any]], profiles: int, plan: str
) -> None:
    """Every exchange between ranks is a layer of the plan, once per profile. One that the compiler took for a
    copy would leave each rank with its own part of the sum.

    Raises:
        CannotBuild: names the exchange that is missing.
    """
    held = collections.Counter(
        name for layer in layers if layer["kind"].startswith("comm_") for name in layer["onnx"]
    )
    for name in recipe.get("collectives", []):
        if held[name] != profiles:
            raise CannotBuild(
                f"{plan}: the exchange {name!r} is {held[name]} layers of the plan, not {profiles}: "
                "ranks would give wrong numbers without a word. The plan is not written"
            )


def _check_moe(recipe: dict[str, Any], network: Any) -> None:
    """Every TRT_MoE node became TensorRT's MoE layer; its function's body would compute every expert."""
    want = recipe.get("moe_layers", 0)
    found = sum(network.get_layer(i).type.name == "MOE" for i in range(network.num_layers)) if want else 0
    if found != want:
        raise CannotBuild(
            f"the model has {want} TRT_MoE nodes, and the parser made {found} MoE layers of them"
        )


def _load_plugins(module: str, folder: Path, kernels: Path, trt: Any) -> Any:
    """Import what registers plugins (a file of the bundle, or an installed module) and let it.

    Raises:
        CannotBuild: it is not installed, or refuses this machine.
    """
    if module.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module).stem, folder / module)
        assert spec is not None and spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    else:
        try:
            loaded = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise CannotBuild(
                f"the plugin {module} cannot be imported ({error}); pip install moe-export"
            ) from error
    try:
        loaded.register(trt, kernels)
    except Exception as error:  # its own refusals; their class lies in a package this file does not import
        raise CannotBuild(f"the plugin {module} cannot be registered: {error}") from error
    return loaded


def finish_manifest(folder: Path, recipe: dict[str, Any], engines: list[dict[str, Any]]) -> bool:
    """Enter the plans into ``manifest.json``; whether it is ready: no plan is missing, of no rank."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    new = {engine["file"] for engine in engines}
    entries = [entry for entry in manifest["files"] if entry["path"] not in new]
    for name in sorted(new):
        digest = hashlib.sha256()
        with (folder / name).open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        entries.append({"path": name, "size": (folder / name).stat().st_size, "sha256": digest.hexdigest()})
    others = [engine for engine in manifest["engines"] if engine["file"] not in new]
    manifest["files"] = sorted(entries, key=lambda entry: str(entry["path"]))
    manifest["engines"] = sorted([*others, *engines], key=lambda e: (int(e.get("rank", 0)), int(e["sm"])))
    built = {(engine.get("rank", 0), engine["sm"]) for engine in manifest["engines"]}
    ranks = (manifest.get("expert_parallel") or {"ranks": 1})["ranks"]
    ready = built >= {(rank, sm) for rank in range(ranks) for sm in recipe["sms"]}
    manifest["state"] = "ready" if ready else "needs-gpu-build"
    stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = f"plans of {', '.join(sorted(new))} built by build_engine.py, {stamp}; not verified there"
    kept = [note for note in manifest["notes"] if not (ready and note.startswith(UNFINISHED))]
    fewer = [
        f"SM{e['sm']}: the plan has profile {', '.join(e['profiles'])} only: {e['fewer_profiles']}"
        for e in engines if e["fewer_profiles"]]  # fmt: skip
    kept = [note for note in kept if note not in fewer and not _told_again(note, new)]
    manifest["notes"] = [*kept, text, *fewer]
    partial = folder / f".manifest.json.{os.getpid()}.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return ready


def _told_again(note: str, files: set[str]) -> bool:
    """Whether a note of an earlier build speaks of no plan but these."""
    head, built, _ = note.partition(" built by build_engine.py")
    return bool(built) and set(head.removeprefix("plans of ").split(", ")) <= files


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:297]}..."


def _die_with_parent() -> None:
    """Let the kernel end this process with the one that started it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: built. 1: TensorRT refuses. 3: this machine lacks something."""
    parser = argparse.ArgumentParser(description="Build the TensorRT plans of this bundle.")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent, help="the bundle")
    parser.add_argument("--check", action="store_true", help="only say whether this machine can")
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.result is not None:
        _die_with_parent()
    folder: Path = chosen.folder
    recipe = json.loads((chosen.recipe or folder / RECIPE).read_text(encoding="utf-8"))
    if "rank" in recipe and chosen.result is None and not chosen.check:
        print(f"error: rank {recipe['rank']} only; run {SCRIPT} in the bundle's folder", file=sys.stderr)
        return 2
    try:
        trt, sms = check_machine(recipe)
    except CannotBuild as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    if chosen.check:
        print(
            f"{recipe['library']} {trt.__version__} can build: "
            f"{', '.join(recipe['plans'][str(sm)] for sm in sms)}"
        )
        return 0
    try:
        engines = build(recipe, folder, trt, sms)
    except CannotBuild as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if chosen.result is not None:
        chosen.result.write_text(json.dumps(engines), encoding="utf-8")
    else:
        finish_manifest(folder, recipe, engines)
        print("manifest.json lists the plans; check them with: moe-export verify .")
    return 0


if __name__ == "__main__":
    sys.exit(main())
