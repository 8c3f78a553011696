"""Balanced placement: properties on drawn loads, the optimum of small cases, DeepSeek's published example."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_export.errors import UsageError
from moe_export.placement import check_placement, contiguous, imbalance, place, rank_loads
from moe_export.placement.packing import pack, replicate
from moe_export.schema import LayerPlacement

LOADS = st.lists(st.integers(0, 1000) | st.sampled_from([0, 1, 10**9]), min_size=1, max_size=24)

def busiest(placement: LayerPlacement, loads: object) -> float:
    return float(rank_loads(placement, np.asarray(loads)).max())


@settings(max_examples=300, deadline=None)
@given(loads=LOADS, data=st.data())
def test_any_loads_are_placed_and_never_worse_than_in_order(loads: list[int], data: st.DataObject) -> None:
    experts = len(loads)
    ranks = data.draw(st.integers(1, experts))
    redundant = data.draw(st.integers(0, min(12, experts * (ranks - 1))))
    (found,) = place([loads], ranks, redundant=redundant)
    check_placement([found], [experts], ranks)
    assert experts <= sum(map(len, found.experts)) <= experts + redundant
    (before,) = contiguous([experts], ranks)
    assert busiest(found, loads) <= busiest(before, loads) * (1 + 1e-9)
    (without,) = place([loads], ranks)
    assert busiest(found, loads) <= busiest(without, loads) * (1 + 1e-9)
    assert rank_loads(found, loads).sum() == pytest.approx(sum(loads))
    assert place([loads], ranks, redundant=redundant) == (found,)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_groups_stay_on_their_machine(data: st.DataObject) -> None:
    nodes, per_node = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    groups = nodes * data.draw(st.integers(1, 3))
    size = data.draw(st.integers(-(-per_node * nodes // groups), 4))
    experts, ranks = groups * size, nodes * per_node
    loads = data.draw(st.lists(st.integers(0, 500), min_size=experts, max_size=experts))
    redundant = data.draw(st.integers(0, min(6, experts * (per_node - 1))))
    (found,) = place([loads], ranks, nodes=nodes, groups=groups, redundant=redundant)
    check_placement([found], [experts], ranks)
    for group in range(groups):
        own = set(range(group * size, (group + 1) * size))
        machines = {rank // per_node for rank, held in enumerate(found.experts) if own & set(held)}
        assert len(machines) == 1
    assert busiest(found, loads) <= busiest(contiguous([experts], ranks)[0], loads) * (1 + 1e-9)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_packing_fills_every_slot_whatever_the_counts(data: st.DataObject) -> None:
    """Also where greedy choices would leave only ranks that have the expert already."""
    ranks = data.draw(st.integers(1, 6))
    counts = np.array(data.draw(st.lists(st.integers(1, ranks), min_size=1, max_size=8)))
    drawn = data.draw(st.lists(st.integers(0, 50), min_size=len(counts), max_size=len(counts)))
    loads = np.array(drawn, np.float64)
    slots = int(counts.sum())
    sizes = [(rank + 1) * slots // ranks - rank * slots // ranks for rank in range(ranks)]
    found = pack(loads, counts, sizes)
    assert sorted(map(len, found)) == sorted(sizes)
    assert all(len(set(held)) == len(held) for held in found)
    assert np.bincount(sum(found, []), minlength=len(counts)).tolist() == counts.tolist()


def optimum(loads: list[int], ranks: int) -> float:
    """The least load of the busiest rank over all placements without replicas, sizes one apart at most."""
    best = float("inf")
    small, more = divmod(len(loads), ranks)
    for choice in itertools.product(range(ranks), repeat=len(loads)):
        sizes = sorted(choice.count(rank) for rank in range(ranks))
        if sizes == [small] * (ranks - more) + [small + 1] * more:
            totals = [sum(x for x, r in zip(loads, choice, strict=True) if r == k) for k in range(ranks)]
            best = min(best, max(totals))
    return best


def test_small_cases_against_the_optimum() -> None:
    """No exchange with the busiest rank helps, so it has at most the largest load more than any other rank:
    at most 2 - 1/R times the optimum. What is found is much nearer."""
    draw, worst = random.Random(5), 1.0
    for _ in range(40):
        ranks = draw.randint(2, 3)
        experts = draw.randint(ranks, 7)
        loads = [draw.choice((draw.randint(0, 9), draw.randint(0, 100))) for _ in range(experts)]
        best = optimum(loads, ranks)
        found = busiest(place([loads], ranks)[0], loads)
        assert best <= found + 1e-9
        assert found <= (2 - 1 / ranks) * best + 1e-9, (loads, ranks)
        worst = max(worst, found / best if best else 1.0)
    assert worst <= 1.1


def test_groups_cost_little_against_free_placement() -> None:
    """12 experts in 4 groups on 2 machines with 4 ranks and 4 replicas: near the mean, nearer when free."""
    for seed in range(20):
        loads = np.random.default_rng(seed).integers(1, 200, 12)
        (grouped,) = place([loads], 8, nodes=2, groups=4, redundant=4)
        assert busiest(grouped, loads) <= 1.3 * loads.sum() / 8
        assert sum(map(len, grouped.experts)) <= 16
        (free,) = place([loads], 8, redundant=4)
        assert busiest(free, loads) <= 1.2 * loads.sum() / 8


def test_hot_experts_get_the_replicas() -> None:
    assert replicate(np.array([8.0, 1.0, 1.0, 2.0]), 7, most=3).tolist() == [3, 1, 1, 2]
    (found,) = place([[80, 10, 10, 10]], 4, redundant=4)
    assert sum(0 in held for held in found.experts) == 4
    assert imbalance(found, [80, 10, 10, 10]) < 1.1
    assert imbalance(contiguous([4], 4)[0], [80, 10, 10, 10]) == pytest.approx(80 / 27.5)


def test_replicas_that_would_hurt_are_left_out() -> None:
    loads = [5, 5, 5, 5]  # even already: a fifth slot makes one rank busier
    (found,) = place([loads], 2, redundant=1)
    assert sum(map(len, found.experts)) == 4
    assert imbalance(found, loads) == 1.0


@settings(max_examples=100, deadline=None)
@given(loads=st.lists(st.integers(0, 100), min_size=4, max_size=12), redundant=st.integers(1, 8))
def test_more_slots_are_never_worse(loads: list[int], redundant: int) -> None:
    few, more = (place([loads], 4, redundant=number)[0] for number in (redundant - 1, redundant))
    assert busiest(more, loads) <= busiest(few, loads) * (1 + 1e-9)


def test_a_skewed_model_becomes_even() -> None:
    draw = np.random.default_rng(1)
    loads = [draw.permutation(1 / np.arange(1, 257)) for _ in range(2)]
    for layer, load in zip(place(loads, 32, redundant=32), loads, strict=True):
        assert imbalance(layer, load) < 1.01
    for layer, load in zip(contiguous([256, 256], 32), loads, strict=True):
        assert imbalance(layer, load) > 4


def test_more_ranks_than_experts_need_replicas() -> None:
    (found,) = place([[3, 1]], 3, redundant=1)
    assert found.experts in {((0,), (0,), (1,)), ((0,), (1,), (0,)), ((1,), (0,), (0,))}


def test_contiguous() -> None:
    assert contiguous([8, 5], 4) == (
        LayerPlacement(0, ((0, 1), (2, 3), (4, 5), (6, 7))),
        LayerPlacement(1, ((0,), (1,), (2,), (3, 4))),
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 3, "nodes": 2}, "3 ranks do not lie evenly on 2 machines"),
        ({"ranks": 0}, "0 ranks do not lie evenly"),
        ({"ranks": 5}, "MoE layer 0: 5 ranks for 4 slots .*use fewer ranks or 1 redundant"),
        ({"ranks": 2, "redundant": 5}, "5 redundant experts; with 4 every rank has every expert"),
        ({"ranks": 4, "nodes": 2, "groups": 2, "redundant": 5}, "with 4 every rank of its machine has every"),
        ({"ranks": 2, "redundant": -1}, "redundant experts: -1"),
        ({"ranks": 2, "groups": 3}, "4 experts do not divide into 3 groups"),
        ({"ranks": 2, "loads": [1, -1]}, "loads: expected one finite number of 0 or more"),
        ({"ranks": 2, "loads": [1, float("nan")]}, "loads: expected one finite number"),
        ({"ranks": 1, "loads": []}, "loads: expected one finite number"),
    ],
)
def test_wrong_numbers(options: dict[str, object], message: str) -> None:
    loads = options.pop("loads", [4, 3, 2, 1])
    with pytest.raises(UsageError, match=message):
        place([loads], **options)  # type: ignore[arg-type, list-item]  # drawn from a table


def test_contiguous_with_too_many_ranks() -> None:
    with pytest.raises(UsageError, match="MoE layer 1: 4 ranks for 2 experts.*use 1 to 2 ranks"):
        contiguous([4, 2], 4)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (((0, 1), (2,)), "it is for 2 ranks, expected 3"),
        (((0, 1, 2, 3), (), ()), "rank 1 has no expert"),
        (((0, 1), (2, 4), (3,)), "rank 1 has expert 4, and the layer's are 0 to 3"),
        (((0, 0), (1, 2), (3,)), "rank 0 has expert 0 twice"),
        (((0, 1), (1, 2), (0, 2)), "expert 3 is on no rank"),
        (((0, 1, 2), (3,), (2,)), "ranks have 1 to 3 experts"),
    ],
)
def test_what_is_no_placement(experts: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(UsageError, match=f"placement of MoE layer 7: {message}"):
        check_placement([LayerPlacement(7, experts)], [4], 3)


def test_placement_of_another_model() -> None:
    with pytest.raises(UsageError, match="has 1 MoE layers, the model 2"):
        check_placement(contiguous([4], 2), [4, 4], 2)


def test_replicas_share_their_load_and_nothing_is_even() -> None:
    placement = LayerPlacement(0, ((0, 1), (0, 2)))
    assert rank_loads(placement, [[10, 1, 3], [0, 0, 2]]).tolist() == [[6, 8], [0, 2]]
    assert imbalance(placement, [10, 1, 3]) == pytest.approx(8 / 7)
    assert imbalance(placement, [0, 0, 0]) == 1.0
