"""The one cost model: bytes, arithmetic and time of kernels and exchanges from shapes and data sheets.

Nothing here was measured on a GPU: every time is *predicted*. Only the standard library is imported, so that
passes and backends may use it as well as the command line.
"""

from __future__ import annotations

from moe_export.costs.exchange import (
    Exchange,
    Payload,
    all_reduce,
    all_to_all,
    bytes_sent,
    exchange_layer,
)
from moe_export.costs.formats import FORMATS, WeightFormat, weight_format
from moe_export.costs.gpus import GPUS, Gpu, find_gpu
from moe_export.costs.moe_kernels import (
    MoeShapes,
    choose_lowering,
    choose_tiles,
    layer_tiles,
    predict_layer,
)
from moe_export.costs.roofline import Assumptions, Time, predict
from moe_export.costs.routing import Popularity, fullest_block, rank_loads, sample_counts
from moe_export.costs.tiles import Tile
from moe_export.costs.work import Work, attention, elementwise, grouped_matmul, matmul

__all__ = [
    "FORMATS",
    "GPUS",
    "Assumptions",
    "Exchange",
    "Gpu",
    "MoeShapes",
    "Payload",
    "Popularity",
    "Tile",
    "Time",
    "WeightFormat",
    "Work",
    "all_reduce",
    "all_to_all",
    "attention",
    "bytes_sent",
    "choose_lowering",
    "choose_tiles",
    "elementwise",
    "exchange_layer",
    "find_gpu",
    "fullest_block",
    "grouped_matmul",
    "layer_tiles",
    "matmul",
    "predict",
    "predict_layer",
    "rank_loads",
    "sample_counts",
    "weight_format",
]
