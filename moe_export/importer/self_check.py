"""The traced program against the module it was traced from, at sizes that were not traced.

torch.export assumes that a dynamic size is neither 0 nor 1, so a model that branches on ``length == 1`` (as
many do for decoding) is traced without that branch and without a word. Running both finds this, and every
other way in which the sample got into the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ExportError
from .trace_errors import FIX, first_line

if TYPE_CHECKING:
    from .graphs import TracedGraph

TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest difference relative to the largest value (at least 1). Both run the same PyTorch kernels; only the
shapes of a few of them may differ."""


def check_program(
    program: torch.export.ExportedProgram, plan: TracedGraph, *, single_tokens: bool = True
) -> None:
    """Run ``program`` and ``plan.module`` on the same inputs of several sizes.

    ``single_tokens``: False where the module's own step for one token is known to be another computation.

    Raises:
        ExportError: they differ, or only the program fails; names the sizes.
    """
    traced = program.module(check_guards=False)
    for sizes in _sizes(plan):
        if not single_tokens and sizes.get("sequence") == 1:
            continue
        inputs = tuple(
            _resized(tensor, tuple(sizes.get(d, d) if isinstance(d, str) else d for d in spec.shape))
            for tensor, spec in zip(plan.sample, plan.io.inputs, strict=True)
        )
        text = ", ".join(f"{name} {size}" for name, size in sizes.items())
        try:
            wanted = _tensors(plan.module(*_cloned(inputs)))
        except Exception:  # The model's own code may refuse a size; then the engine owes it nothing.
            continue
        try:
            got = _tensors(traced(*_cloned(inputs)))
        except Exception as error:  # Whatever the operators raise: the graph does not hold at this size.
            raise ExportError(
                f"the traced graph fails at {text}, where the model itself runs ({first_line(error)}). {FIX}"
            ) from error
        names = [spec.name for spec in plan.io.outputs]
        for name, a, b in zip(names, got, wanted, strict=True):
            if why := _difference(a, b):
                raise ExportError(
                    f"at {text} the traced graph gives another {name} than the model: {why}. {FIX}"
                )


def _sizes(plan: TracedGraph) -> Iterator[dict[str, int]]:
    """Dimension → size: everything 1, a first and a later step with a cache, or some other sizes."""
    names = list(dict.fromkeys(d for spec in plan.io.inputs for d in spec.shape if isinstance(d, str)))
    if not names:
        return
    if {"past", "sequence", "total"} <= set(names):
        for batch, sequence, past in ((1, 1, 6), (1, 1, 0), (2, 4, 0), (1, 3, 7)):
            known = {"batch": batch, "sequence": sequence, "past": past, "total": past + sequence}
            yield {name: known.get(name, 1) for name in names}
        return
    yield dict.fromkeys(names, 1)
    yield {name: 2 + index for index, name in enumerate(names)}


def _resized(sample: torch.Tensor, shape: tuple[Any, ...]) -> torch.Tensor:
    """``sample`` repeated or cut along each axis to ``shape``."""
    for axis, size in enumerate(shape):
        sample = sample.index_select(axis, torch.arange(int(size)) % max(sample.shape[axis], 1))
    return sample


def _cloned(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(t.clone() for t in inputs)


def _tensors(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> str:
    """Why the results are not the same; empty when they are."""
    if got.shape != wanted.shape:
        return f"shape {list(got.shape)}, expected {list(wanted.shape)}"
    if got.dtype != wanted.dtype:
        return f"dtype {got.dtype}, expected {wanted.dtype}"
    if not wanted.numel():
        return ""
    if not wanted.is_floating_point():
        return "" if torch.equal(got, wanted) else f"{int((got != wanted).sum())} values differ"
    same = torch.isclose(got.double(), wanted.double(), rtol=0.0, atol=0.0, equal_nan=True)
    if bool(same.all()):
        return ""
    scale = max(
        1.0, float(wanted.double()[torch.isfinite(wanted)].abs().max() if torch.isfinite(wanted).any() else 1)
    )
    error = float((got.double() - wanted.double())[~same].abs().max())
    bound = TOLERANCE.get(wanted.dtype, 1e-6)
    return (
        "" if error <= bound * scale else f"largest difference {error:.3g} where values go up to {scale:.3g}"
    )
