"""Pass native-experts: whole layers where their form is proven, ops one by one elsewhere, and its reasons."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from moe_export.costs.moe_kernels import native_work
from moe_export.errors import UsageError
from moe_export.ops import DOMAIN
from moe_export.passes.base import PassContext
from moe_export.passes.inline_bodies import InlineBodies
from moe_export.passes.native_choice import choose, shapes_of, threshold_of
from moe_export.passes.native_experts import CAPACITY_INPUT, LOAD_OUTPUT, NativeExperts
from moe_export.passes.native_text import LOWERINGS, NATIVE_DOMAIN, NativeForm
from tests.ops.cases import expert_ids

from .moe_graphs import run, tokens
from .native_models import _session, form_of
from .test_fuse_experts import KNOWN, OTHER, context

COUNTS = (1, 7, 40)


def lowered(text: str, *, options: dict[str, Any] | None = None, **form: Any) -> PassContext:
    made = context(text, gated="gate" in text, **form)
    made.options = options or {}
    NativeExperts().apply(made)
    return made


def outputs(made: PassContext, hidden: NDArray[Any], capacity: int) -> tuple[NDArray[Any], list[int]]:
    """The result, and the loads."""
    session = _session(ir.to_proto(made.model).SerializeToString())
    feeds: dict[str, Any] = {"hidden": hidden}
    names = ["out"]
    if any(value.name == CAPACITY_INPUT for value in session.get_inputs()):
        feeds[CAPACITY_INPUT] = np.zeros(capacity, np.int32)
        names.append(LOAD_OUTPUT)
    out, *loads = session.run(names, feeds)
    return out, [int(v) for v in loads[0]] if loads else []


def equal(made: PassContext, plain: PassContext, counts: tuple[int, ...] = COUNTS) -> None:
    for count in counts:
        hidden = tokens(count)
        (want,) = run(plain.model, hidden, ("out",))
        got, loads = outputs(made, hidden, max(count, 1))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert all(load <= count for load in loads)


@pytest.mark.parametrize("lowering", ["auto", *LOWERINGS])
@pytest.mark.parametrize("name", KNOWN)
def test_a_known_form_keeps_its_numbers(name: str, lowering: str) -> None:
    text, _ = KNOWN[name]
    for biased, transposed in ((False, 0), (True, 1)):
        form = {"biased": biased, "transposed": transposed}
        made = lowered(text, options={"native_lowering": lowering}, **form)
        assert made.fused == (0,) and made.decisions[-1].choice.startswith("native: ")
        assert not [n for n in made.model.graph if n.domain in (DOMAIN, NATIVE_DOMAIN)]
        equal(made, context(text, gated="gate" in text, **form))


@pytest.mark.parametrize("name", OTHER)
def test_another_activation_is_lowered_op_by_op(name: str) -> None:
    made = lowered(OTHER[name])
    assert made.fused == () and not [n for n in made.model.graph if n.domain == DOMAIN]
    assert "activation" in made.decisions[-1].reason and made.decisions[-1].choice == "native: op by op"
    equal(made, context(OTHER[name], gated="gate" in OTHER[name]), (0, *COUNTS))


@pytest.mark.parametrize("wanted", ["gather", "dense"])
def test_a_form_that_was_asked_for_is_never_replaced(wanted: str) -> None:
    with pytest.raises(UsageError, match=rf"native_lowering: {wanted} is not for layer .*activation.*auto"):
        lowered(OTHER["a leak"], options={"native_lowering": wanted})


def test_what_lies_behind_the_down_projection_stays() -> None:
    made = lowered(KNOWN["silu"][0], after="last_rows = Neg (outer)", transposed=1)
    assert made.decisions[-1].choice == "native: op by op"
    equal(made, context(KNOWN["silu"][0], gated=True, after="last_rows = Neg (outer)", transposed=1))


def test_op_by_op_tells_a_bucket_that_is_too_small() -> None:
    made = lowered(OTHER["a leak"])
    hidden = tokens(40)
    _, loads = outputs(made, hidden, 40)
    (want,) = run(context(OTHER["a leak"], gated=False).model, hidden, ("out",))
    assert len(loads) == 2 and max(loads) > 8
    small, told = outputs(made, hidden, max(loads) - 1)
    assert told == loads and not np.allclose(small, want, atol=1e-4)
    exact, _ = outputs(made, hidden, max(loads))
    np.testing.assert_allclose(exact, want, rtol=1e-5, atol=1e-5)


def test_the_host_gets_an_input_and_an_output_of_their_own_roles() -> None:
    made = lowered(KNOWN["silu"][0], options={"native_lowering": "both"})
    assert [(s.name, s.shape, s.role) for s in made.io.inputs if s.role == "capacity"] == [
        (CAPACITY_INPUT, ("capacity",), "capacity")
    ]
    assert [(s.name, s.shape, s.dtype) for s in made.io.outputs if s.role == "load"] == [
        (LOAD_OUTPUT, (1,), "int32")
    ]
    for lowering in ("gather", "dense"):
        bare = lowered(KNOWN["silu"][0], options={"native_lowering": lowering})
        assert {s.role for s in (*bare.io.inputs, *bare.io.outputs)} <= {"data"}


def test_layers_that_another_pass_took_are_left_alone() -> None:
    made = context(KNOWN["silu"][0], gated=True)
    made.fused = (0,)
    before = len(made.decisions)
    NativeExperts().apply(made)
    assert len(made.decisions) == before


def test_an_unknown_lowering_is_refused() -> None:
    with pytest.raises(UsageError, match=r"native_lowering: unknown value 'bucket'.*buckets"):
        lowered(KNOWN["silu"][0], options={"native_lowering": "bucket"})


def test_bodies_are_inlined_afterwards() -> None:
    made = lowered(KNOWN["silu"][0])
    InlineBodies().apply(made)
    assert not made.model.functions and not [n for n in made.model.graph if n.domain == DOMAIN]
    equal(made, context(KNOWN["silu"][0], gated=True))


def form(experts: int, top_k: int, hidden: int = 2048, inner: int = 1024) -> NativeForm:
    base = form_of("swiglu", expert_ids(1, top_k, experts), experts, "float16")
    return NativeForm(base.attributes, top_k, hidden, inner, "float16", "float16", False, "float16")


def test_a_rank_is_judged_by_the_experts_of_all() -> None:
    """One or two of eight experts, top-2, lie on a rank: few tokens come to each of them."""
    for here in (1, 2):
        rank = dataclasses.replace(form(here, min(here, 2)), top_k=2, routed_over=8)
        found = choose(rank, "auto", (80,), None)
        assert found.lowering == "both" and "E/K is 4" in found.reason
        many = shapes_of(rank, 4096)
        assert 0.9 * here < many.touched <= here
        buckets, dense = (native_work(many, lowering)[0].flops for lowering in ("buckets", "dense"))
        assert buckets < 0.6 * dense  # the first guess leaves room
    assert choose(form(2, 2), "auto", (80,), None).lowering == "dense", "where all experts are here"
    whole = native_work(shapes_of(form(8, 2), 4096), "buckets")[0].flops
    rank = dataclasses.replace(form(2, 2), routed_over=8)
    assert native_work(shapes_of(rank, 4096), "buckets")[0].flops == whole / 4


def test_the_choice_is_explained_with_every_alternative() -> None:
    found = choose(form(64, 8), "auto", (80,), None)
    assert found.lowering == "both" and "A100" in found.reason and "E/K is 8" in found.reason
    named = {a.choice for a in found.alternatives}
    assert named == {"native: gather", "native: buckets", "native: dense", "GPU plugin ExpertMLP", "TRT_MoE"}
    assert all("predicted, not measured" in a.reason for a in found.alternatives if "native" in a.choice)
    assert "SM100" in next(a.reason for a in found.alternatives if a.choice == "TRT_MoE")
    b200 = choose(form(64, 8), "auto", (100,), None)
    assert "not run on a GPU" in next(a.reason for a in b200.alternatives if a.choice == "TRT_MoE")


def test_what_decides() -> None:
    assert choose(form(8, 8), "auto", (), None).lowering == "dense"
    assert choose(form(64, 8), "auto", (), 4).lowering == "gather"
    assert choose(form(64, 8), "auto", (), 4096).lowering == "both"
    assert choose(form(64, 8), "dense", (), 4096).reason.startswith("asked for")
    assert 1 <= threshold_of(form(8, 2, 4096, 14336), 89) <= 8
    assert threshold_of(form(64, 2), 89) > threshold_of(form(8, 2, 4096, 14336), 89)
