"""The comparison of GEMM libraries: right products only, a row for each library."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture(scope="module", autouse=True)
def tools_on_path() -> Any:
    sys.path.insert(0, str(TOOLS))
    yield
    sys.path.remove(str(TOOLS))


def test_every_library_gets_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from bench_gemm_libraries import _measure
    from moe_layer import Shape

    options = argparse.Namespace(rounds=1, threads=1, markdown=True)
    _measure(Shape("tiny", 64, 96, 3, 1), [1, 5], options, tmp_path)
    printed = capsys.readouterr().out
    for name in ("MKL (torch)", "oneDNN (torch)", "OpenBLAS (NumPy)", "ONNX Runtime", "1 rows", "5 rows"):
        assert name in printed
    assert "plugin, packed" in printed or "the plugin is left out" in printed


def test_wrong_products_are_refused() -> None:
    from bench_gemm_libraries import _check, openblas
    from moe_layer import Layer, Shape

    layer = Layer(Shape("tiny", 64, 96, 3, 1), "float32")
    right = openblas(layer)
    _check("right", right, layer, whole=False)
    for broken in (lambda y: 2 * y, lambda y: y[::-1], lambda y: y * np.nan):

        def wrong(rows: Any, expert: int, broken: Any = broken) -> Any:
            return broken(right(rows, expert))

        with pytest.raises(SystemExit, match="broken: wrong result"):
            _check("broken", wrong, layer, whole=False)


@pytest.mark.parametrize("arguments", [["--shape", "D"], ["--rows", "0"], ["--rows", "x"], ["--rounds", "0"]])
def test_wrong_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from bench_gemm_libraries import main

    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "expected" in capsys.readouterr().err
