"""The five kernels in a row against whole MoE layers: random ones, and those of source models."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from moe_export_plugins.gpu.chain import LayerResult, run_layer
from numpy.typing import NDArray

from moe_export.costs.tiles import Tile, tiles
from moe_export.errors import InputError, UsageError
from tests.plugins.gpu.kernel_cases import DTYPES, LIMITS, Layer, different_ids, error

TINY = {
    "router": Tile(8), "dispatch": Tile(16, 64), "gate_up": Tile(16, 32, 32, group=2),
    "down": Tile(16, 32, 32, group=2), "combine": Tile(8, 32),
}  # fmt: skip


def run(layer: Layer, chosen: dict[str, Tile] | None = None) -> LayerResult:
    return run_layer(
        layer.logits, layer.hidden, layer.up, layer.down, layer.attributes,
        selection_bias=layer.selection_bias, up_bias=layer.up_bias, down_bias=layer.down_bias,
        chosen=chosen or TINY,
    )  # fmt: skip


def check(layer: Layer, chosen: dict[str, Tile] | None = None) -> None:
    result = run(layer, chosen)
    assert different_ids(result.expert_ids, layer.logits, layer.selection_bias, layer.attributes) == []
    weights, ids = layer.routing()
    if not np.array_equal(ids, result.expert_ids):  # a proven tie: go on with the kernel's own choice
        weights, ids = result.weights.astype(np.float64), result.expert_ids
    assert error(result.out, layer.reference(weights, ids)) < LIMITS[layer.dtype]
    assert result.counts[:-1].sum() == ids.size


@pytest.mark.parametrize(
    ("dtype", "tokens"), [("float32", 0), ("float32", 18), *((dtype, 1) for dtype in DTYPES)]
)
def test_numbers_of_tokens(dtype: str, tokens: int) -> None:
    check(Layer(dtype, tokens=tokens, experts=6, top_k=2, hidden=48, inner=40))


def test_every_expert_chosen_and_experts_not_a_power_of_two() -> None:
    check(Layer("float16", tokens=3, experts=5, top_k=5, hidden=33, inner=17))


def test_all_tokens_to_one_expert() -> None:
    layer = Layer("float32", tokens=20, experts=7, top_k=1, hidden=32, inner=32)
    layer.logits[:, 4] += 100
    check(layer)
    assert run(layer).counts.tolist() == [0, 0, 0, 0, 20, 0, 0, 2]


class Source:
    """A MoE layer of a source model in float64, its weights rounded to ``dtype`` before."""

    def __init__(self, module: torch.nn.Module, dtype: str, hidden_size: int, tokens: int) -> None:
        torch.manual_seed(0)
        kind = getattr(torch, dtype)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.normal_(0, 0.1 if "bias" in name else parameter.shape[-1] ** -0.5)
        self.module = module.to(kind).double().eval()
        self.dtype = dtype
        self.tokens = torch.randn(1, tokens, hidden_size).to(kind).double()

    def array(self, tensor: torch.Tensor) -> NDArray[Any]:
        return tensor.detach().numpy().astype(DTYPES[self.dtype])

    def hidden(self) -> NDArray[Any]:
        return self.array(self.tokens[0])


def mixtral(dtype: str) -> tuple[NDArray[Any], NDArray[np.float64], dict[str, Any]]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=48, intermediate_size=40, num_local_experts=6, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    source = Source(MixtralSparseMoeBlock(config), dtype, 48, 11)
    module: Any = source.module
    with torch.no_grad():
        out = module(source.tokens)[0].numpy()
        logits = module.gate(source.tokens[0])[0].numpy().astype(np.float32)
    given = {
        "logits": logits,
        "hidden": source.hidden(),
        "up": source.array(module.experts.gate_up_proj),
        "down": source.array(module.experts.down_proj),
        "constants": {"top_k": 2, "score": "softmax", "renormalize": 1},
    }
    return logits, out, given


def deepseek(dtype: str) -> tuple[NDArray[Any], NDArray[np.float64], dict[str, Any]]:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=48, moe_intermediate_size=24, n_routed_experts=12, num_experts_per_tok=4, n_group=4,
        topk_group=2, n_shared_experts=1, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = "eager"
    source = Source(DeepseekV3MoE(config), dtype, 48, 9)
    module: Any = source.module
    bias = torch.linspace(-0.05, 0.08, 12).roll(5)
    module.gate.e_score_correction_bias.copy_(bias)
    with torch.no_grad():
        out = (module(source.tokens) - module.shared_experts(source.tokens))[0].numpy()
        logits = module.gate(source.tokens[0])[0].numpy().astype(np.float32)
    given = {
        "logits": logits,
        "hidden": source.hidden(),
        "up": source.array(module.experts.gate_up_proj),
        "down": source.array(module.experts.down_proj),
        "selection_bias": bias.numpy(),
        "constants": {
            "top_k": 4, "score": "sigmoid", "renormalize": 1, "epsilon": 1e-20, "scale": 2.5, "n_group": 4,
            "topk_group": 2, "group_score": "top2_sum", "group_mask": "zero",
        },
    }  # fmt: skip
    return logits, out, given


def gpt_oss(dtype: str) -> tuple[NDArray[Any], NDArray[np.float64], dict[str, Any]]:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = GptOssConfig(hidden_size=48, intermediate_size=40, num_local_experts=6, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    source = Source(GptOssMLP(config), dtype, 48, 9)
    source.tokens *= 4  # far enough that the clamps act
    module: Any = source.module
    with torch.no_grad():
        out = module(source.tokens)[0][0].numpy()
        logits = module.router(source.tokens[0])[0].numpy().astype(np.float32)
    experts = module.experts
    given = {
        "logits": logits,
        "hidden": source.hidden(),
        "up": source.array(experts.gate_up_proj),
        "down": source.array(experts.down_proj),
        "up_bias": source.array(experts.gate_up_proj_bias),
        "down_bias": source.array(experts.down_proj_bias),
        "constants": {
            "top_k": 3, "score": "softmax_after_topk", "activation": "clamped_swiglu", "alpha": experts.alpha,
            "limit": experts.limit, "layout": "interleaved", "transposed": 1,
        },
    }  # fmt: skip
    return logits, out, given


@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        pytest.param(make, dtype, marks=() if fast else pytest.mark.slow)
        for make in (mixtral, deepseek, gpt_oss)
        for dtype in DTYPES
        for fast in [dtype == "bfloat16" or (make is mixtral and dtype == "float32")]
    ],
)
def test_layers_of_source_models(make: Any, dtype: str) -> None:
    logits, out, given = make(dtype)
    bias = given.get("selection_bias")
    result = run_layer(**given, chosen=TINY)
    assert different_ids(result.expert_ids, logits, bias, given["constants"]) == []
    assert error(result.out, out) < LIMITS[dtype]
    if dtype != "bfloat16" or make is not mixtral:
        return
    # The comparison is of use: a layer with two experts exchanged fails it, by the widest of the limits, too.
    given["up"] = given["up"][[1, 0, *range(2, len(given["up"]))]]
    assert error(run_layer(**given, chosen=TINY).out, out) > LIMITS[dtype]


def test_refusals() -> None:
    layer = Layer("float32", tokens=2, experts=4, top_k=2, hidden=16, inner=16)
    layer.attributes["capacity"] = 3
    with pytest.raises(UsageError, match="capacity is not 0"):
        run(layer)
    layer.attributes = {"top_k": 2, "no_such": 1}
    with pytest.raises(UsageError, match="unknown constants no_such"):
        run(layer)
    layer.attributes = {"top_k": 2}
    layer.up = layer.up[:, :-2]
    with pytest.raises(InputError, match="input up is"):
        run(layer)


MANY = [
    (1, 64, 8, 96, 64), (30, 60, 6, 80, 48), (64, 8, 2, 128, 96), (100, 12, 3, 72, 100), (5, 160, 6, 64, 32),
]  # fmt: skip
FORMS: list[dict[str, Any]] = [
    {"activation": "silu"},
    {"activation": "gelu", "transposed": 1, "biased": True},
    {"activation": "relu2", "gated": 0},
    {"activation": "clamped_swiglu", "layout": "interleaved", "transposed": 1, "biased": True},
    {"activation": "gelu_tanh", "gated": 0, "transposed": 1, "biased": True},
    {"activation": "relu", "layout": "interleaved"},
]
ROUTERS: list[dict[str, Any]] = [
    {"score": "softmax", "renormalize": 1},
    {"score": "softmax_after_topk"},
    {"score": "sigmoid", "renormalize": 1, "epsilon": 1e-20, "scale": 2.5, "n_group": 2, "topk_group": 1,
     "group_score": "top2_sum"},
]  # fmt: skip


def _half() -> list[tuple[int, int, str]]:
    """Every second combination, so that each shape, form and dtype meets every other."""
    every = itertools.product(range(len(MANY)), range(len(FORMS)), enumerate(DTYPES))
    return [(shape, form, dtype) for shape, form, (d, dtype) in every if (shape + form + d) % 2]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "form", "dtype"), _half())
def test_wide_matrix(shape: int, form: int, dtype: str) -> None:
    """Shapes x forms x dtypes, each with the tile configurations that are compiled."""
    tokens, experts, top_k, hidden, inner = MANY[shape]
    router = ROUTERS[(shape + form) % len(ROUTERS)]
    if experts // router.get("n_group", 1) * router.get("topk_group", 1) < top_k:
        router = ROUTERS[0]
    rows = (16, 32, 64)[(shape + form) % 3]
    chosen = {k: next(t for t in tiles(k, dtype) if t.rows == rows) for k in ("dispatch", "gate_up", "down")}
    chosen |= {"router": tiles("router", dtype)[shape % 3], "combine": tiles("combine", dtype)[shape % 2]}
    check(
        Layer(
            dtype, tokens=tokens, experts=experts, top_k=top_k, hidden=hidden, inner=inner, router=router,
            selection_bias=form % 2 == 0, seed=10 * shape + form, **FORMS[form],
        ),
        chosen,
    )  # fmt: skip
