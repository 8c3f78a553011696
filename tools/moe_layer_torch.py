"""The contestants that PyTorch runs: transformers' experts, eager and compiled, and dense networks."""

from __future__ import annotations

from typing import Any

import numpy as np
from moe_layer import Array, Inputs, Layer, LeftOut, Run

COPY_LIMIT = 2 * 2**30
"""Bytes of weights that ``batched_mm`` may copy per call: more takes seconds, and memory."""


class Torch:
    """transformers' MixtralExperts over the layer's own arrays (no copy)."""

    names: tuple[str, ...] = ("eager", "grouped_mm", "batched_mm", "torch.compile", "dense")

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._block: Any = None
        self._compiled: Any = None

    def make(self, name: str, inputs: Inputs, threads: int) -> Run:
        import torch

        # Compiled code is made for a number of threads.
        torch.set_num_threads(threads)
        if name == "dense":
            return self._dense(inputs)
        if name == "torch.compile":
            return self._compile(inputs)
        if name == "batched_mm":
            copied = inputs.ids.size * self.layer.shape.expert_bytes(self.layer.itemsize)
            if copied > COPY_LIMIT:
                text = f"it copies {copied / 2**30:.1f} GiB of weights per call"
                raise LeftOut(f"{text}; allowed: {COPY_LIMIT / 2**30:.0f}")
        return self._transformers(name, inputs)

    def _inputs(self, inputs: Inputs) -> tuple[Any, Any]:
        import torch

        dtype = torch.bfloat16 if self.layer.dtype == "bfloat16" else torch.float32
        return torch.from_numpy(inputs.hidden).to(dtype), torch.from_numpy(inputs.logits)

    def _experts(self) -> Any:
        if self._block is None:
            import torch
            from transformers.models.mixtral.configuration_mixtral import MixtralConfig
            from transformers.models.mixtral.modeling_mixtral import MixtralExperts

            s = self.layer.shape
            config = MixtralConfig(
                hidden_size=s.hidden,
                intermediate_size=s.intermediate,
                num_local_experts=s.experts,
                num_experts_per_tok=s.top_k,
            )
            with torch.device("meta"):
                block = MixtralExperts(config)
            block.gate_up_proj = torch.nn.Parameter(self._tensor(self.layer.up), requires_grad=False)
            block.down_proj = torch.nn.Parameter(self._tensor(self.layer.down), requires_grad=False)
            self._block = block
        return self._block

    def _tensor(self, array: Array) -> Any:
        import torch

        if self.layer.dtype == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    def _transformers(self, implementation: str, inputs: Inputs) -> Run:
        import torch

        experts = self._experts()
        hidden, logits = self._inputs(inputs)
        top_k = self.layer.shape.top_k

        def run() -> Any:
            experts.config._experts_implementation = implementation
            with torch.inference_mode():
                return _layer(experts, hidden, logits, top_k)

        return run

    def _compile(self, inputs: Inputs) -> Run:
        import torch

        # Beyond its limit of recompilations torch.compile would go on in eager mode without a word.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        torch._dynamo.config.recompile_limit = 64
        experts = self._experts()
        hidden, logits = self._inputs(inputs)
        top_k = self.layer.shape.top_k
        if self._compiled is None:
            self._compiled = torch.compile(_layer, dynamic=False)
        compiled = self._compiled

        def run() -> Any:
            experts.config._experts_implementation = "grouped_mm"
            with torch.inference_mode():
                return compiled(experts, hidden, logits, top_k)

        return run

    def _dense(self, inputs: Inputs) -> Run:
        """One-hot routing without any routing: K dense feed-forward networks over all tokens."""
        import torch
        from torch.nn import functional

        chosen = np.unique(inputs.ids)
        if len(chosen) != self.layer.shape.top_k:
            raise LeftOut("it needs one-hot routing")
        hidden, logits = self._inputs(inputs)
        up, down = self._tensor(self.layer.up), self._tensor(self.layer.down)

        def run() -> Any:
            with torch.inference_mode():
                weights = torch.softmax(logits[:, chosen], dim=-1).to(hidden.dtype)
                out = torch.zeros_like(hidden)
                for k, expert in enumerate(chosen):
                    gate, linear = functional.linear(hidden, up[expert]).chunk(2, dim=-1)
                    y = functional.linear(functional.silu(gate) * linear, down[expert])
                    out += weights[:, k : k + 1] * y
                return out

        return run


def _layer(experts: Any, hidden: Any, logits: Any, top_k: int) -> Any:
    """transformers' MixtralSparseMoeBlock from the logits on."""
    import torch

    probabilities = torch.softmax(logits.float(), dim=-1)
    weights, ids = torch.topk(probabilities, top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts(hidden, ids, weights)
