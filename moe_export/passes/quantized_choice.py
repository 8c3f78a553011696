"""Which op runs a layer's quantised experts: ONNX Runtime's QMoE or the CPU plugin's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ops.quantization import BLOCKS, block_for
from ..schema import Alternative, MoELayer
from .base import PassContext
from .expert_form import ExpertForm, find_form
from .qmoe import INT8_ACTIVATIONS, activation_attributes
from .qmoe_proof import qmoe_problem
from .quantized_times import FLOAT, PLUGIN, QMOE, Times, compare_times, in_words

LOWERINGS = ("auto", QMOE, PLUGIN)
"""Values of ``option quantized_lowering``."""
QMOE_FASTER = 1.1
"""How many times as fast as the plugin's op QMoE must be, in the geometric mean of all numbers of tokens, to
be taken: its int8 activations are less exact, and times have noise."""
_NAMES = {QMOE: "com.microsoft.QMoE", PLUGIN: "QuantizedExpertMLP of the CPU plugin"}


@dataclass(frozen=True)
class Plan:
    """How a layer is quantised: ``op`` is :data:`QMOE` or :data:`PLUGIN`, ``why`` it is that one."""

    form: ExpertForm
    block: int
    op: str
    why: str
    others: tuple[Alternative, ...]
    measured_ms: dict[str, float]


def make_plan(context: PassContext, layer: MoELayer, bits: int, plugin_problem: str = "") -> Plan | str:
    """How the layer is quantised, or why it is not. ``plugin_problem``: why the plugin's op may not be."""
    form = find_form(context, layer.name)
    if isinstance(form, str):
        return form
    block = block_for(layer.hidden_size, layer.intermediate_size)
    if block is None:
        sizes = f"{layer.hidden_size} and {layer.intermediate_size}"
        return f"its sizes {sizes} are not both multiples of {BLOCKS[-1]}, the smallest block"
    wanted = context.options.get("quantized_lowering", "auto")
    problems = {
        QMOE: _qmoe_problem(form, layer, bits, block),
        PLUGIN: plugin_problem if context.options.get("cpu_plugin") else "there is no CPU plugin here",
    }
    for op in (QMOE, PLUGIN):
        if wanted not in ("auto", op):
            problems[op] = f"quantized_lowering = {wanted} was asked for"
    able = tuple(op for op, problem in problems.items() if not problem)
    if not able:
        return "; ".join(problems[op] for op in (QMOE, PLUGIN) if wanted in ("auto", op))
    size = (layer.num_experts, layer.top_k, layer.hidden_size, layer.intermediate_size)
    times = compare_times(size, form.attributes, able, context.options, bits=bits, block=block)
    op, why = _choose(able, problems, times)
    others = [
        Alternative(_NAMES[other], problems[other] or _beside(times, other, op), times.ms.get(other, {}))
        for other in _NAMES
        if other != op
    ]
    others.append(Alternative(FLOAT, _beside_float(times, op), times.ms.get(FLOAT, {})))
    if times.ms:
        why += f"; against the CPU plugin's float32 op: {in_words(times.ratios(op, FLOAT))}{times.note}"
    else:
        why += f"; {times.note}"
    return Plan(form, block, op, why, tuple(others), times.ms.get(op, {}))


def _qmoe_problem(form: ExpertForm, layer: MoELayer, bits: int, block: int) -> str:
    """Why QMoE cannot run the layer; empty when it can."""
    activation = activation_attributes(form.attributes)
    if isinstance(activation, str):
        return activation
    if layer.top_k > layer.num_experts:
        return f"it chooses {layer.top_k} of {layer.num_experts} experts, and QMoE each once at most"
    return qmoe_problem(
        form.attributes, bits=bits, block=block, top_k=layer.top_k, accuracy_level=INT8_ACTIVATIONS
    )


def _choose(able: tuple[str, ...], problems: Mapping[str, str], times: Times) -> tuple[str, str]:
    """The op, and why."""
    if len(able) == 1:
        other = QMOE if able[0] == PLUGIN else PLUGIN
        return able[0], f"not {_NAMES[other]}: {problems[other]}"
    if not times.ms:
        return PLUGIN, "activations stay floats in it"
    ratios = times.ratios(QMOE, PLUGIN)
    mean = math.exp(sum(math.log(r) for r in ratios.values()) / len(ratios))
    if mean >= QMOE_FASTER:
        return QMOE, f"{_NAMES[QMOE]} against the CPU plugin's op: {in_words(ratios)}"
    back = {t: 1 / r for t, r in ratios.items()}
    exact = "; its activations stay floats, so near equality it is taken" if mean > 1 else ""
    return PLUGIN, f"the CPU plugin's op against {_NAMES[QMOE]}: {in_words(back)}{exact}"


def _beside(times: Times, other: str, op: str) -> str:
    return in_words(times.ratios(other, op)) if times.ms else "not timed"


def _beside_float(times: Times, op: str) -> str:
    if not times.ms:
        return "larger"
    slower = [t for t, r in times.ratios(op, FLOAT).items() if r < 1]
    return f"the CPU plugin's float32 op: faster at {', '.join(slower)}, larger" if slower else "slower"


def qmoe_activation(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """QMoE's attributes of a form that :func:`make_plan` chose it for."""
    found = activation_attributes(attributes)
    assert not isinstance(found, str)
    return found
