"""AllReduce, AllToAll and CheckCapacity: what their references say; the kernels are compared with them."""

from __future__ import annotations

import numpy as np
import pytest

from moe_export.errors import UsageError
from moe_export.ops import OPS


def test_all_reduce() -> None:
    arrays = [np.array([1.5, -2]), np.array([2.0, 4]), np.array([0.0, -9])]
    for got in OPS["AllReduce"].reference(arrays, ranks=3):
        assert got.tolist() == [3.5, -7]
    for got in OPS["AllReduce"].reference(arrays, ranks=3, reduce="max"):
        assert got.tolist() == [2, 4]
    (got, _) = OPS["AllReduce"].reference([np.array([2**60]), np.array([1])], ranks=2)
    assert got.dtype == np.int64 and got.tolist() == [2**60 + 1]


def test_all_to_all() -> None:
    arrays = [np.arange(6).reshape(6, 1) + 10 * rank for rank in range(3)]
    results = OPS["AllToAll"].reference(arrays, ranks=3)
    assert [r[:, 0].tolist() for r in results] == [
        [0, 1, 10, 11, 20, 21],
        [2, 3, 12, 13, 22, 23],
        [4, 5, 14, 15, 24, 25],
    ]
    again = OPS["AllToAll"].reference(results, ranks=3)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, again, strict=True))


def test_wrong_arrays_are_refused() -> None:
    one, two = np.zeros((2, 3)), np.zeros((4, 3))
    for op in ("AllReduce", "AllToAll"):
        with pytest.raises(UsageError, match=f"{op}: 1 arrays for 2 ranks"):
            OPS[op].reference([one], ranks=2)
        with pytest.raises(UsageError, match=r"different shapes: \[2, 3\], \[4, 3\]"):
            OPS[op].reference([one, two], ranks=2)
    with pytest.raises(UsageError, match="2 rows do not make 3 equal blocks"):
        OPS["AllToAll"].reference([one] * 3, ranks=3)


def test_check_capacity() -> None:
    check = OPS["CheckCapacity"].reference
    assert check(np.array([4]), np.array([4])).tolist() == [4]
    with pytest.raises(UsageError, match="all ranks: layer 'l3': 5 tokens for one rank.*room for 4; build"):
        check(np.array([5]), np.array([4]), layer="l3")
