"""Ways to break an engine with quantised experts in its files, whichever op runs them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from moe_export.bundle.manifest import read_manifest
from tests.helpers.tiny_bundle import write_manifest

Edit = Callable[[onnx.ModelProto], None]


def edit(suffix: str, change: Callable[[NDArray[Any]], None]) -> Edit:
    """Change the initializer whose name ends in ``suffix`` in place."""

    def apply(model: onnx.ModelProto) -> None:
        (tensor,) = [t for t in model.graph.initializer if t.name.endswith(suffix)]
        array = numpy_helper.to_array(tensor).copy()
        change(array)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    return apply


def scaled_expert(layer: str, expert: int, factor: float) -> Edit:
    """One expert's down scales times ``factor``."""

    def change(array: NDArray[Any]) -> None:
        array[expert] *= factor

    return edit(f"{layer}.down_scales", change)


def swapped_nibbles(layer: str, experts: slice) -> Edit:
    """Both halves of every byte of the up codes of some experts exchanged."""

    def change(array: NDArray[Any]) -> None:
        array[experts] = (array[experts] >> 4) | ((array[experts] & 15) << 4)

    return edit(f"{layer}.up_codes", change)


def gate_and_up_misplaced(layer: str) -> Edit:
    """Gate and up where the op does not look for them: concatenated, where QMoE wants pairs; exchanged in the
    panels of the plugin's op."""

    def change(array: NDArray[Any]) -> None:
        if array.ndim == 3:
            array[:] = np.concatenate([array[:, 0::2], array[:, 1::2]], axis=1)
        else:
            array[:] = np.roll(array, 32, axis=3)

    def apply(model: onnx.ModelProto) -> None:
        edit(f"{layer}.up_codes", change)(model)
        edit(f"{layer}.up_scales", change)(model)

    return apply


def shifted_scales(layer: str) -> Edit:
    """Every block gets the next one's scale."""

    def change(array: NDArray[Any]) -> None:
        array[:] = np.roll(array, 1, axis=2)

    return edit(f"{layer}.up_scales", change)


def broken_copy(bundle: Path, folder: Path, apply: Edit) -> Path:
    """A copy of ``bundle`` with a changed graph and a manifest that fits it."""
    shutil.copytree(bundle, folder)
    model = onnx.load(folder / "model.onnx")
    (folder / "model.onnx.data").unlink()
    apply(model)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    write_manifest(folder, read_manifest(folder))
    return folder
