"""Steps of transformers' fusions for ONNX Runtime that moe-export replaces by its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import EnvironmentLacksError


@contextmanager
def steps_replaced(own: Mapping[str, Callable[[Any], object]]) -> Iterator[None]:
    """Inside, each step that ``own`` names is that function, which is given the model.

    Raises:
        EnvironmentLacksError: this transformers does not have a step where it is known to be.
    """
    import transformers
    from transformers.exporters import onnxruntime_fusions as fusions

    before = getattr(fusions, "_STEPS", ())
    steps = {id(getattr(fusions, name, None)): made for name, made in own.items()}
    if not set(steps) <= {id(entry[0]) for entry in before}:
        raise EnvironmentLacksError(
            f"transformers {transformers.__version__} is not one whose fusions moe-export knows; install the "
            "version in constraints.txt"
        )
    vars(fusions)["_STEPS"] = tuple((steps.get(id(entry[0]), entry[0]), *entry[1:]) for entry in before)
    try:
        yield
    finally:
        vars(fusions)["_STEPS"] = before
