"""The own modules: they run, they route to every expert, and the noisy layer is the paper's formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

Example = Callable[[str], ModuleType]
NAMES = ("own_module", "noisy_top_k")


def moe_blocks(model: torch.nn.Module) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "route")]


def output_of(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result["features"]


@pytest.mark.parametrize("name", NAMES)
def test_build_is_seeded_and_leaves_the_global_generator_alone(example: Example, name: str) -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, inputs, dynamic = example(name).build()
    assert torch.equal(torch.rand(3), expected)
    second, again, _ = example(name).build()
    assert not first.training
    assert set(dynamic) == set(inputs)
    assert all(torch.equal(inputs[k], again[k]) for k in inputs)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert {p.dtype for p in first.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 9), (4, 3), (2, 65)])
def test_forward_takes_every_shape_its_dynamic_axes_promise(
    example: Example, name: str, batch: int, length: int
) -> None:
    model, inputs, dynamic = example(name).build()
    sizes = {"batch": batch, "sequence": length, "time": length}
    shaped = {}
    for key, tensor in inputs.items():
        shape = [
            sizes[dynamic[key][axis]] if axis in dynamic[key] else n for axis, n in enumerate(tensor.shape)
        ]
        shaped[key] = (
            torch.randn(shape) if tensor.is_floating_point() else torch.ones(shape, dtype=tensor.dtype)
        )
    with torch.no_grad():
        out = output_of(model, shaped)
    assert out.shape[:2] == (batch, length)
    assert out.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_every_expert_is_chosen_and_matters(example: Example, name: str) -> None:
    model, _, _ = example(name).build()
    for block in moe_blocks(model):
        width = next(block.experts[0].parameters()).shape[1]
        hidden = torch.randn(512, width, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            weights, ids = block.route(hidden)
            whole = block(hidden)
            assert weights.shape == ids.shape == (512, block.top_k)
            assert torch.allclose(weights.sum(1), torch.ones(512), atol=1e-6)
            assert len(ids.unique()) == len(block.experts)
            for index, expert in enumerate(block.experts):
                saved = {k: v.clone() for k, v in expert.state_dict().items()}
                for parameter in expert.parameters():
                    parameter.zero_()
                changed = (block(hidden) - whole).abs().amax(1) > 0
                expert.load_state_dict(saved)
                assert torch.equal(changed, (ids == index).any(1))


def test_padding_does_not_reach_the_frames(example: Example) -> None:
    model, inputs, _ = example("own_module").build()
    other = {"frames": inputs["frames"].clone(), "mask": inputs["mask"]}
    other["frames"][1, 7:] += 5.0
    with torch.no_grad():
        a, b = output_of(model, inputs), output_of(model, other)
    assert torch.allclose(a[0], b[0], atol=1e-6)
    assert torch.allclose(a[1, :7], b[1, :7], atol=1e-5)
    assert not torch.allclose(a[1, 7:], b[1, 7:], atol=1e-2)


def gate_from_the_paper(x: list[float], w_gate: list[list[float]], k: int) -> list[float]:
    """G(x) of equations 3 to 5 without noise, in Python floats."""
    experts = len(w_gate[0])
    h = [sum(x[r] * w_gate[r][i] for r in range(len(x))) for i in range(experts)]
    kth_largest = sorted(h, reverse=True)[k - 1]
    kept = [v if v >= kth_largest else -math.inf for v in h]
    exponentials = [math.exp(v) for v in kept]
    return [e / sum(exponentials) for e in exponentials]


def layer_from_the_paper(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Equation 1, token by token and expert by expert, over *all* experts; float64 [T, H]."""
    wide = {k: v.double() for k, v in layer.state_dict().items()}
    rows = []
    for token in x.double():
        gate = gate_from_the_paper(token.tolist(), wide["w_gate"].tolist(), layer.top_k)
        y = torch.zeros_like(token)
        for i, g in enumerate(gate):
            inner = wide[f"experts.{i}.first.weight"] @ token + wide[f"experts.{i}.first.bias"]
            outer = wide[f"experts.{i}.second.weight"] @ inner.clamp(min=0) + wide[f"experts.{i}.second.bias"]
            y += g * outer
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_noisy_top_k_is_the_papers_formula(example: Example, top_k: int) -> None:
    torch.manual_seed(5)
    layer = example("noisy_top_k").NoisyTopKMoE(hidden=24, inner=32, num_experts=8, top_k=top_k).eval()
    x = torch.randn(40, 24)
    with torch.no_grad():
        y = layer(x)
        expected = layer_from_the_paper(layer, x)
        assert (y - expected).abs().max() < 1e-5
        layer.w_gate += 0.2 * torch.randn_like(layer.w_gate)  # another router must not pass for this one
        assert (layer(x) - expected).abs().max() > 1e-3


def test_noise_is_off_in_eval_and_follows_equation_4_in_training(example: Example) -> None:
    torch.manual_seed(6)
    layer = example("noisy_top_k").NoisyTopKMoE(hidden=24, inner=32, num_experts=8, top_k=4)
    x = torch.randn(5, 24)
    with torch.no_grad():
        clean = x @ layer.w_gate
        layer.eval()
        assert torch.equal(layer.gate_logits(x), clean)
        assert torch.equal(layer(x), layer(x))
        layer.train()
        assert not torch.equal(layer(x), layer(x))
        samples = torch.stack([layer.gate_logits(x) - clean for _ in range(4_000)])
        deviation = torch.nn.functional.softplus(x @ layer.w_noise)
        assert samples.mean(0).abs().max() < 0.08 * deviation.max()
        assert torch.allclose(samples.std(0), deviation, rtol=0.08)
