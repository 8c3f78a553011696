"""What serving a model will cost, before any weight is loaded: layouts on GPUs, predicted times, comparisons.

Everything here is predicted from data sheets by the cost model in :mod:`moe_export.costs`.
"""

from __future__ import annotations

from moe_export.planning.layout import Layout, layouts
from moe_export.planning.plan import Plan, make_plan
from moe_export.planning.routing import Routing, read_trace, uniform_routing, zipf_routing
from moe_export.planning.steps import Prediction, predict_step

__all__ = [
    "Layout",
    "Plan",
    "Prediction",
    "Routing",
    "layouts",
    "make_plan",
    "predict_step",
    "read_trace",
    "uniform_routing",
    "zipf_routing",
]
