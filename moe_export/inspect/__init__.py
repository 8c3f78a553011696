"""Looks at models, engines and machines: parameter accounting, expert usage, what is installed."""

from __future__ import annotations

from moe_export.inspect.layers import ExpertBlock, find_expert_blocks
from moe_export.inspect.parameters import ParameterCount, count_parameters
from moe_export.inspect.summary import ModelSummary, inspect_bundle, inspect_model, inspect_path
from moe_export.inspect.usage import LayerUsage, Usage, count_usage, plot_usage

__all__ = [
    "ExpertBlock",
    "LayerUsage",
    "ModelSummary",
    "ParameterCount",
    "Usage",
    "count_parameters",
    "count_usage",
    "find_expert_blocks",
    "inspect_bundle",
    "inspect_model",
    "inspect_path",
    "plot_usage",
]
