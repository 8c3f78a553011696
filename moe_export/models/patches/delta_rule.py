"""Gated delta rule (Qwen) and Kimi delta attention: token by token instead of in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from . import modeling_module, replaced
from .recurrences import gated_delta_rule

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def patch(model: nn.Module) -> Iterator[None]:
    """Replace the chunked and the recurrent form by the scan."""
    with replaced(
        modeling_module(model),
        torch_chunk_gated_delta_rule=gated_delta_rule,
        torch_recurrent_gated_delta_rule=gated_delta_rule,
        chunk_kimi_delta_attention=gated_delta_rule,
        recurrent_kimi_delta_attention=gated_delta_rule,
    ):
        yield
