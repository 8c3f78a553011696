"""Contracts check what they are given, and every op is valid ONNX that a stock reader takes."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import onnx
import onnx.defs
import pytest

from moe_export.errors import UsageError
from moe_export.ops import DOMAIN, OPS, VERSION, get_op
from moe_export.ops.torch_ops import register_onnx_schemas

from .one_op import INNER, OPSETS, onnx_model

SMALLEST = {
    "Router": {"top_k": 2},
    "Dispatch": {"num_experts": 4},
    "GroupedMatMul": {},
    "ExpertMatMul": {"num_experts": 4},
    "ScaledExpertMatMul": {"num_experts": 4, "block_rows": 2, "block_columns": 3},
    "Combine": {},
    "ExpertMLP": {"num_experts": 4},
    "QuantizedExpertMLP": {"num_experts": 4},
    "ExpertSlots": {},
    "RankLoad": {"ranks": 2, "slots_per_rank": 3},
    "RankDispatch": {"ranks": 2, "slots_per_rank": 3},
    "RankCombine": {},
    "AllReduce": {"ranks": 2},
    "AllToAll": {"ranks": 2},
    "CheckCapacity": {},
}
WITH_BODY = [name for name, op in OPS.items() if op.body is not None]


def required_dtypes(name: str) -> dict[str, str]:
    return {p.name: p.dtypes[0] for p in OPS[name].inputs if not p.optional}


def test_unknown_op_lists_the_choices() -> None:
    with pytest.raises(UsageError, match="unknown op 'Routr'; nearest: Router.*choices: AllReduce, AllTo"):
        get_op("Routr")


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    [
        ("Router", {"top_k": 2, "scores": "softmax"}, r"unknown attribute 'scores'; nearest: score"),
        (
            "Router",
            {"top_k": 2, "score": "softmx"},
            r"Router\.score: unknown value 'softmx'; nearest: softmax",
        ),
        ("Router", {}, r"Router: attribute 'top_k' is required"),
        ("Router", {"top_k": 1.5}, r"Router\.top_k: expected int, got 1\.5"),
        ("Router", {"top_k": 0}, r"Router\.top_k: expected at least 1, got 0"),
        ("Router", {"top_k": "2"}, r"Router\.top_k: expected int"),
        ("Router", {"top_k": 2, "renormalize": 2}, r"Router\.renormalize: unknown value 2; choices: 0, 1"),
        ("Router", {"top_k": 2, "capacity": -1}, r"Router\.capacity: expected at least 0"),
        ("Router", {"top_k": 2, "scale": float("nan")}, r"Router\.scale: expected a finite number"),
        ("Router", {"top_k": 2, "n_group": 2, "topk_group": 3}, r"topk_group 3 is more than n_group 2"),
        ("Dispatch", {"num_experts": 0}, r"Dispatch\.num_experts: expected at least 1"),
        ("ExpertMLP", {"num_experts": 4, "activation": "swish"}, r"choices: clamped_swiglu, gelu"),
        (
            "ExpertMLP",
            {"num_experts": 4, "activation": "clamped_swiglu", "gated": 0},
            r"clamped_swiglu.*gated",
        ),
        ("QuantizedExpertMLP", {"num_experts": 4, "bits": 3}, r"bits: unknown value 3; choices: 4, 8"),
        ("QuantizedExpertMLP", {"num_experts": 4, "block": 24}, r"block: unknown value 24"),
        (
            "QuantizedExpertMLP",
            {"num_experts": 4, "activation": "clamped_swiglu", "gated": 0},
            r"clamped_swiglu.*gated",
        ),
        ("Combine", {"layer": "x"}, r"Combine: unknown attribute 'layer'"),
    ],
)
def test_wrong_attributes_are_refused(op: str, attributes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OPS[op].complete(attributes)


def test_complete_fills_in_defaults_and_converts() -> None:
    full = OPS["Router"].complete({"top_k": True, "scale": 2})
    assert full["top_k"] == 1 and type(full["top_k"]) is int
    assert full["scale"] == 2.0 and type(full["scale"]) is float
    assert set(full) == {a.name for a in OPS["Router"].attributes}


def test_variants_are_equal_exactly_when_one_body_serves_both() -> None:
    router = OPS["Router"]
    base = router.variant({"top_k": 2})
    assert base == router.variant({"top_k": 4, "scale": 2.5, "layer": "x"})
    for change in ({"score": "sigmoid"}, {"renormalize": 1}, {"n_group": 2}, {"biased": 1}, {"capacity": 3}):
        assert router.variant({"top_k": 2, **change}) != base
    for op in (OPS[name] for name in WITH_BODY):
        for attribute in op.attributes:
            if not attribute.structural and attribute.kind is not str:
                assert op.body is not None
                text = op.body(op.complete(SMALLEST[op.name]), 20)
                assert (
                    attribute.name in ("drops",)
                    or f"@{attribute.name}" in text
                    or _elsewhere(op.name, attribute.name)
                )


def _elsewhere(op: str, attribute: str) -> bool:
    """A number whose use depends on a structural attribute: it is in the body of that variant."""
    with_it = {
        ("Router", "epsilon"): {"renormalize": 1},
        ("Router", "topk_group"): {"n_group": 2},
        ("ExpertMLP", "alpha"): {"activation": "clamped_swiglu"},
        ("ExpertMLP", "limit"): {"activation": "clamped_swiglu"},
        ("QuantizedExpertMLP", "alpha"): {"activation": "clamped_swiglu"},
        ("QuantizedExpertMLP", "limit"): {"activation": "clamped_swiglu"},
    }[op, attribute]
    body = OPS[op].body
    return body is not None and f"@{attribute}" in body(OPS[op].complete({**SMALLEST[op], **with_it}), 20)


@pytest.mark.parametrize("name", OPS)
def test_reference_takes_what_the_contract_lists(name: str) -> None:
    op = OPS[name]
    parameters = inspect.signature(op.reference).parameters
    assert list(parameters)[: len(op.inputs)] == [p.name for p in op.inputs]
    assert {a.name for a in op.attributes} == set(list(parameters)[len(op.inputs) :])
    for param in op.inputs:
        has_default = parameters[param.name].default is not inspect.Parameter.empty
        assert has_default == param.optional, param.name
    for attribute in op.attributes:
        default = parameters[attribute.name].default
        if default is not inspect.Parameter.empty:
            assert default == attribute.default, attribute.name


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", OPS)
def test_a_model_of_the_op_is_valid_and_readable(name: str, opset: int, tmp_path: Path) -> None:
    file = tmp_path / "op.onnx"
    onnx.save(onnx_model(name, SMALLEST[name], required_dtypes(name), opset), file)
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    declared = {o.domain: o.version for o in model.opset_import}
    assert declared == {"": opset, DOMAIN: VERSION}
    assert {node.domain for node in model.graph.node} == {DOMAIN}
    defined = {(f.domain, f.name) for f in model.functions}
    assert defined == {(DOMAIN, n) for n in (name, *INNER.get(name, ())) if n in WITH_BODY}
    for function in model.functions:
        assert function.doc_string
        imported = {o.domain for o in function.opset_import}
        assert {node.domain for node in function.node} <= imported


def test_schemas_are_registered_once_and_match_the_contracts() -> None:
    register_onnx_schemas()
    register_onnx_schemas()
    for name, op in OPS.items():
        schema = onnx.defs.get_schema(name, VERSION, DOMAIN)
        assert [p.name for p in schema.inputs] == [p.name for p in op.inputs]
        assert [p.name for p in schema.outputs] == [p.name for p in op.outputs]
        assert set(schema.attributes) == {a.name for a in op.attributes}
        for attribute in op.attributes:
            assert schema.attributes[attribute.name].required == (attribute.default is None), attribute.name
        kinds = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
        for param, formal in zip(op.inputs, schema.inputs, strict=True):
            assert len(kinds[formal.type_str]) == len(param.dtypes)
        # The checker now checks nodes against the schema as well.
        onnx_model(name, SMALLEST[name], required_dtypes(name), 20)


def test_the_checker_refuses_a_node_without_its_required_attribute() -> None:
    register_onnx_schemas()
    model = onnx_model("Dispatch", {"num_experts": 4}, {"expert_ids": "int32"}, 20)
    del model.graph.node[0].attribute[:]
    with pytest.raises(onnx.checker.ValidationError, match="num_experts"):
        onnx.checker.check_model(model)


def test_what_needs_other_ranks_or_fails_the_run_has_no_body() -> None:
    assert set(OPS) - set(WITH_BODY) == {"AllReduce", "AllToAll", "CheckCapacity"}
    assert {name for name, op in OPS.items() if op.collective} == {"AllReduce", "AllToAll"}
    with pytest.raises(UsageError, match="AllReduce has no ONNX body: only a kernel runs it"):
        OPS["AllReduce"].function({"ranks": 2}, 20)
    with pytest.raises(UsageError, match="Combine: a collective has no body"):
        dataclasses.replace(OPS["Combine"], collective=True)


@pytest.mark.parametrize("name", [n for n, op in OPS.items() if op.tolerance])
def test_tolerances_are_ordered_and_reasoned(name: str) -> None:
    bounds = OPS[name].tolerance
    floats = {t for p in OPS[name].outputs for t in p.dtypes} & {"float32", "float16", "bfloat16"}
    assert floats <= set(bounds) <= {"float32", "float16", "bfloat16"}
    for bound in bounds.values():
        assert 0 < bound.rms < bound.max < 0.1
        assert bound.reason
    largest = [bounds[dtype].max for dtype in ("float32", "float16", "bfloat16") if dtype in bounds]
    assert largest == sorted(largest)
