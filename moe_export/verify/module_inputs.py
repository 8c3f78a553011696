"""Inputs for an engine made from a plain ``nn.Module``: every symbolic dimension varied, values from a
seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .inputs import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..schema import Manifest, TensorSpec

_PRIMES = (5, 3, 7, 11, 13)
_LARGE = 64
_MOST_ELEMENTS = 1 << 22


def module_cases(manifest: Manifest, seed: int) -> tuple[list[Case], list[str]]:
    """Cases for the inputs of ``manifest.io``: all dimensions 1, two sets of primes, and the largest
    allowed."""
    notes: list[str] = []
    specs = [t for t in manifest.io.inputs if t.role != "cache"]
    symbols = sorted({str(d) for t in specs for d in t.shape if isinstance(d, str)})
    bound = {s: _limit(manifest, s) for s in symbols}

    def size(symbol: str, wanted: int) -> int:
        limit = bound[symbol]
        return min(wanted, limit) if limit is not None else wanted

    shapes: list[tuple[str, str, tuple[str, ...], dict[str, int]]] = []
    if symbols:
        shapes.append(("ones", "every free dimension 1", ("edge",), {s: 1 for s in symbols}))
        for name, shift in (("primes", 0), ("other primes", 2)):
            sizes = {s: size(s, _PRIMES[(i + shift) % len(_PRIMES)]) for i, s in enumerate(symbols)}
            shapes.append((name, "every free dimension a prime", (), sizes))
        shapes.append(
            ("maximum", "the largest shape verified", ("maximum",), _largest(specs, symbols, bound, notes))
        )
    else:
        shapes += [
            ("random", "the fixed shape", (), {}),
            ("random again", "the fixed shape, other values", (), {}),
        ]
    cases: list[Case] = []
    for name, what, tags, sizes in shapes:
        case_seed = seed + len(cases)
        inputs = _draw(specs, sizes, manifest, case_seed, notes)
        text = ", ".join(f"{s} {n}" for s, n in sizes.items())
        cases.append(Case(name, f"{what}: {text}" if text else what, ("random", *tags), inputs, case_seed))
    return cases, notes


def _limit(manifest: Manifest, symbol: str) -> int | None:
    if symbol == "batch":
        return manifest.limits.max_batch
    if symbol in ("sequence", "total"):
        return manifest.limits.max_sequence
    return None


def _largest(
    specs: list[TensorSpec], symbols: list[str], bound: dict[str, int | None], notes: list[str]
) -> dict[str, int]:
    import math

    sizes = {s: min(bound[s] or _LARGE, _LARGE) for s in symbols}

    def elements(spec: TensorSpec) -> int:
        return math.prod(sizes[d] if isinstance(d, str) else d for d in spec.shape)

    while max(sizes.values()) > 1 and max(elements(t) for t in specs) > _MOST_ELEMENTS:
        largest = max(sizes, key=lambda s: sizes[s])
        sizes[largest] = max(1, sizes[largest] // 2)
    capped = [s for s in symbols if sizes[s] != bound[s]]
    if capped:
        parts = ", ".join(f"{s} {bound[s] or 'unlimited'} allowed, {sizes[s]} verified" for s in capped)
        notes.append(f"maximum shape: {parts}")
    return sizes


def _draw(
    specs: list[TensorSpec], sizes: dict[str, int], manifest: Manifest, seed: int, notes: list[str]
) -> dict[str, NDArray[Any]]:
    import numpy as np

    random = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {}
    for spec in specs:
        shape = tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)
        if spec.role == "mask":
            inputs[spec.name] = np.ones(shape, _numpy_type(spec.dtype))
        elif spec.role == "positions":
            last = np.arange(shape[-1] if shape else 1)
            inputs[spec.name] = np.broadcast_to(last, shape).astype(_numpy_type(spec.dtype))
        elif spec.dtype == "bool":
            inputs[spec.name] = random.random(shape) < 0.5
        elif "int" in spec.dtype:
            top = manifest.text.vocab_size if spec.role == "token_ids" and manifest.text is not None else 2
            if top == 2:
                note = f"input {spec.name!r}: a whole number of unknown range, so only 0 and 1 were tried"
                if note not in notes:
                    notes.append(note)
            inputs[spec.name] = random.integers(0, top, shape).astype(_numpy_type(spec.dtype))
        else:
            inputs[spec.name] = random.standard_normal(shape).astype(_numpy_type(spec.dtype))
    return inputs


def _numpy_type(name: str) -> Any:
    import numpy as np

    if name == "bfloat16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)
