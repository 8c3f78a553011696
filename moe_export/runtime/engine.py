"""One ONNX Runtime session with its declared inputs and outputs. Runs are thread-safe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_export.backends.onnxruntime.runner import one_line, ort_error_types
from moe_export.errors import BundleError, choices_text
from moe_export.runtime.tensors import ort_type_name, to_numpy, to_ort
from moe_export.schema import ModelIO, TensorSpec

if TYPE_CHECKING:
    import onnxruntime as ort

Array = NDArray[Any]


class Engine:
    """Runs a session. ``outputs`` are the names :meth:`run` returns, in order.

    ``shared_cache``: see :attr:`Manifest.cache`. ``rows_apart``: see :attr:`Manifest.rows_apart`.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        label: str,
        outputs: Sequence[str],
        *,
        shared_cache: bool = False,
        rows_apart: bool = False,
    ) -> None:
        self.shared_cache = shared_cache
        self.rows_apart = rows_apart
        self._session = session
        self._label = label
        self._errors = ort_error_types()
        self.outputs = tuple(outputs)
        # bfloat16 has no NumPy form that ONNX Runtime's own conversion accepts.
        kinds = [value.type for value in (*session.get_inputs(), *session.get_outputs())]
        self._needs_values = "tensor(bfloat16)" in kinds

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """All outputs for checked inputs.

        Raises:
            BundleError: ONNX Runtime failed.
        """
        if self.rows_apart:
            rows = split_rows(feeds)
            if rows is not None:
                parts = [self.run(row) for row in rows]
                return {name: np.concatenate([part[name] for part in parts]) for name in self.outputs}
        names = list(self.outputs)
        try:
            if not self._needs_values:
                return dict(zip(names, self._session.run(names, feeds), strict=True))
            values = {name: to_ort(array) for name, array in feeds.items()}
            results = self._session.run_with_ort_values(names, values)
        except self._errors as error:
            raise self._failure(error) from error
        return {name: to_numpy(value) for name, value in zip(names, results, strict=True)}

    def binding(self) -> ort.IOBinding:
        """A new, empty input/output binding of this session; one thread uses it."""
        return self._session.io_binding()

    def run_bound(self, binding: ort.IOBinding) -> None:
        """Run with what is bound.

        Raises:
            BundleError: ONNX Runtime failed.
        """
        try:
            self._session.run_with_iobinding(binding)
        except self._errors as error:
            raise self._failure(error) from error

    def _failure(self, error: BaseException) -> BundleError:
        return BundleError(f"{self._label}: the run failed: {one_line(error)}")


def split_rows(feeds: dict[str, Array]) -> list[dict[str, Array]] | None:
    """One feed per sequence where a batch gets several new tokens after a past; None where it does not.

    Every input begins with the batch, or (forced routing) with batch times new tokens.
    """
    ids = feeds.get("input_ids")
    past = next((array.shape[2] for name, array in feeds.items() if name.startswith("past.")), 0)
    if ids is None or not past or len(ids) < 2 or ids.shape[1] < 2:
        return None
    batch = len(ids)
    sizes = {name: len(array) // batch for name, array in feeds.items()}
    return [
        {name: array[row * sizes[name] : (row + 1) * sizes[name]] for name, array in feeds.items()}
        for row in range(batch)
    ]


def check_declared(session: ort.InferenceSession, io: ModelIO, label: str) -> None:
    """Refuse a model whose inputs and outputs are not those of the manifest.

    Raises:
        BundleError: the first name, dtype or input rank that differs.
    """
    pairs: list[tuple[str, Sequence[TensorSpec], Sequence[Any]]] = [
        ("input", io.inputs, session.get_inputs()),
        ("output", io.outputs, session.get_outputs()),
    ]
    for kind, specs, values in pairs:
        found = {value.name: value for value in values}
        extra = sorted(set(found) - {spec.name for spec in specs})
        if extra:
            raise BundleError(
                f"{label} has the {kind} {extra[0]!r}, which the manifest does not declare; rebuild it"
            )
        for spec in specs:
            if spec.name not in found:
                raise BundleError(
                    f"{label} lacks the manifest's {kind} {spec.name!r}; {choices_text(spec.name, found)}"
                )
            value = found[spec.name]
            if value.type != ort_type_name(spec.dtype):
                raise BundleError(
                    f"{label}: {kind} {spec.name!r} is {value.type}, the manifest says {spec.dtype}"
                )
            if kind == "input" and len(value.shape) != len(spec.shape):
                raise BundleError(
                    f"{label}: {kind} {spec.name!r} has {len(value.shape)} axes, the manifest says "
                    f"{len(spec.shape)}"
                )
