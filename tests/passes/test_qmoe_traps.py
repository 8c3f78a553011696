"""What ONNX Runtime's QMoE does silently, and that the proof of a form sees each of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from moe_export.passes.qmoe import INT8_ACTIVATIONS, activation_attributes
from moe_export.passes.qmoe_proof import _Layer, qmoe_model, qmoe_problem

SILU = {"activation": "silu", "gated": 1, "alpha": 1.702, "limit": 7.0, "biased": 0}
FORM = {**SILU, "layout": "concatenated", "transposed": 0}
Change = Callable[[onnx.ModelProto, onnx.NodeProto], None]


def run_changed(layer: _Layer, change: Change | None = None, level: int = 0) -> NDArray[np.float64]:
    """The layer with its QMoE node (or what is around it) changed."""
    activation = activation_attributes(layer.attributes)
    assert not isinstance(activation, str)
    model = onnx.load_from_string(qmoe_model(layer.stored, activation, layer.top_k, level))
    if change is not None:
        (node,) = [n for n in model.graph.node if n.op_type == "QMoE"]
        change(model, node)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"hidden": layer.hidden, "expert_ids": layer.ids, "weights": layer.weights}
    return np.asarray(session.run(["out"], feed)[0], np.float64)


def attribute(name: str, value: Any) -> Change:
    def change(_model: onnx.ModelProto, node: onnx.NodeProto) -> None:
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change


def without_router_weights(_model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """The weights as logits, as one would pass them without input 14."""
    node.input[1] = node.input[14]
    del node.input[14]


def without_guard(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    (last,) = [n for n in model.graph.node if "out" in n.output]
    last.output[0] = "guarded"
    node.output[0] = "out"
    last.input[0] = "out"


def swapped_halves(model: onnx.ModelProto, _node: onnx.NodeProto) -> None:
    (codes,) = [t for t in model.graph.initializer if t.name == "up_codes"]
    array = onnx.numpy_helper.to_array(codes)
    codes.CopyFrom(onnx.numpy_helper.from_array((array >> 4) | ((array & 15) << 4), "up_codes"))


def layer() -> _Layer:
    return _Layer(FORM, 4, 32, 2)


CAUGHT: dict[str, Change] = {
    "no input 14: renormalised although normalize_routing_weights is 0": without_router_weights,
    "normalize_routing_weights 1": attribute("normalize_routing_weights", 1),
    "another beta": attribute("activation_beta", 1.0),
    "another alpha": attribute("activation_alpha", 1.702),
    "a limit that was not asked for": attribute("swiglu_limit", 1.0),
    "nibbles swapped": swapped_halves,
    "no guard: NaN and negative weights vanish": without_guard,
}


@pytest.mark.parametrize("name", CAUGHT)
def test_the_proof_sees(name: str) -> None:
    given = layer()
    assert given.judge(run_changed(given), exact=True) == ""
    problem = given.judge(run_changed(given, CAUGHT[name]), exact=True)
    assert problem, name
    assert ("do not show" in problem) == ("guard" in name)


def test_only_pairs_of_gate_and_up_are_accepted() -> None:
    with pytest.raises(Exception, match="(?i)interleaved|swiglu_fusion|swiglu"):
        run_changed(layer(), attribute("swiglu_fusion", 2))


def test_without_input_14_weights_are_renormalised_silently() -> None:
    given = layer()
    ours, theirs = run_changed(given), run_changed(given, without_router_weights)
    row = 6  # an ordinary token, whose weights do not sum to one
    assert np.isfinite(theirs[row]).all() and not np.allclose(ours[row], theirs[row], rtol=0.05)


@pytest.mark.parametrize("level", [0, INT8_ACTIVATIONS])
def test_without_the_guard_bad_tokens_look_good(level: int) -> None:
    given = layer()
    bare, guarded = run_changed(given, without_guard, level), run_changed(given, None, level)
    negative = 9
    assert np.isfinite(bare[negative]).all(), "QMoE leaves out an expert of negative weight"
    if level:
        assert np.isfinite(bare[10]).all(), "int8 activations drop a NaN of the input"
    assert np.isnan(guarded[given.good :]).all() and np.isfinite(guarded[: given.good]).all()


def test_ties_go_to_the_highest_expert() -> None:
    """A token whose choice QMoE cannot see (all logits equal) gets the last experts: the reason why 1 marks
    the chosen ones and 0 all others, and why weights cannot be the mark."""
    given = layer()
    given.weights[1] = 0.0, 1.0
    assert given.judge(run_changed(given), exact=True) == ""
    given.hidden[6:8] = given.hidden[0]
    given.weights[6:8] = 1.0
    given.ids[6], given.ids[7] = [0, 1], [3, 4]

    def blind(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
        model.graph.node.insert(
            list(model.graph.node).index(node), onnx.helper.make_node("Sub", [node.input[1]] * 2, ["blind"])
        )
        ones = onnx.helper.make_node("Add", ["blind", "one"], ["all_ones"])
        model.graph.node.insert(list(model.graph.node).index(node), ones)
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((), np.float32), "one"))
        node.input[1], node.input[14] = "blind", "all_ones"

    seen = run_changed(given, blind)
    highest = run_changed(given)[7]
    np.testing.assert_allclose(seen[6], highest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": "gelu"}, "QMoE has no gated gelu"),
        ({"activation": "gelu", "gated": 0}, "tanh approximation"),
        ({"activation": "relu2", "gated": 0}, "QMoE has no relu2"),
    ],
)
def test_forms_that_qmoe_has_not(change: dict[str, Any], reason: str) -> None:
    problem = qmoe_problem({**SILU, **change}, bits=8, block=32, top_k=2, accuracy_level=INT8_ACTIVATIONS)
    assert reason in problem


def test_the_gelu_of_qmoe_is_not_the_exact_one() -> None:
    """The difference is small, so only exact arithmetic shows it."""
    given = _Layer({**FORM, "activation": "gelu", "gated": 0}, 4, 32, 2)
    assert given.judge(given.run({"activation_type": "gelu", "swiglu_fusion": 0}, 0), exact=True)
    tanh = _Layer({**FORM, "activation": "gelu_tanh", "gated": 0}, 4, 32, 2)
    assert tanh.judge(tanh.run({"activation_type": "gelu", "swiglu_fusion": 0}, 0), exact=True) == ""


@pytest.mark.parametrize("bits", [8, 4])
def test_prepacking_may_be_switched_off(bits: int) -> None:
    """Sessions that share memory-mapped weights do so; the layout in the file is the plain one then, too."""
    given = _Layer(FORM, bits, 32, 2)
    activation = activation_attributes(FORM)
    assert not isinstance(activation, str)
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.add_session_config_entry("session.disable_prepacking", "1")
    model = qmoe_model(given.stored, activation, 2, INT8_ACTIVATIONS)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"hidden": given.hidden, "expert_ids": given.ids, "weights": given.weights}
    assert given.judge(np.asarray(session.run(None, feed)[0], np.float64), exact=False) == ""
