"""What a run leaves behind per MoE layer, from engines and source models alike, for comparing them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class LayerTrace:
    """One MoE layer in one run. T tokens in the model's own order (row-major over batch, then sequence).

    ``expert_ids`` int32 [T, K] (-1 = dropped), ``weights`` float32 [T, K], ``hidden`` and ``output`` float32
    [T, H], ``logits`` float32 [T, E] where known.
    """

    index: int
    name: str
    expert_ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    hidden: NDArray[np.float32]
    output: NDArray[np.float32]
    logits: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class TracedRun:
    """Outputs by name and one :class:`LayerTrace` per MoE layer in order."""

    outputs: dict[str, NDArray[np.generic]]
    layers: tuple[LayerTrace, ...]


class Reference(Protocol):
    """The source model as the yardstick: float32, its own code, no export wrapper, no KV cache."""

    def run(self, inputs: dict[str, NDArray[np.generic]]) -> TracedRun:
        """One full forward. Text models take ``input_ids`` and ``attention_mask`` [batch, sequence] (and
        ``decoder_input_ids``), positions are derived from the mask; outputs carry the engine's output names
        without caches."""
        ...
