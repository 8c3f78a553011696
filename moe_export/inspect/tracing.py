"""Runs text through an engine or a source model and counts which experts it chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.errors import InputError, SourceError, UsageError
from moe_export.inspect.layers import find_expert_blocks
from moe_export.inspect.usage import Usage, count_usage
from moe_export.progress import NullProgress, Progress
from moe_export.trace import LayerTrace, TracedRun

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from moe_export.schema import TextInfo

Run = Callable[[dict[str, "NDArray[Any]"]], TracedRun]

DEFAULT_WINDOW = 512


def trace_path(
    path: str | Path,
    text: str,
    *,
    window: int = DEFAULT_WINDOW,
    max_tokens: int | None = None,
    trust: bool = False,
    trust_remote_code: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Usage:
    """Expert usage of a bundle, or of a Hugging Face folder run by its own PyTorch code, on ``text``.

    The text is cut into windows of ``window`` tokens, each run on its own from an empty cache; the last one
    may be shorter. ``max_tokens`` leaves out what is behind it.

    Raises:
        InputError: the text is empty, or the model has no MoE layer.
        SourceError: there is no model, or it has no tokenizer.
        UsageError: ``window`` or ``max_tokens`` is below 1.
    """
    for name, value in (("window", window), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; expected 1 or more")
    progress = progress or NullProgress()
    if (Path(path) / "manifest.json").is_file():
        from moe_export.runtime.session import load

        with load(path, trust=trust, threads=threads) as session:
            tokenizer, manifest = session.tokenizer, session.manifest
            if tokenizer is None:
                raise SourceError(f"{path}: the bundle has no tokenizer.json, so text cannot be traced")
            ids = _token_ids(tokenizer, text, max_tokens)
            window = min(window, manifest.limits.max_sequence or window)
            names = tuple(spec.name for spec in session.io.inputs)
            experts = tuple(layer.num_experts for layer in manifest.moe_layers)
            runs = _runs(session.run_traced, ids, window, names, manifest.text, progress)
            return count_usage(runs, experts)
    return _trace_source(path, text, window, max_tokens, trust_remote_code, threads, progress)


def _trace_source(
    path: str | Path,
    text: str,
    window: int,
    max_tokens: int | None,
    trust_remote_code: bool,
    threads: int | None,
    progress: Progress,
) -> Usage:
    from moe_export.importer.sources import load_source
    from moe_export.models.reference import ReferenceModel
    from moe_export.runtime.text import load_tokenizer

    source = load_source(str(path), trust_remote_code=trust_remote_code, progress=progress)
    file = Path(path) / "tokenizer.json"
    if source.kind != "huggingface" or not file.is_file():
        raise SourceError(f"{path}: no tokenizer.json there, so text cannot be traced")
    import torch

    ids = _token_ids(load_tokenizer(file), text, max_tokens)
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    names = ("input_ids", "attention_mask", *(("decoder_input_ids",) if source.encoder_decoder else ()))
    try:
        runs = list(_runs(ReferenceModel(source).run, ids, window, names, source.text, progress))
    finally:
        torch.set_num_threads(before)
    return count_usage(runs, _source_experts(source.module, runs[0]))


def _source_experts(model: torch.nn.Module, layers: tuple[LayerTrace, ...]) -> tuple[int, ...]:
    """Number of experts per traced layer: a trace is named after its experts, or after their block."""
    blocks = {block.name: block.choices for block in find_expert_blocks(model)}
    blocks |= {name.rpartition(".")[0]: count for name, count in blocks.items() if name not in blocks}
    names = [layer.name.partition("#")[0] for layer in layers]  # "#2": the second run of one module
    missing = [name for name in names if name not in blocks]
    if missing:
        raise SourceError(f"{missing[0]}: cannot tell how many experts this layer has")
    return tuple(blocks[name] for name in names)


def _token_ids(tokenizer: Any, text: str, max_tokens: int | None) -> NDArray[Any]:
    import numpy as np

    ids = np.asarray(tokenizer.encode(text).ids, np.int64)[:max_tokens]
    if ids.size == 0:
        raise InputError("the text is empty: there is no token to trace")
    return ids


def _runs(
    run: Run,
    ids: NDArray[Any],
    window: int,
    names: tuple[str, ...],
    text: TextInfo | None,
    progress: Progress,
) -> Iterator[tuple[LayerTrace, ...]]:
    import numpy as np

    with progress.stage("trace", ids.size) as advance:
        for start in range(0, ids.size, window):
            piece = ids[None, start : start + window]
            feeds = {"input_ids": piece, "attention_mask": np.ones_like(piece)}
            if "decoder_input_ids" in names:
                first = (
                    0 if text is None or text.decoder_start_token_id is None else text.decoder_start_token_id
                )
                feeds["decoder_input_ids"] = np.concatenate([[[first]], piece[:, :-1]], axis=1)
            yield run({name: array for name, array in feeds.items() if name in names}).layers
            advance(piece.size)
