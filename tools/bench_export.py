"""What exporting a checkpoint costs: memory, time and disk, beside one sequential read of its files.

    python tools/bench_export.py                                         # 12 GB: 4 layers of Mixtral 8x7B
    python tools/bench_export.py --model mixtral-8x7b --layers 0 --sparse     # 32 layers, holes for weights
    python tools/bench_export.py --model deepseek-v3 --layers 0 --sparse --no-run
    python tools/bench_export.py --model deepseek-v3 --layers 0 --sparse --no-run --fp8  # as it is published

Writes a checkpoint of the model's shapes (``--sparse``: holes, which take no space), reads it once from front
to back, exports it in a child process, reads it again, and loads and runs the result in ONNX Runtime in other
children. Before each of these the files are dropped from the page cache; the export's time is compared with
the faster read. Memory is the largest resident set of a child; ``export`` is compared with a child
that only imports the libraries. The export runs onnx's checker over what it wrote; opening the bundle checks
its hashes, which the export has remembered.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from synthetic_checkpoint import write_checkpoint

GIB = 2**30
OPSET = 20
FP8_OPSET = 21
"""The first whose DequantizeLinear takes scales of blocks: float8 weights stay as they are."""
DIGESTS = "MOE_EXPORT_DIGESTS"
"""The variable that says where hashes are remembered: beside the checkpoint, for one measurement."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mixtral-8x7b", help="a preset (moe-export list presets)")
    parser.add_argument("--layers", type=int, default=4, help="first layers of the model; 0: all")
    parser.add_argument("--sparse", action="store_true", help="holes in place of weights")
    parser.add_argument(
        "--fp8", action="store_true", help="linear layers in float8, with scales of blocks; opset 21"
    )
    parser.add_argument("--folder", type=Path, help="where to work  [default: a temporary folder]")
    parser.add_argument("--no-run", action="store_true", help="do not load the result in ONNX Runtime")
    parser.add_argument("--check", action="store_true", help="exit 1 where a limit is missed")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        task, *given = options.child
        print(json.dumps(_measured(lambda: CHILDREN[task](*given))))
        return 0
    wrong = _wrong_use(options)
    if wrong:
        parser.error(wrong)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        result = measure(
            Path(name),
            options.model,
            options.layers or None,
            sparse=options.sparse,
            fp8=options.fp8,
            run=not options.no_run,
        )
    print_result(result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    missed = misses(result)
    for line in missed:
        print(f"limit missed: {line}")
    return int(options.check and bool(missed))


def _wrong_use(options: argparse.Namespace) -> str:
    """What is wrong with the options; empty: nothing. Known before minutes are spent."""
    from moe_export.errors import SourceError
    from moe_export.inspect.presets import get_preset

    try:
        most = get_preset(options.model).config.get("num_hidden_layers")
    except SourceError as error:
        return f"--model: {error}"
    if most is None and options.layers:
        return f"--layers {options.layers}: {options.model} is measured whole; give --layers 0"
    if most is not None and not 0 <= options.layers <= most:
        return f"--layers {options.layers}: {options.model} has {most}; 0 is all of them"
    if options.folder is not None and not options.folder.is_dir():
        return f"--folder {options.folder}: no such folder"
    if options.json is not None and not options.json.parent.is_dir():
        return f"--json {options.json}: no folder {options.json.parent}"
    if options.check and (options.sparse or options.no_run):
        return "--check: its limits are for real weights that are loaded; leave out --sparse and --no-run"
    return ""


def measure(
    folder: Path, model: str, layers: int | None, *, sparse: bool, fp8: bool, run: bool
) -> dict[str, Any]:
    """Everything that is printed, in bytes and seconds."""
    checkpoint, output = folder / "checkpoint", folder / "export"
    weights = write_checkpoint(checkpoint, model, layers, sparse=sparse, fp8=fp8)
    files = sorted(checkpoint.iterdir())
    os.sync()
    libraries = _child("libraries")
    os.environ[DIGESTS] = str(folder / "digests")
    reads = [_read_once(files)] if not sparse else []
    _forget(files)
    exported = _child("export", str(checkpoint), str(output), str(FP8_OPSET if fp8 else OPSET))
    reads += [_read_once(files)] if not sparse else []
    _forget(files)
    opened = _child("open", str(output))["seconds"]
    own = [p for p in output.rglob("*") if p.is_file() and p.stat().st_nlink == 1]
    result: dict[str, Any] = {
        "model": model,
        "layers": layers,
        "sparse": sparse,
        "fp8": fp8,
        "weight_bytes": weights,
        "load_average": os.getloadavg()[0],
        "read_s": reads,
        "export_s": exported["seconds"],
        "export_to_read": exported["seconds"] / min(reads) if reads else None,
        "open_s": opened,
        "libraries_rss": libraries["peak_rss"],
        "export_rss": exported["peak_rss"],
        "written_bytes": sum(p.stat().st_size for p in own),
        "notes": exported["result"],
    }
    if run:
        _forget(files)
        loaded = _child("load", str(output))
        result |= {"load_rss": loaded["peak_rss"], "load_s": loaded["seconds"]}
        result["run"] = _child("run", str(output))["result"]
    shutil.rmtree(output)
    return result


def misses(result: dict[str, Any]) -> list[str]:
    """The limits that a measurement misses; docs/large-models.md states them. What was not measured is left
    out; loading all layers has no limit."""
    loaded = result["load_rss"] / 1e9 if "load_rss" in result and result["layers"] else None
    facts = [
        ("export's memory above the libraries', GiB", _memory_of_export(result) / GIB, 1.5),
        ("export's time in sequential reads", result["export_to_read"], 3.0),
        ("share of the weights that was written", _share(result), 0.01),
        ("ONNX Runtime's memory, GB", loaded, 2.0),
    ]
    known = [(name, value, most) for name, value, most in facts if value is not None]
    return [f"{name}: {value:.3g}, at most {most}" for name, value, most in known if value > most]


def _memory_of_export(result: dict[str, Any]) -> int:
    return int(result["export_rss"] - result["libraries_rss"])


def print_result(result: dict[str, Any]) -> None:
    """A Markdown table of one measurement."""
    layers = f"first {result['layers']} layers" if result["layers"] else "all layers"
    memory = f"{_memory_of_export(result) / GIB:.2f} GiB above the libraries' alone"
    kind = f"{', float8' if result['fp8'] else ''}{', holes' if result['sparse'] else ''}"
    rows = [
        ("weights", f"{result['weight_bytes'] / 1e9:.1f} GB{kind}"),
        ("one sequential read", _reads_text(result)),
        ("export, onnx's checker included", _export_text(result)),
        ("opening it, with all checks", f"{result['open_s']:.1f} s"),
        ("peak memory of the export", memory),
        ("written", f"{result['written_bytes'] / 1e6:.1f} MB, {_share(result):.3%} of the weights"),
    ]
    if "load_rss" in result:
        rows.append(("peak memory of loading it in ONNX Runtime", f"{result['load_rss'] / GIB:.2f} GiB"))
        rows.append(("and one token", result["run"]))
    print(f"| {result['model']}, {layers} | |\n|---|---|")
    for name, text in rows:
        print(f"| {name} | {text} |")
    for note in result["notes"]:
        print(f"note: {note}")
    print(f"load average of the machine at the end: {result['load_average']:.1f}")


def _reads_text(result: dict[str, Any]) -> str:
    reads = " and ".join(f"{s:.1f} s" for s in result["read_s"])
    return f"{reads}, before and after the export" if reads else "not taken: there is nothing to read"


def _export_text(result: dict[str, Any]) -> str:
    ratio = result["export_to_read"]
    return f"{result['export_s']:.1f} s" + (f", {ratio:.2f} times the faster read" if ratio else "")


def _share(result: dict[str, Any]) -> float:
    return float(result["written_bytes"] / result["weight_bytes"])


def _child(*task: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", *task]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{task[0]} failed: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _measured(work: Callable[[], Any]) -> dict[str, Any]:
    begin = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begin
    from moe_export.process_memory import peak_rss_bytes

    return {"result": result, "seconds": seconds, "peak_rss": peak_rss_bytes()}


def _libraries() -> None:
    import onnx
    import onnxruntime
    import onnxscript
    import torch.onnx
    import transformers

    assert onnx and onnxruntime and onnxscript and torch.onnx and transformers.MixtralForCausalLM


def _export(source: str, output: str, opset: str) -> list[str]:
    from moe_export import export
    from moe_export.bundle.reader import open_bundle

    export(source, output, weights="reference", opset=int(opset))
    return list(open_bundle(output, trust=True).manifest.notes)


def _open(folder: str) -> int:
    from moe_export.bundle.reader import open_bundle

    return len(open_bundle(folder).manifest.files)


def _load(folder: str) -> Any:
    import onnxruntime

    return bool(_session(folder).get_inputs()) and str(onnxruntime.__version__)


def _run(folder: str) -> str:
    import numpy as np

    session = _session(folder)
    sizes = {"batch": 1, "sequence": 1, "past": 0, "total": 1}
    feeds = {}
    for i in session.get_inputs():
        shape = [sizes.get(d, d) for d in i.shape]
        feeds[i.name] = np.ones(shape, np.int64) if "int" in i.type else np.zeros(shape, np.float32)
    logits = session.run(["logits"], feeds)[0]
    if not np.isfinite(logits).all():
        raise FloatingPointError("the export's logits are not finite")
    return f"logits {list(logits.shape)}, finite"


def _session(folder: str) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(Path(folder) / "model.onnx", providers=["CPUExecutionProvider"])


CHILDREN: dict[str, Callable[..., Any]] = {
    "libraries": _libraries,
    "export": _export,
    "open": _open,
    "load": _load,
    "run": _run,
}


def _forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for path in files:
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_once(files: list[Path]) -> float:
    _forget(files)
    buffer = bytearray(16 << 20)
    begin = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - begin


if __name__ == "__main__":
    raise SystemExit(main())
