"""Which rank holds which experts of each MoE layer: in order, or balanced by the load of a trace."""

from __future__ import annotations

from moe_export.placement.balance import contiguous, place
from moe_export.placement.choice import placement_from_config
from moe_export.placement.load_trace import LoadTrace, read_load_trace
from moe_export.placement.measure import check_placement, imbalance, rank_loads, rank_shares

__all__ = [
    "LoadTrace",
    "check_placement",
    "contiguous",
    "imbalance",
    "place",
    "placement_from_config",
    "rank_loads",
    "rank_shares",
    "read_load_trace",
]
