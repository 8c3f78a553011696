"""ONNX bodies of the ops of rank_routing.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def slots_body(_attributes: Mapping[str, Any], _opset: int) -> str:
    # The table is read as one line of E*L places: what is asked for is at id * L + t mod L.
    return """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    one_1d = Constant <value_ints = [1]> ()
    minus_one_1d = Constant <value_ints = [-1]> ()
    ids = Cast <to = 7> (expert_ids)
    none = Less (ids, zero)
    known = Max (ids, zero)
    choices_1d = Shape <start = 1, end = 2> (table)
    tokens_1d = Shape <start = 0, end = 1> (expert_ids)
    tokens = Squeeze (tokens_1d)
    token = Range (zero, tokens, one)
    choice_1d = Mod (token, choices_1d)
    choice = Unsqueeze (choice_1d, one_1d)
    first = Mul (known, choices_1d)
    at = Add (first, choice)
    line = Reshape (table, minus_one_1d)
    found = Gather <axis = 0> (line, at)
    nowhere_64 = Constant <value_int = -1> ()
    nowhere = Cast <to = 6> (nowhere_64)
    slots = Where (none, nowhere, found)
    """


_HITS = """
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    one_1d = Constant <value_ints = [1]> ()
    two_1d = Constant <value_ints = [2]> ()
    inner_axes = Constant <value_ints = [1, 2]> ()
    ranks_value = Constant <value_int : int = @ranks> ()
    per_rank = Constant <value_int : int = @slots_per_rank> ()
    rank = Range (zero, ranks_value, one)
    first_slot = Mul (rank, per_rank)
    first_slot_3d = Unsqueeze (first_slot, inner_axes)
    slots_64 = Cast <to = 7> (slots)
    local = Sub (slots_64, first_slot_3d)
    not_before = GreaterOrEqual (local, zero)
    not_after = Less (local, per_rank)
    here = And (not_before, not_after)
    here_64 = Cast <to = 7> (here)
    hits = ReduceMax <keepdims = 0> (here_64, two_1d)
"""
"""``hits`` [R, T]: 1 where the token has a slot on the rank, else 0."""


def load_body(_attributes: Mapping[str, Any], _opset: int) -> str:
    return f"""{_HITS}
    zero_1d = Constant <value_ints = [0]> ()
    by_rank = ReduceSum <keepdims = 0> (hits, one_1d)
    most = ReduceMax <keepdims = 1> (by_rank, zero_1d)
    load = Max (most, one)
    """


def dispatch_body(_attributes: Mapping[str, Any], _opset: int) -> str:
    # Each token is written at its row; what has none goes to a place of its own behind, cut off later.
    # So ``source`` says each row's token, and T, a row of padding, where there is none.
    return f"""{_HITS}
    minus_one = Constant <value_int = -1> ()
    minus_one_1d = Constant <value_ints = [-1]> ()
    zero_1d = Constant <value_ints = [0]> ()
    before = CumSum <exclusive = 1> (hits, one)
    hit = Greater (hits, zero)
    fits = Less (before, capacity)
    kept = And (hit, fits)
    first_row_1d = Mul (rank, capacity)
    first_row = Unsqueeze (first_row_1d, one_1d)
    row = Add (first_row, before)
    total = Mul (ranks_value, capacity)
    tokens_1d = Shape <start = 0, end = 1> (slots)
    tokens = Squeeze (tokens_1d)
    token = Range (zero, tokens, one)
    spare_1d = Mul (rank, tokens_1d)
    spare_2d = Unsqueeze (spare_1d, one_1d)
    spare = Add (spare_2d, token)
    behind = Add (spare, total)
    target_2d = Where (kept, row, behind)
    target = Reshape (target_2d, minus_one_1d)
    hits_shape = Shape (hits)
    token_2d = Expand (token, hits_shape)
    writer = Reshape (token_2d, minus_one_1d)
    spare_count = Mul (ranks_value, tokens_1d)
    line_length = Add (total, spare_count)
    empty_line = Expand (tokens_1d, line_length)
    line = ScatterElements <axis = 0> (empty_line, target, writer)
    source = Slice (line, zero_1d, total)

    width = Shape <start = 1, end = 2> (hidden)
    padding_shape = Concat <axis = 0> (one_1d, width)
    float_zero = Constant <value_float = 0.0> ()
    padding_f32 = Expand (float_zero, padding_shape)
    padding = CastLike (padding_f32, hidden)
    padded = Concat <axis = 0> (hidden, padding)
    rows = Gather <axis = 0> (padded, source)

    top_k = Shape <start = 1, end = 2> (slots)
    choices_shape = Concat <axis = 0> (one_1d, top_k)
    no_slots = Expand (minus_one, choices_shape)
    no_weights = Expand (float_zero, choices_shape)
    padded_slots = Concat <axis = 0> (slots_64, no_slots)
    padded_weights = Concat <axis = 0> (weights, no_weights)
    ranks_1d = Reshape (ranks_value, one_1d)
    blocks = Concat <axis = 0> (ranks_1d, capacity)
    source_2d = Reshape (source, blocks)
    row_slots = Gather <axis = 0> (padded_slots, source_2d)
    row_weights = Gather <axis = 0> (padded_weights, source_2d)
    row_local = Sub (row_slots, first_slot_3d)
    row_not_before = GreaterOrEqual (row_local, zero)
    row_not_after = Less (row_local, per_rank)
    row_here = And (row_not_before, row_not_after)
    slot_or_none = Where (row_here, row_local, minus_one)
    route_slots = Cast <to = 1> (slot_or_none)
    route_weights = Where (row_here, row_weights, float_zero)
    route_3d = Concat <axis = 2> (route_slots, route_weights)
    route_width = Add (top_k, top_k)
    route_shape = Concat <axis = 0> (minus_one_1d, route_width)
    route = Reshape (route_3d, route_shape)

    row_or_end = Where (kept, row, total)
    by_token = Transpose <perm = [1, 0]> (row_or_end)
    most_places = Min (ranks_1d, top_k)
    ascending, _rank = TopK <axis = 1, largest = 0, sorted = 1> (by_token, most_places)
    is_row = Less (ascending, total)
    places = Where (is_row, ascending, minus_one)
    """


def combine_body(_attributes: Mapping[str, Any], _opset: int) -> str:
    return """
    zero = Constant <value_int = 0> ()
    one_1d = Constant <value_ints = [1]> ()
    count = Shape <start = 0, end = 1> (rows)
    width = Shape <start = 1, end = 2> (rows)
    padding_shape = Concat <axis = 0> (one_1d, width)
    float_zero = Constant <value_float = 0.0> ()
    padding_f32 = Expand (float_zero, padding_shape)
    padding = CastLike (padding_f32, rows)
    padded = Concat <axis = 0> (rows, padding)
    none = Less (places, zero)
    at = Where (none, count, places)
    found = Gather <axis = 0> (padded, at)
    found_f32 = Cast <to = 1> (found)
    summed = ReduceSum <keepdims = 0> (found_f32, one_1d)
    out = CastLike (summed, rows)
    """
