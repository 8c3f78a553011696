"""Adapters: what a spec may say, that a block runs the same with it, and what is said when it does not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from moe_export import MoEBlockSpec, moe_block, register_moe_block
from moe_export.errors import UnsupportedModelError, UsageError
from moe_export.importer.export import ExportedModel, export_model
from moe_export.models.adapted import adapted, check_adapters
from moe_export.models.adapters import ADAPTERS, NOT_MOE, spec_of, stack_experts
from moe_export.models.moe_patterns import looks_like_moe, require_adapters
from moe_export.models.reference import ReferenceModel, watching

from .blocks import (
    EXPERTS,
    GATED,
    HIDDEN,
    INNER,
    PLAIN,
    SHARED,
    TOP_K,
    Gated,
    GatedMoE,
    Plain,
    PlainMoE,
    SharedMoE,
    Stack,
    frames,
    registered,
    route,
    seeded,
)

torch.set_num_threads(1)
ALL = ((GatedMoE, GATED), (PlainMoE, PLAIN), (SharedMoE, SHARED))


@pytest.fixture
def adapters() -> Iterator[None]:
    with registered(*ALL):
        yield


def spec(**changes: Any) -> MoEBlockSpec:
    return dataclasses.replace(GATED, **changes)


def difference(model: nn.Module, x: Tensor) -> float:
    """Between the module's own code and its adapted form."""
    with torch.no_grad():
        want = model(x)
        with adapted(model):
            got = model(x)
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.usefixtures("adapters")
@pytest.mark.parametrize(
    "model",
    [seeded(GatedMoE), seeded(GatedMoE, True), seeded(PlainMoE), seeded(SharedMoE)],
    ids=[
        "gated",
        "gated with biases",
        "ungated, ModuleDict, biases, drops",
        "shared expert, not flat, tuple",
    ],
)
def test_a_block_computes_the_same_with_its_adapter(model: nn.Module) -> None:
    assert difference(model, frames()) < 1e-6
    assert difference(model, frames(1, 1)) < 1e-6


@pytest.mark.usefixtures("adapters")
def test_drops_do_happen_in_that_test() -> None:
    model = seeded(PlainMoE)
    _, ids = PLAIN.routing(model, frames())
    assert 0 < int((ids < 0).sum()) < ids.numel()


def test_an_activation_of_ones_own() -> None:
    class Squared(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.gate(x).square() * self.up(x))

    class SquaredMoE(GatedMoE):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Squared() for _ in range(EXPERTS))

    with registered((SquaredMoE, spec(activation=torch.square))):
        assert difference(seeded(SquaredMoE), frames()) < 1e-6


@pytest.mark.usefixtures("adapters")
def test_everything_is_restored() -> None:
    model = seeded(Stack)
    names, state = [n for n, _ in model.named_buffers()], copy.deepcopy(model.state_dict())
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    with adapted(model):
        assert "forward" in model.gated.__dict__
        assert sorted(model.state_dict()) == sorted(state), "what the ops read is not saved with the model"
    assert [n for n, _ in model.named_buffers()] == names
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()


@pytest.mark.usefixtures("adapters")
def test_everything_is_restored_after_a_failure() -> None:
    model = seeded(Stack)
    model.shared.experts[2].up = nn.Identity()
    with pytest.raises(UsageError, match="'up' is Identity"), adapted(model):
        pass
    with pytest.raises(ZeroDivisionError):
        model.shared.experts[2].up = nn.Linear(HIDDEN, INNER)
        with adapted(model):
            raise ZeroDivisionError
    for block in (model.gated, model.plain, model.shared):
        assert "forward" not in block.__dict__
        assert not [n for n, _ in block.named_buffers()]


@pytest.mark.usefixtures("adapters")
def test_a_forward_set_on_the_instance_comes_back() -> None:
    model = seeded(GatedMoE)
    own = model.forward

    def forward(x: Tensor) -> Tensor:
        return own(x)

    model.forward = forward
    with adapted(model):
        assert model.forward is not forward
    assert model.forward is forward


def test_decorator_function_and_subclass() -> None:
    before = dict(ADAPTERS)
    try:

        @moe_block(GATED)
        class Decorated(GatedMoE):
            pass

        class Sub(Decorated):
            pass

        class Other(GatedMoE):
            pass

        assert spec_of(seeded(Decorated)) is GATED
        assert spec_of(seeded(Sub)) is GATED
        assert spec_of(seeded(Other)) is None
        other = spec(top_k=1)
        register_moe_block(Sub, other)
        assert spec_of(seeded(Sub)) is other and spec_of(seeded(Decorated)) is GATED
    finally:
        ADAPTERS.clear()
        ADAPTERS.update(before)


@pytest.mark.usefixtures("adapters")
def test_a_subclass_with_its_own_forward_needs_its_own_spec() -> None:
    class Doubled(GatedMoE):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(seeded(Doubled))
    with pytest.raises(UnsupportedModelError, match="Doubled has its own forward.*base class GatedMoE"):
        require_adapters(model)
    with registered((Doubled, spec(after=lambda _block, _hidden, combined: 2 * combined))):
        require_adapters(model)
        assert difference(model, frames()) < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": ""}, r"MoEBlockSpec\.experts: expected the name of an attribute, got ''"),
        ({"up_proj": None}, r"MoEBlockSpec\.up_proj: expected the name"),
        ({"gate_proj": 3}, r"MoEBlockSpec\.gate_proj: expected the name of an attribute, got 3"),
        (
            {"route": "router"},
            r"MoEBlockSpec\.route: expected a function \(block, hidden\) -> \(weights, expert_ids\)",
        ),
        ({"after": 1}, r"MoEBlockSpec\.after: expected a function"),
        ({"output": "x"}, r"MoEBlockSpec\.output: expected a function"),
        ({"activation": "swish"}, r"activation: unknown 'swish'.*choices: gelu, gelu_tanh, identity"),
        ({"activation": None}, r"activation: unknown None"),
        ({"top_k": 0}, r"top_k: expected at least 1, got 0"),
        ({"top_k": True}, r"top_k: expected a number or the name"),
        ({"top_k": ""}, r"top_k: expected a number or the name"),
        ({"top_k": 2.0}, r"top_k: expected a number or the name"),
    ],
)
def test_a_spec_checks_itself(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        spec(**changes)


def test_only_module_classes_are_registered() -> None:
    with pytest.raises(UsageError, match="expected a subclass of torch.nn.Module"):
        register_moe_block(dict, GATED)
    with pytest.raises(UsageError, match="expected a subclass of torch.nn.Module"):
        register_moe_block(seeded(GatedMoE), GATED)
    with pytest.raises(
        UsageError, match=r"register_moe_block\(GatedMoE\): expected a MoEBlockSpec, got dict"
    ):
        register_moe_block(GatedMoE, {"experts": "experts"})  # type: ignore[arg-type]


def _uneven(block: Any) -> None:
    block.experts[1].up = nn.Linear(HIDDEN, INNER + 1, bias=False)


def _one_bias(block: Any) -> None:
    block.experts[1].down = nn.Linear(INNER, HIDDEN, bias=True)


def _half_biased(block: Any) -> None:
    for expert in block.experts:
        expert.gate = nn.Linear(HIDDEN, INNER, bias=True)


def _mixed(block: Any) -> None:
    block.experts[0] = Plain()


@pytest.mark.parametrize(
    ("changes", "change", "message"),
    [
        (
            {"experts": "router"},
            None,
            r"GatedMoE\.router: expected nn\.ModuleList or nn\.ModuleDict, got Linear",
        ),
        ({"experts": "members"}, None, r"GatedMoE: no attribute 'members' \(stopped at 'members'\)"),
        ({"up_proj": "w3"}, None, r"Gated: no attribute 'w3'"),
        ({"up_proj": "up.weight"}, None, "expert attribute 'up.weight' is Parameter, expected nn.Linear"),
        ({}, _mixed, r"GatedMoE\.experts: expected experts of one class"),
        ({}, _uneven, "'up' differs from expert to expert in shape or bias"),
        ({}, _one_bias, "'down' differs from expert to expert in shape or bias"),
        ({}, _half_biased, "gate and up projection must both have a bias or neither"),
    ],
)
def test_a_spec_that_does_not_fit_the_block(changes: dict[str, Any], change: Any, message: str) -> None:
    block = seeded(GatedMoE)
    if change is not None:
        change(block)
    with pytest.raises(UsageError, match=message):
        stack_experts(block, spec(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"route": lambda b, h: h}, "expected two tensors .weights, expert_ids., got Tensor"),
        ({"route": lambda b, h: (h, h, h)}, "got tuple of 3"),
        (
            {"route": lambda b, h: route(b, h)[::-1]},
            "expected weights of float type, then expert ids of int type",
        ),
        ({"route": lambda b, h: b.router(h).topk(3)}, r"weights has shape \[15, 3\], expected \[tokens, 2\]"),
        ({"route": lambda b, h: (route(b, h)[0].flatten(), route(b, h)[1])}, r"weights has shape \[30\]"),
        ({"top_k": "k"}, "GatedMoE: no attribute 'k'"),
        ({"top_k": "router"}, r"GatedMoE\.router: expected a whole number of 1 or more"),
        ({"top_k": 3}, r"expected \[tokens, 3\] \(top_k is 3\)"),
    ],
)
def test_a_route_that_gives_something_else(changes: dict[str, Any], message: str) -> None:
    model = seeded(GatedMoE)
    with registered((GatedMoE, spec(**changes))), adapted(model), pytest.raises(UsageError, match=message):
        model(frames())


WRONG: dict[str, tuple[type[nn.Module], MoEBlockSpec]] = {
    "activation": (GatedMoE, spec(activation="gelu")),
    "gate taken for up": (GatedMoE, spec(gate_proj="up", up_proj="gate")),
    "weights doubled": (GatedMoE, spec(route=lambda b, h: (2 * route(b, h)[0], route(b, h)[1]))),
    "other experts": (GatedMoE, spec(route=lambda b, h: (route(b, h)[0], (route(b, h)[1] + 1) % EXPERTS))),
    "weights in another order": (GatedMoE, spec(route=lambda b, h: (route(b, h)[0].flip(1), route(b, h)[1]))),
    "gate left out": (GatedMoE, spec(gate_proj=None)),
    "shared expert left out": (SharedMoE, dataclasses.replace(SHARED, after=None)),
    "output left out": (SharedMoE, dataclasses.replace(SHARED, output=None)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_spec_that_says_something_else_than_the_block_is_refused(name: str) -> None:
    cls, wrong = WRONG[name]
    model = nn.Sequential(seeded(cls))
    with registered((cls, wrong)), pytest.raises(UsageError) as refused:
        check_adapters(model, lambda: model(frames()))
    text = str(refused.value)
    assert text.startswith(f"0 ({cls.__name__}): the block and its adapter compute different things: ")
    assert "Compare the MoEBlockSpec with the block's forward" in text
    assert "forward" not in model[0].__dict__


@pytest.mark.usefixtures("adapters")
def test_right_specs_pass_that_check_and_nothing_is_left_behind() -> None:
    model = seeded(Stack)
    check_adapters(model, lambda: model(frames()))
    assert all(not m._forward_hooks for m in model.modules())


def test_a_block_that_draws_numbers_is_refused() -> None:
    class Noisy(GatedMoE):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(1)

    model = seeded(Noisy)
    with registered((Noisy, GATED)), pytest.raises(UsageError, match="two runs on the same input differ"):
        check_adapters(model, lambda: model(frames()))


def test_a_block_without_adapter_shows_the_one_to_write() -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(seeded(GatedMoE))})
    with pytest.raises(UnsupportedModelError) as refused:
        require_adapters(model)
    text = str(refused.value)
    assert text.startswith(
        f"encoder.0 (GatedMoE) looks like a Mixture of Experts ({EXPERTS} experts in 'experts')"
    )
    for part in ("register_moe_block(GatedMoE, MoEBlockSpec(", "gate, up, down", "docs/own-modules.md"):
        assert part in text


class Experts(nn.Module):
    """The list of experts in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Gated() for _ in range(EXPERTS))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, EXPERTS)
        self.pool = Experts()


class Classifier(nn.Module):
    """As many layers as classes: no MoE."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Gated() for _ in range(EXPERTS))
        self.head = nn.Linear(HIDDEN, EXPERTS)


@pytest.mark.parametrize(
    ("cls", "found"), [(GatedMoE, True), (PlainMoE, True), (Nested, True), (Classifier, False)]
)
def test_what_looks_like_a_mixture_of_experts(cls: type[nn.Module], found: bool) -> None:
    model = nn.Sequential(cls())
    if found:
        with pytest.raises(UnsupportedModelError, match=cls.__name__):
            require_adapters(model)
    else:
        require_adapters(model)


def test_the_path_of_nested_experts_is_shown() -> None:
    assert looks_like_moe(Nested(), 2) == ("pool.experts", EXPERTS)
    with pytest.raises(UnsupportedModelError, match=r"experts='pool\.experts'"):
        require_adapters(Nested())


def test_a_block_may_be_declared_no_mixture() -> None:
    class Heads(GatedMoE):
        pass

    try:
        NOT_MOE.add(Heads)
        require_adapters(nn.Sequential(Heads()))
    finally:
        NOT_MOE.discard(Heads)


@pytest.mark.usefixtures("adapters")
def test_the_reference_records_every_block_in_order() -> None:
    model = seeded(Stack)
    with torch.no_grad(), watching(model) as recorder:
        model(frames())
    assert [t.name for t in recorder.layers] == ["gated", "plain", "shared", "gated#2"]
    assert [t.index for t in recorder.layers] == [0, 1, 2, 3]
    first, plain = recorder.layers[0], recorder.layers[1]
    tokens = frames().reshape(-1, HIDDEN)
    with torch.no_grad():
        weights, ids = route(model.gated, tokens)
        output = model.gated(tokens)
    assert np.array_equal(first.hidden, tokens.numpy())
    assert np.array_equal(first.expert_ids, ids.int().numpy()) and first.expert_ids.dtype == np.int32
    assert np.array_equal(first.weights, weights.numpy())
    assert np.allclose(first.output, output.numpy(), atol=1e-6)
    assert (plain.expert_ids < 0).any() and (plain.weights[plain.expert_ids < 0] == 0).all()
    assert not any(m._forward_hooks for m in model.modules())


@pytest.fixture(scope="module")
def exported() -> Iterator[ExportedModel]:
    with registered(*ALL):
        yield export_model(
            seeded(Stack), inputs={"frames": frames()}, dynamic={"frames": {0: "batch", 1: "sequence"}}
        )


def test_all_of_it_exported(exported: ExportedModel) -> None:
    assert [layer.name for layer in exported.moe_layers] == ["gated", "plain", "shared", "gated#2"]
    assert [layer.top_k for layer in exported.moe_layers] == [TOP_K] * 4
    assert [layer.intermediate_size for layer in exported.moe_layers] == [INNER] * 4
    names = [s.name for s in exported.io.outputs]
    assert names == ["features", "count"]
    proto = ir.to_proto(exported.model)
    import onnx

    for layer in exported.moe_layers:
        for name in (layer.expert_ids, layer.weights, layer.output):
            proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch, sequence in ((1, 1), (4, 2), (2, 13)):
        feeds = {"frames": frames(batch, sequence, seed=7).numpy()}
        with registered(*ALL):
            want = ReferenceModel(exported.source).run(feeds)
        features, count, *values = session.run(None, feeds)
        assert np.allclose(features, want.outputs["features"], atol=1e-5)
        assert np.array_equal(count, want.outputs["count"])
        for index, trace in enumerate(want.layers):
            ids, weights, output = values[3 * index : 3 * index + 3]
            assert np.array_equal(ids, trace.expert_ids), trace.name
            assert np.allclose(weights, trace.weights, atol=1e-6)
            assert np.allclose(output, trace.output, atol=1e-5)


def test_the_exported_weights_of_a_block_run_twice_are_there_once(exported: ExportedModel) -> None:
    stacked = [
        name
        for name, value in exported.model.graph.initializers.items()
        if value.shape is not None and len(value.shape) == 3
    ]
    assert len([name for name in stacked if "gated" in name]) == 2
