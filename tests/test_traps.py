"""Every known way in which an exported MoE model is silently wrong: it is caught, or does not happen.

More of each kind: sizes that the sample fixes in ``importer/test_trace.py``, layers traced around the hook in
``importer/test_export.py``, windows in ``importer/test_cache.py``, adapters that say something else than
their block in ``models/test_adapters.py``, routers that match on random inputs only in
``passes/test_router_look_alikes.py``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import moe_export
from moe_export.config import BuildConfig
from moe_export.errors import ExportError, UnsupportedModelError, UsageError
from moe_export.importer.export import export_model


class Frozen(nn.Module):
    """Reads a dynamic size as a Python number."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = 1.0 / int(x.shape[1])
        return x * scale


class HandWritten(nn.Module):
    """An MoE block without adapter: tracing it would bake in the experts that the sample hits."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = chosen == number
            if mask.any():
                out[mask] = expert(x[mask])
        return out


def test_a_frozen_dynamic_dimension_is_refused_by_name() -> None:
    with pytest.raises(ExportError, match="sequence"):
        export_model(Frozen(), inputs={"x": torch.randn(2, 5, 4)}, dynamic={"x": {0: "batch", 1: "sequence"}})


def test_a_fixed_dimension_may_be_read() -> None:
    exported = export_model(Frozen(), inputs={"x": torch.randn(2, 5, 4)}, dynamic={"x": {0: "batch"}})
    assert exported.io.inputs[0].shape == ("batch", 5, 4)


def test_experts_baked_in_by_tracing_are_refused_with_the_adapter_to_write() -> None:
    with pytest.raises(UnsupportedModelError) as error:
        export_model(HandWritten(), inputs={"x": torch.randn(6, 8)}, dynamic={"x": {0: "tokens"}})
    text = str(error.value)
    assert "HandWritten" in text and "MoEBlockSpec(" in text and "experts=" in text and "4 experts" in text


def test_opset_23_is_refused_with_its_reason() -> None:
    with pytest.raises(UsageError, match="RotaryEmbedding"):
        BuildConfig(opset=23)
    with pytest.raises(ExportError, match="RotaryEmbedding"):
        export_model(Frozen(), inputs={"x": torch.randn(2, 5, 4)}, dynamic={}, opset=23)


@pytest.mark.slow
def test_a_sliding_window_cache_is_right_beyond_the_window(tmp_path: Path) -> None:
    from moe_export.models.families import tiny_model

    model = tiny_model("gpt_oss")
    window = model.config.sliding_window
    assert window < 16
    moe_export.build(model, tmp_path / "b", verify=False, bench=False)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 3 * window + 1))
    with torch.no_grad():
        want = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    with moe_export.load(tmp_path / "b") as session:
        length = ids.shape[1]
        for chunks in (
            [length],
            [window - 1, *[1] * (length - window + 1)],
            [window, window + 1, length - 2 * window - 1],
        ):
            got = session.chunked_logits(ids, np.ones_like(ids), chunks).outputs["logits"]
            np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, float(np.abs(want).max())))


@pytest.mark.slow
def test_dropped_tokens_are_dropped_and_shown(tmp_path: Path) -> None:
    from moe_export.importer.sources import load_source
    from moe_export.models.families import FAMILIES, tiny_model
    from moe_export.models.reference import ReferenceModel

    encoder = next(c for c in FAMILIES["switch_transformers"].classes if "Encoder" in c)
    model = tiny_model("switch_transformers", model_class=encoder)
    bundle = moe_export.build(model, tmp_path / "b", task="feature-extraction", bench=False)
    assert bundle.manifest.evidence["parity"]["passed"]
    ids = np.random.default_rng(1).integers(2, 100, (2, 24))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with moe_export.load(tmp_path / "b") as session:
        run = session.run_traced(inputs)
    reference = ReferenceModel(load_source(model, task="feature-extraction")).run(inputs)
    dropped = 0
    for ours, theirs in zip(run.layers, reference.layers, strict=True):
        np.testing.assert_array_equal(ours.expert_ids < 0, theirs.expert_ids < 0)
        dropped += int((ours.expert_ids < 0).sum())
        assert not ours.output[(ours.expert_ids < 0).all(-1)].any(), "a dropped token gets nothing"
    assert dropped, "the inputs must exceed the capacity, or nothing was tested"
