"""The KV cache as flat tensors: found, filled, and continued as the model's own cache would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moe_export.errors import UnsupportedModelError
from moe_export.importer.cache import CacheSlot, fill_cache, new_cache, plan_cache
from moe_export.models.families import tiny_model

torch.set_num_threads(1)


def probe(batch: int = 2, length: int = 6) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 127, (batch, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def continued(model: Any, chunks: list[int]) -> torch.Tensor:
    """Logits of all tokens, given in chunks, with the cache handed over as flat tensors."""
    ids = probe(2, sum(chunks))["input_ids"]
    slots = plan_cache(model, probe())
    begin, logits, tensors = 0, [], None
    with torch.no_grad():
        for length in chunks:
            if tensors is None:
                tensors = [
                    torch.zeros([0 if a == s.past_axis else d for a, d in enumerate(s.shape)]) for s in slots
                ]
            cache = fill_cache(model, slots, tensors)
            mask = torch.ones(2, begin + length, dtype=torch.int64)
            out = model(
                input_ids=ids[:, begin : begin + length],
                attention_mask=mask,
                position_ids=torch.arange(begin, begin + length).expand(2, -1),
                past_key_values=cache,
                use_cache=True,
            )
            logits.append(out.logits)
            tensors = [slot.read(cache) for slot in slots]
            begin += length
    return torch.cat(logits, dim=1)


def test_slots_of_an_attention_cache() -> None:
    slots = plan_cache(tiny_model("mixtral"), probe())
    assert [(s.input_name, s.output_name) for s in slots] == [
        (f"past.{i}.{n}", f"present.{i}.{n}") for i in (0, 1) for n in ("key", "value")
    ]
    assert {s.symbolic_shape for s in slots} == {("batch", 2, "past", 8)}
    assert {(s.past_axis, s.state, s.dtype) for s in slots} == {(2, None, torch.float32)}


def test_slots_of_a_hybrid() -> None:
    slots = {s.input_name: s for s in plan_cache(tiny_model("jamba"), probe())}
    fixed = {n for n, s in slots.items() if s.past_axis is None}
    growing = set(slots) - fixed
    assert {n.rpartition(".")[2] for n in fixed} == {"conv", "recurrent"}
    assert {n.rpartition(".")[2] for n in growing} == {"key", "value"}
    for name in fixed:
        assert slots[name].symbolic_shape[0] == "batch" and "past" not in slots[name].symbolic_shape


@pytest.mark.parametrize("chunks", [[9], [4, 5], [1] * 9, [8, 1]])
def test_a_filled_cache_is_continued(chunks: list[int]) -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        want = model(**probe(2, 9)).logits
    assert torch.allclose(continued(model, chunks), want, atol=1e-5)


@pytest.mark.parametrize("chunks", [[30], [7, *[1] * 23], [8, 9, 13]])
def test_a_sliding_window_is_right_beyond_the_window(chunks: list[int]) -> None:
    """A cache cut to the window would be traced with the sample's cut in it."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    model: Any = tiny_model("gpt_oss")
    assert model.config.sliding_window < 10
    assert not any(isinstance(layer, DynamicSlidingWindowLayer) for layer in new_cache(model).layers)
    slots = plan_cache(model, probe(2, 12))
    assert all(s.past_axis == 2 for s in slots), "every token is kept"
    with torch.no_grad():
        want = model(**probe(2, 30)).logits
    assert torch.allclose(continued(model, chunks), want, atol=1e-5)


class _Model(nn.Module):
    """Caches whatever ``keep`` makes of the keys."""

    def __init__(self, keep: Any) -> None:
        super().__init__()
        from transformers import MixtralConfig

        self.config = MixtralConfig(num_hidden_layers=1)
        self.keep = keep

    def forward(self, input_ids: Any, past_key_values: Any, **_kwargs: Any) -> None:
        keys = torch.zeros(*input_ids.shape[:1], 2, input_ids.shape[1], 8)
        layer = past_key_values.layers[0]
        layer.keys, layer.values = self.keep(keys)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (lambda keys: (keys[:, :, ::2], keys), r"cache tensor key of layer 0 is \(2, 2, 3, 8\) after 6"),
        (lambda keys: (torch.cat([keys, keys], 2), keys), "only caches that keep every token"),
        (
            lambda keys: (keys, keys if keys.shape[2] % 2 else torch.zeros(0)),
            "different tensors for different lengths",
        ),
    ],
)
def test_caches_that_do_not_keep_every_token_are_refused(keep: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        plan_cache(_Model(keep), probe())  # type: ignore[arg-type]


def test_names_and_shapes_of_a_slot() -> None:
    slot = CacheSlot(3, "recurrent", "recurrent_states", 0, (2, 4, 8, 8), None, torch.float32)
    assert (slot.input_name, slot.output_name) == ("past.3.recurrent", "present.3.recurrent")
    assert slot.symbolic_shape == ("batch", 4, 8, 8)
