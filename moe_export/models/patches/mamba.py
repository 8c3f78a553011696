"""Mamba-1 and Mamba-2 layers: token by token, continuing from the cached state for any number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from . import modeling_module, replaced, replaced_forwards
from .recurrences import mamba2_chunk_scan, mamba_selective_scan

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """Replace the chunked scan; hand Jamba's scan the cached state, which its own form starts without."""
    modeling = modeling_module(model)

    def with_state(mixer: nn.Module, _name: str) -> Any:
        own = type(mixer).forward

        def forward(hidden_states: Any, cache_params: Any = None, **kwargs: Any) -> Any:
            state = None if cache_params is None else cache_params.get_recurrent_state(mixer.layer_idx,
                                                                                       state_idx=0)
            with replaced(modeling, mamba_selective_scan=partial(mamba_selective_scan, initial_state=state)):
                return own(mixer, hidden_states, cache_params=cache_params, **kwargs)

        return forward

    with (
        replaced(modeling, mamba2_chunk_scan=mamba2_chunk_scan),
        replaced_forwards(model, "JambaMambaMixer", with_state),
    ):
        yield
