"""Expert usage: counts, balance numbers and the plot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_export.errors import InputError, UsageError
from moe_export.inspect.usage import LayerUsage, Spread, count_usage, plot_usage, spread
from moe_export.trace import LayerTrace


def _trace(ids: list[list[int]], index: int = 0, weight: float = 0.5) -> LayerTrace:
    array = np.array(ids, np.int32)
    hidden = np.zeros((len(ids), 2), np.float32)
    return LayerTrace(
        index, f"layers.{index}", array, np.full(array.shape, weight, np.float32), hidden, hidden
    )


def _usage(counts: list[int]) -> LayerUsage:
    array = np.array(counts, np.int64)
    return LayerUsage(0, "l", array, array.astype(np.float64), 0, array[None].astype(np.int32))


def test_counts_add_up_over_runs() -> None:
    runs = [
        (_trace([[0, 1], [1, 2]]), _trace([[3], [3]], 1)),
        (_trace([[1, -1]]), _trace([[0]], 1)),
    ]
    usage = count_usage(runs, (4, 5))
    assert usage.tokens == 3
    first, second = usage.layers
    assert first.counts.tolist() == [1, 3, 1, 0]
    assert first.weights.tolist() == [0.5, 1.5, 0.5, 0.0]
    assert (first.dropped, second.dropped) == (1, 0)
    assert second.counts.tolist() == [1, 0, 0, 2, 0]
    assert (second.index, second.name) == (1, "layers.1")
    json.dumps(usage.to_dict(), allow_nan=False)
    assert (usage.window, usage.windows) == (2, 1)  # the shorter run is no window of full length


def test_load_by_window() -> None:
    runs = [(_trace([[0, 1], [0, 2]]),), (_trace([[0, 3], [3, 0]]),), (_trace([[1, 2], [-1, -1]]),)]
    usage = count_usage([*runs, (_trace([[3, 2]]),)], (4,))
    (layer,) = usage.layers
    assert layer.counts.tolist() == [4, 2, 3, 3]
    assert (usage.tokens, usage.window, usage.windows) == (7, 2, 3)
    assert layer.windows.tolist() == [[2, 1, 1, 0], [2, 0, 0, 2], [0, 1, 1, 0]]
    mean, deviation = layer.shares()
    assert mean == pytest.approx([1 / 3, 0.25, 0.25, 1 / 6])
    assert deviation[0] == pytest.approx(np.std([0.5, 0.5, 0.0]))
    assert layer.by_window.p50 == layer.by_window.max == 2.0
    told = usage.to_dict()["layers"][0]["by_window"]
    assert told["share_mean"] == [0.333333, 0.25, 0.25, 0.166667]
    assert told["max_over_mean"] == {"p50": 2.0, "p95": 2.0, "max": 2.0}
    assert spread(np.array([[0, 0], [3, 1], [1, 1]])) == Spread(1.0, pytest.approx(1.45), 1.5)


@pytest.mark.parametrize(
    ("counts", "entropy", "load", "unused"),
    [
        ([5, 5, 5, 5], 1.0, 1.0, 0),
        ([20, 0, 0, 0], 0.0, 4.0, 3),
        ([0, 0], 0.0, 0.0, 2),
        ([10, 10, 0, 0], 0.5, 2.0, 2),
    ],
)
def test_balance_numbers(counts: list[int], entropy: float, load: float, unused: int) -> None:
    layer = _usage(counts)
    assert layer.entropy == pytest.approx(entropy)
    assert layer.max_over_mean == pytest.approx(load)
    assert layer.unused == unused


def test_wrong_input() -> None:
    with pytest.raises(InputError, match="expert ids from 0 to 4 with 4 experts"):
        count_usage([(_trace([[0, 4]]),)], (4,))
    with pytest.raises(InputError, match="from -2"):
        count_usage([(_trace([[0, -2]]),)], (4,))
    with pytest.raises(InputError, match="traced 1 MoE layers, expected 2"):
        count_usage([(_trace([[0, 1]]),)], (4, 4))
    with pytest.raises(InputError, match="no MoE layer"):
        count_usage([], ())


def test_plot(tmp_path: Path) -> None:
    usage = count_usage([(_trace([[0, 1]]), _trace([[3]], 1))], (4, 6))
    plot_usage(usage, tmp_path / "usage.png")
    plot_usage(usage, tmp_path / "usage.svg")
    assert (tmp_path / "usage.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "usage.svg").read_text()
    with pytest.raises(UsageError, match=r"\.png, \.svg"):
        plot_usage(usage, tmp_path / "usage.gif")
