"""Family patches compute what the code they replace computes, and leave nothing behind."""

from __future__ import annotations

import importlib

import pytest
import torch

from moe_export.graph.onnxscript_rewrites import exact_rewrites, pairs_by_kind
from moe_export.models.families import FAMILIES, tiny_model
from moe_export.models.library_blocks import library_blocks, library_blocks_watched
from moe_export.models.patches import PATCHES, family_patches
from moe_export.models.patches import recurrences as ours
from moe_export.models.patches.complex_rope import turn_pairs

LENGTHS = (1, 70)  # 70: more than one chunk of 64
SCANS = ("delta_rule", "mamba", "minimax")  # patch files whose models take seconds without being traced


def modeling(family: str):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def tensors(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def close(expected: torch.Tensor, got: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return torch.allclose(expected.float(), got.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_state", [False, True])
def test_gated_delta_rule(length: int, with_state: bool) -> None:
    own = modeling("qwen3_next").torch_chunk_gated_delta_rule
    q, k, v, g, b, state = tensors(
        0, *[(2, length, 2, 8)] * 2, (2, length, 4, 6), *[(2, length, 4)] * 2, (2, 4, 8, 6)
    )
    g, b, state = -g.abs(), b.sigmoid(), state if with_state else None
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected, got = own(q, k, v, g=g, beta=b, **options), ours.gated_delta_rule(q, k, v, g=g, beta=b,
                                                                                **options)
    assert close(expected[0], got[0]) and close(expected[1], got[1])
    wrong = ours.gated_delta_rule(q, k, v, g=g * 1.1, beta=b, **options)
    assert not close(expected[0], wrong[0]) or (length == 1 and not with_state)


@pytest.mark.parametrize("length", LENGTHS)
def test_kimi_delta_attention(length: int) -> None:
    own = modeling("kimi_linear").chunk_kimi_delta_attention
    q, k, v, g, b, state = tensors(1, *[(2, length, 3, 8)] * 4, (2, length, 3), (2, 3, 8, 8))
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    g, b = -g.abs(), b.sigmoid()
    expected, got = own(q, k, v, g=g, beta=b, **options), ours.gated_delta_rule(q, k, v, g=g, beta=b,
                                                                                **options)
    assert close(expected[0], got[0]) and close(expected[1], got[1])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_state", [False, True])
def test_mamba2(length: int, with_state: bool) -> None:
    own = modeling("nemotron_h").mamba2_chunk_scan
    x, dt, b, c, state = tensors(2, (2, length, 4, 6), (2, length, 4), *[(2, length, 2, 5)] * 2, (2, 4, 6, 5))
    a, d, bias = -torch.rand(4) - 0.5, torch.randn(4), torch.randn(4)
    options = {"chunk_size": 16, "D": d, "dt_bias": bias, "dt_softplus": True, "return_final_states": True}
    options["initial_states"] = state if with_state else None
    expected, got = own(x, dt, a, b, c, **options), ours.mamba2_chunk_scan(x, dt, a, b, c, **options)
    assert close(expected[0], got[0]) and close(expected[1], got[1])


@pytest.mark.parametrize("length", LENGTHS)
def test_mamba1(length: int) -> None:
    own = modeling("jamba").mamba_selective_scan
    x, dt, b, c, z = tensors(3, *[(2, 6, length)] * 2, *[(2, 5, length)] * 2, (2, 6, length))
    a = -torch.rand(6, 5) - 0.5
    options = {"D": torch.randn(6), "z": z, "delta_bias": torch.randn(6), "delta_softplus": True}
    options["return_last_state"] = True
    expected, got = own(x, dt, a, b, c, **options), ours.mamba_selective_scan(x, dt, a, b, c, **options)
    assert close(expected[0], got[0]) and close(expected[1], got[1])


def test_mamba1_continues_from_its_state() -> None:
    x, dt, b, c = tensors(4, *[(2, 6, 9)] * 2, *[(2, 5, 9)] * 2)
    a = -torch.rand(6, 5) - 0.5
    whole, last = ours.mamba_selective_scan(x, dt, a, b, c, return_last_state=True)
    first, state = ours.mamba_selective_scan(*[t[..., :4] for t in (x, dt)], a, *[t[..., :4] for t in (b, c)],
                                             return_last_state=True)
    second, end = ours.mamba_selective_scan(*[t[..., 4:] for t in (x, dt)], a, *[t[..., 4:] for t in (b, c)],
                                            return_last_state=True, initial_state=state)
    assert close(whole, torch.cat([first, second], dim=-1)) and close(last, end)


def test_turning_pairs_is_complex_multiplication() -> None:
    x, angles = tensors(5, (2, 3, 8), (2, 3, 4))
    expected = torch.view_as_complex(x.reshape(2, 3, 4, 2)) * torch.polar(torch.ones_like(angles), angles)
    assert close(torch.view_as_real(expected).reshape(x.shape), turn_pairs(x, angles.cos(), angles.sin()),
                 1e-6)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[pytest.mark.slow] if file in SCANS else [])
        for family, file in PATCHES.items()
        if FAMILIES[family].status != "refused"
    ],
)
def test_a_patched_model_gives_the_same_and_is_restored(family: str) -> None:
    torch.set_num_threads(1)
    entry = FAMILIES[family]
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(3, 100, (2, 13), generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    own = dict(vars(modeling(family)))
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        before = {name: set(vars(m)) for name, m in model.named_modules()}
        names = set(model.state_dict())
        with family_patches(family, model):
            got = model(**inputs, use_cache=False).logits
        assert torch.equal(model(**inputs, use_cache=False).logits, expected)
    limit = entry.tolerance * max(1.0, float(expected.abs().max()))
    assert float((expected - got).abs().max()) <= limit
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before
    assert set(model.state_dict()) == names
    assert dict(vars(modeling(family))) == own


@pytest.mark.parametrize(
    "family", ["dbrx", "jetmoe", "llama4", "longcat_flash", "step3p7", "switch_transformers"]
)
def test_blocks_outside_the_interface_are_watched(family: str) -> None:
    model = tiny_model(family)
    ids = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(0))
    seen = []
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad(), library_blocks_watched(model, lambda name, routed: seen.append((name, routed))):
        model(input_ids=ids, **extra)
    assert [name for name, _ in seen] == list(library_blocks(model))
    for _, routed in seen:
        tokens = len(routed.hidden)
        assert routed.expert_ids.shape == routed.weights.shape == (tokens, routed.expert_ids.shape[1])
        assert routed.output.shape == routed.hidden.shape
        dropped = (routed.expert_ids < 0).all(dim=1)
        assert torch.allclose(routed.output[dropped], torch.zeros(()), atol=1e-6)
    if family in ("switch_transformers", "longcat_flash"):
        assert any(bool((routed.expert_ids < 0).any()) for _, routed in seen), "no token is dropped"


def test_small_constants_survive_the_optimizer() -> None:
    import onnx_ir as ir

    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.pow(2).mean(-1, keepdim=True) + 1e-8) * 1.000005

    def export() -> list[str]:
        program = torch.onnx.export(Norm(), (torch.randn(2, 4),), dynamo=True, verbose=False)
        return [node.op_type for node in ir.from_proto(ir.to_proto(program.model)).graph]

    assert "Add" not in export(), "the optimizer no longer drops it: exact_rewrites is not needed any more"
    with exact_rewrites():
        kept = export()
    assert kept.count("Add") == 1 and "Mul" in kept
    assert "Add" not in export()


def test_two_slices_become_a_split_without_listing_the_graph_for_each_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import onnx.parser
    import onnx_ir as ir
    import onnxscript.optimizer

    tanhs = " ".join(f"h{i + 1} = Tanh(h{i})" for i in range(100))
    text = f"""<ir_version: 10, opset_import: ["": 20]> g (float[2, 8] h0) => (float[2, 4] y)
        <int64[1] zero = {{0}}, int64[1] four = {{4}}, int64[1] eight = {{8}}, int64[1] last = {{-1}}>
        {{ {tanhs} b = Slice(h100, four, eight, last) a = Slice(h100, zero, four, last) y = Mul(a, b) }}"""
    listed = []
    iterate = ir.Graph.__iter__
    monkeypatch.setattr(ir.Graph, "__iter__", lambda graph: listed.append(1) or iterate(graph))

    def optimized() -> tuple[list[str], int]:
        model = ir.from_proto(onnx.parser.parse_model(text))
        listed.clear()
        onnxscript.optimizer.optimize(model)
        count = len(listed)
        return [node.op_type for node in model.graph], count

    plain, often = optimized()
    with pairs_by_kind():
        quick, seldom = optimized()
    assert plain == quick and "Split" in quick
    assert often > 100 > seldom, "onnxscript no longer lists the graph for each node: drop pairs_by_kind"
    assert optimized()[1] == often
