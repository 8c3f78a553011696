"""Exports every registered family's tiny models and measures how far the engines are from transformers.

    python tools/measure_families.py [FAMILY ...]

Writes the measurements into moe_export/models/families/results.json, from which docs/families.md is made.
Each model is traced once and built for every target; its engines run at shapes other than the traced ones,
with padding, and in pieces through the KV cache. Logits and the routing of every MoE layer are compared with
the model's own code.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.models.families import FAMILIES, Family, family, tiny_model
from moe_export.trace import LayerTrace, TracedRun

RESULTS = Path(__file__).resolve().parent.parent / "moe_export" / "models" / "families" / "results.json"
TARGETS = ("portable", "onnxruntime")
SHAPES = ((1, 1, 0), (1, 5, 0), (3, 13, 0), (2, 29, 0))
"""Batch, length and left padding of whole sequences; the traced sample has 3 rows of 5 new and 11 past
tokens.
"""
PADDED = (3, 13, 4)
CHUNKS = (5, 1, 1, 7, 1, 4)
WEIGHT_TOLERANCE = 1e-5

Array = NDArray[Any]


@dataclass(frozen=True)
class Measurement:
    """What one model class of a family gave.

    ``max_error`` per target: largest difference over ``max(1, |reference|max)``. ``tokens``: how many routed
    tokens had the same experts as in the reference. ``problems``: empty when everything holds.
    """

    family: str
    model_class: str
    configuration: str
    max_error: dict[str, float]
    moe_layers: int
    router: str
    tokens: int
    seconds: float
    problems: tuple[str, ...] = ()


def fingerprint(entry: Family, model_class: str) -> str:
    """Changes when the measured model changes."""
    described = json.dumps([model_class, entry.tiny, entry.left_padding, entry.cached_reference],
                           sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def relative_error(reference: Array, engine: Array, valid: Array | None = None) -> float:
    """Largest difference over ``max(1, |reference|max)``, at ``valid`` tokens; infinite if something is not
    finite.
    """
    if reference.shape != engine.shape:
        return float("inf")
    if valid is not None:
        reference, engine = reference[valid], engine[valid]
    if not (np.isfinite(reference).all() and np.isfinite(engine).all()):
        return float("inf")
    return float(np.abs(reference - engine).max() / max(1.0, float(np.abs(reference).max())))


def routing_problem(
    reference: LayerTrace, engine: LayerTrace, valid: Array, tolerance: float = WEIGHT_TOLERANCE
) -> str:
    """Empty when every valid token goes to the same experts with the same weights; order does not matter."""
    if reference.expert_ids.shape != engine.expert_ids.shape:
        return f"expert ids {engine.expert_ids.shape}, in the model {reference.expert_ids.shape}"
    want_ids, want_weights = _sorted_routing(reference, valid)
    got_ids, got_weights = _sorted_routing(engine, valid)
    other = np.nonzero((want_ids != got_ids).any(axis=1))[0]
    if len(other):
        token = int(other[0])
        return f"token {token} goes to {got_ids[token].tolist()}, in the model to {want_ids[token].tolist()}"
    error = float(np.abs(want_weights - got_weights).max(initial=0.0))
    if not error <= tolerance * max(1.0, float(np.abs(want_weights).max(initial=0.0))):
        return f"routing weights differ by {error:.1e}"
    return ""


def _sorted_routing(layer: LayerTrace, valid: Array) -> tuple[Array, Array]:
    order = np.argsort(layer.expert_ids, axis=1, kind="stable")
    ids = np.take_along_axis(layer.expert_ids, order, axis=1)[valid]
    weights = np.take_along_axis(layer.weights, order, axis=1)[valid]
    return ids, np.where(ids < 0, 0.0, weights)


class Judge:
    """Collects the comparisons of one engine with one model."""

    def __init__(self, target: str, tolerance: float) -> None:
        self.target, self.tolerance = target, tolerance
        self.max_error, self.tokens = 0.0, 0
        self.problems: list[str] = []

    def compare(self, case: str, reference: TracedRun, engine: TracedRun, masks: Sequence[Array]) -> None:
        """``masks``: [batch, length] of each kind of token (encoder, decoder); the last is the output's."""
        name, expected = next(iter(reference.outputs.items()))
        error = relative_error(expected, engine.outputs[name], masks[-1].astype(bool))
        self.max_error = max(self.max_error, error)
        if not error <= self.tolerance:
            allowed = f"allowed {self.tolerance:.0e}"
            self.problems.append(f"{self.target}, {case}: {name} differ by {error:.1e}, {allowed}")
        if len(reference.layers) != len(engine.layers):
            counts = f"{len(engine.layers)} MoE layers in the engine, {len(reference.layers)} in the model"
            self.problems.append(f"{self.target}, {case}: {counts}")
            return
        for want, got in zip(reference.layers, engine.layers, strict=True):
            valid = next(m.reshape(-1).astype(bool) for m in masks if m.size == len(want.expert_ids))
            problem = routing_problem(want, got, valid, max(WEIGHT_TOLERANCE, self.tolerance))
            if problem:
                self.problems.append(f"{self.target}, {case}, {want.name}: {problem}")
            self.tokens += 0 if problem else int(valid.sum())


@contextmanager
def traced_once() -> Iterator[None]:
    """Inside, exporting the same source again returns a copy of the first graph: targets share one trace."""
    import onnx_ir as ir

    from moe_export.importer import export as module

    own, kept = module.export_model, {}

    def once(source: Any, **options: Any) -> Any:
        key = source.info.hash
        if key not in kept:
            exported = own(source, **options)
            kept[key] = exported, ir.to_proto(exported.model)
        exported, proto = kept[key]
        return dataclasses.replace(exported, model=ir.from_proto(proto))

    module.export_model = once
    try:
        yield
    finally:
        module.export_model = own


def measure(name: str, model_class: str | None = None) -> Measurement:
    """Build ``model_class`` of the family ``name`` for every target and compare it with the model itself.

    Raises:
        MoeExportError: the model cannot be exported.
    """
    import torch

    from moe_export.importer.sources import load_source
    from moe_export.models.reference import ReferenceModel

    torch.set_num_threads(1)
    entry = family(name)
    chosen = model_class or entry.model_class
    start = time.perf_counter()
    model = tiny_model(name, model_class=chosen)
    task = None if "text-generation" in entry.tasks else entry.tasks[0]
    reference = ReferenceModel(load_source(model, task=task))
    judges, routers, layers = [], set(), 0
    with tempfile.TemporaryDirectory() as folder, traced_once():
        for target in TARGETS:
            judge, manifest = _measure_target(entry, model, reference, target, Path(folder) / target)
            judges.append(judge)
            layers = len(manifest.moe_layers)
            routers |= {"plain nodes" if one.router is None else "Router op" for one in manifest.moe_layers}
    return Measurement(
        family=name,
        model_class=chosen,
        configuration=fingerprint(entry, chosen),
        max_error={j.target: float(f"{j.max_error:.1e}") for j in judges},
        moe_layers=layers,
        router=" and ".join(sorted(routers)) or "none seen",
        tokens=sum(j.tokens for j in judges),
        seconds=round(time.perf_counter() - start, 1),
        problems=tuple(p for j in judges for p in j.problems),
    )


def _measure_target(
    entry: Family, model: Any, reference: Any, target: str, folder: Path
) -> tuple[Judge, Any]:
    import moe_export

    judge = Judge(target, entry.tolerance)
    moe_export.build(model, folder, target=target, task=reference.source.task, verify=False, bench=False,
                     threads=1)
    with moe_export.load(folder, threads=1) as session:
        tokens = next(spec for spec in session.io.inputs if spec.name == "input_ids")
        if tokens.shape != ("batch", "sequence"):
            judge.problems.append(f"{target}: input_ids has the shape {tokens.shape}")
        for batch, length, padding in (*SHAPES, *((PADDED,) if entry.left_padding else ())):
            inputs, masks = _inputs(session.io, batch, length, padding)
            case = f"batch {batch}, length {length}" + (f", {padding} padded" if padding else "")
            judge.compare(case, reference.run(inputs), session.run_traced(inputs), masks)
        if session.io.cache_inputs:
            inputs, masks = _inputs(session.io, 2, sum(CHUNKS), 0)
            got = session.chunked_logits(inputs["input_ids"], inputs["attention_mask"], CHUNKS)
            want = _cached_run(model, inputs) if entry.cached_reference else reference.run(inputs)
            judge.compare(f"in pieces of {CHUNKS}", want, got, masks)
        return judge, session.manifest


def _inputs(io: Any, batch: int, length: int, padding: int) -> tuple[dict[str, Array], list[Array]]:
    generator = np.random.default_rng([batch, length, padding])
    mask = np.ones((batch, length), np.int64)
    mask[0, :padding] = 0

    def tokens(count: int) -> Array:
        """No token twice in a row: equal tokens tie where a family picks keys by content."""
        return np.stack([generator.permutation(np.arange(3, 100))[:count] for _ in range(batch)])

    inputs: dict[str, Array] = {
        "input_ids": tokens(length),
        "attention_mask": mask,
    }
    masks: list[Array] = [mask]
    names = {spec.name for spec in io.inputs}
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = tokens(length + 2)
        masks.append(np.ones((batch, length + 2), np.int64))
    return {n: v for n, v in inputs.items() if n in names}, masks


def _cached_run(model: Any, inputs: dict[str, Array]) -> TracedRun:
    """Logits of transformers' own cached run in the same pieces."""
    import torch
    from transformers import DynamicCache

    ids, cache, parts, begin = torch.from_numpy(inputs["input_ids"]), DynamicCache(config=model.config), [], 0
    with torch.no_grad():
        for chunk in CHUNKS:
            piece = ids[:, begin : begin + chunk]
            parts.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
            begin += chunk
    return TracedRun({"logits": torch.cat(parts, dim=1).numpy()}, ())


def versions() -> dict[str, str]:
    """What the measurements depend on."""
    from importlib.metadata import version

    import onnxruntime

    names = ("torch", "transformers", "onnx", "onnxscript", "onnx-ir")
    return {**{n: version(n) for n in names}, "onnxruntime": onnxruntime.__version__}


def read_results(path: Path = RESULTS) -> dict[str, Measurement]:
    """Measurements by model class."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = (Measurement(**{**row, "problems": tuple(row["problems"])}) for row in data["measurements"])
    return {row.model_class: row for row in rows}


def write_results(results: dict[str, Measurement], path: Path = RESULTS) -> None:
    """Write measurements of registered classes, sorted, with the versions of this environment."""
    known = {cls for entry in FAMILIES.values() for cls in entry.classes}
    rows = sorted((r for r in results.values() if r.model_class in known),
                  key=lambda r: (r.family, r.model_class))
    data = {"versions": versions(), "chunks": CHUNKS,
            "measurements": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Measure the named families, or all; exit code 1 if one has problems."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="families to measure; default: all")
    arguments = parser.parse_args()
    names = arguments.families or [n for n, f in FAMILIES.items() if f.status != "refused"]
    failed = False
    for name in names:
        for model_class in family(name).classes:
            row = measure(name, model_class)
            worst = max(row.max_error.values())
            print(f"{name:24s} {model_class:44s} {worst:.1e} {row.router:12s} {row.seconds:6.1f} s",
                  flush=True)
            for problem in row.problems:
                print(f"    {problem}", flush=True)
            failed = failed or bool(row.problems)
            write_results({**read_results(), model_class: row})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
