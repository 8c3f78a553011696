"""The inputs of a verification: real text, random ids, edge shapes, padding, and tokens in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .texts import CODE, PROSE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..schema import Manifest

    Encode = Callable[[str], Sequence[int]]

LOGIT_BUDGET = 1 << 24
"""Largest number of logits of one case: bounds time, memory and the size of a golden file."""
TRACE_BUDGET = 1 << 26
"""Largest number of values of MoE layer inputs of one case, over all layers."""
MOST_TOKENS, FEWEST_TOKENS = 512, 32
"""A sequence never is longer than the first, and not shorter than the second for the budget's sake."""


@dataclass(frozen=True)
class Case:
    """One input. ``inputs`` by engine input name, without caches and positions.

    ``tags`` among ``text``, ``random``, ``edge``, ``maximum``, ``padded``, ``chunked``. ``chunks``: lengths
    of the pieces the tokens are fed in, through the KV cache; empty = in one piece. ``seed`` None: nothing
    random in it.
    """

    name: str
    description: str
    tags: tuple[str, ...]
    inputs: dict[str, NDArray[Any]]
    seed: int | None = None
    chunks: tuple[int, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether the tokens are real text, so that cross-entropy means something."""
        return "text" in self.tags


def make_cases(
    manifest: Manifest, *, encode: Encode | None = None, text: str | None = None, seed: int = 0
) -> tuple[list[Case], list[str]]:
    """All cases for an engine, and notes on what was capped or left out.

    ``encode`` turns text into token ids (None: no tokenizer, so no text cases); ``text`` replaces the default
    texts.

    Raises:
        InputError: ``text`` was given but there is no tokenizer, or it has fewer than two tokens.
    """
    if manifest.task == "module":
        from .module_inputs import module_cases

        return module_cases(manifest, seed)
    return _TextCases(manifest, encode, text, seed).make()


class _TextCases:
    """Builds the cases of a text model; one seed per case, counted up from the given one."""

    def __init__(self, manifest: Manifest, encode: Encode | None, text: str | None, seed: int) -> None:
        names = {t.name for t in manifest.io.inputs}
        self.decoder = "decoder_input_ids" in names
        self.cached = bool(manifest.io.cache_inputs)
        self.info = manifest.text
        self.masked = "attention_mask" in names
        self.vocab = manifest.text.vocab_size if manifest.text is not None else 2
        width = sum(layer.hidden_size for layer in manifest.moe_layers)
        budget = min(MOST_TOKENS, LOGIT_BUDGET // max(self.vocab, 1), TRACE_BUDGET // max(width, 1))
        budget = max(FEWEST_TOKENS, budget)
        self.limits = manifest.limits
        self.longest = min(budget, manifest.limits.max_sequence or budget)
        self.encode, self.text, self.seed = encode, text, seed
        self.cases: list[Case] = []
        self.notes: list[str] = []
        if manifest.text is None:
            self.notes.append("the manifest holds no vocabulary size, so only the ids 0 and 1 were tried")
        if not self.masked:
            self.notes.append("the engine takes no attention mask, so padding was not verified")

    def make(self) -> tuple[list[Case], list[str]]:
        texts = self._texts()
        for name, ids in texts:
            self._add(name, f"1 x {len(ids)} tokens of {name}", ("text",), ids[None, :], None)
        self._random("random", "random ids", (), 3, 13)
        self._random("one token", "batch 1, length 1", ("edge",), 1, 1)
        self._maximum()
        for side in ("left", "right") if self.masked else ():
            self._padded(side)
        if self.cached:
            self._chunked(texts)
        return self.cases, self.notes

    def _texts(self) -> list[tuple[str, NDArray[np.int64]]]:
        import numpy as np

        if self.encode is None:
            if self.text is not None:
                raise InputError(
                    "a text was given, but the bundle has no tokenizer to read it with; leave it out"
                )
            self.notes.append("no tokenizer in the bundle: verified on random ids only, not on text")
            return []
        chosen = [("given text", self.text)] if self.text is not None else [("prose", PROSE), ("code", CODE)]
        out = []
        for name, text in chosen:
            ids = np.asarray(self.encode(text), np.int64).reshape(-1)
            if self.text is not None and ids.size < 2:
                raise InputError(f"the given text has {ids.size} token(s); verification needs at least 2")
            if self.text is not None and ids.size > self.longest:
                self.notes.append(f"the given text has {ids.size} tokens; the first {self.longest} were used")
            outside = ids[(ids < 0) | (ids >= self.vocab)]
            if outside.size:
                raise InputError(
                    f"the bundle's tokenizer gives id {int(outside[0])} for {name}, outside the model's "
                    f"{self.vocab} ids; the tokenizer does not belong to this model"
                )
            out.append((name, ids[: self.longest]))
        return out

    def _next_seed(self) -> int:
        return self.seed + len(self.cases)

    def _batch(self, wanted: int) -> int:
        return min(wanted, self.limits.max_batch or wanted)

    def _draw(self, seed: int, batch: int, length: int) -> NDArray[np.int64]:
        import numpy as np

        return np.random.default_rng(seed).integers(0, self.vocab, (batch, length), dtype=np.int64)

    def _random(self, name: str, what: str, tags: tuple[str, ...], batch: int, length: int) -> None:
        batch, length, seed = self._batch(batch), min(length, self.longest), self._next_seed()
        ids = self._draw(seed, batch, length)
        self._add(name, f"{what}, {batch} x {length}", ("random", *tags), ids, seed)

    def _maximum(self) -> None:
        batch_limit, length_limit = self.limits.max_batch, self.limits.max_sequence
        batch = self._batch(max(1, min(4, 2 * MOST_TOKENS // self.longest)))
        if (batch_limit or 0) != batch or (length_limit or 0) != self.longest:
            allowed = f"batch {batch_limit or 'unlimited'}, length {length_limit or 'unlimited'}"
            self.notes.append(
                f"maximum shape: the engine allows {allowed}; verified at {batch} x {self.longest}"
            )
        self._random("maximum", "the largest shape verified", ("maximum",), batch, self.longest)

    def _padded(self, side: str) -> None:
        length = min(17, self.longest)
        if length < 2:
            self.notes.append(f"padding {side}: left out, the engine takes one token only")
            return
        ids, mask, seed = self._padded_ids(side, length)
        lengths = ", ".join(str(int(n)) for n in mask.sum(axis=1))
        self._add(
            f"padded {side}",
            f"{len(ids)} x {length}, {lengths} real tokens, padding {side}",
            ("random", "padded"),
            ids,
            seed,
            mask,
        )

    def _padded_ids(self, side: str, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        import numpy as np

        seed = self._next_seed()
        lengths = [length, max(1, length * 2 // 3), max(1, length // 3)]
        batch = self._batch(3)
        lengths = lengths[:batch] if batch > 1 else lengths[1:2]
        ids = self._draw(seed, batch, length)
        column = np.arange(length)
        real = np.asarray(lengths)[:, None]
        mask = (column >= length - real if side == "left" else column < real).astype(np.int64)
        pad = self.info.pad_token_id if self.info is not None else None
        return np.where(mask == 1, ids, 0 if pad is None else pad), mask, seed

    def _chunked(self, texts: list[tuple[str, NDArray[np.int64]]]) -> None:
        length = min(61, self.longest)
        if length < 5:
            self.notes.append(f"chunked runs: left out, the engine takes {length} token(s) at most")
            return
        seed: int | None = self._next_seed()
        tags: tuple[str, ...] = ("random",)
        ids = self._draw(self._next_seed(), 1, length)
        if texts and len(texts[0][1]) >= 5:
            seed, tags, ids = None, ("text",), texts[0][1][None, :length]
            length = ids.shape[1]
        plans = {"decode": (length - 3, 1, 1, 1), "token by token": (1,) * min(length, 9)}
        if length >= 13:
            plans["chunks"] = (5, 7, length - 12)
        for name, chunks in plans.items():
            what = f"prefill and decode in pieces of {', '.join(str(c) for c in chunks)}"
            self._add(name, what, (*tags, "chunked"), ids[:, : sum(chunks)], seed, chunks=chunks)
        if not self.masked:
            return
        short = min(17, self.longest)
        padded, mask, padded_seed = self._padded_ids("left", short)
        chunks = (short - 3, 1, 1, 1)
        self._add(
            "decode padded",
            f"{len(padded)} x {short} with padding left, in pieces of {', '.join(map(str, chunks))}",
            ("random", "padded", "chunked"),
            padded,
            padded_seed,
            mask,
            chunks,
        )

    def _add(
        self,
        name: str,
        description: str,
        tags: tuple[str, ...],
        ids: NDArray[np.int64],
        seed: int | None,
        mask: NDArray[np.int64] | None = None,
        chunks: tuple[int, ...] = (),
    ) -> None:
        import numpy as np

        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids) if mask is None else mask}
        if self.decoder:
            inputs["decoder_input_ids"] = self._decoder_ids(ids, seed)
        self.cases.append(Case(name, description, tags, inputs, seed, chunks))

    def _decoder_ids(self, ids: NDArray[np.int64], seed: int | None) -> NDArray[np.int64]:
        """Start token, then tokens; never as long as the encoder's input, so nothing can mix them up."""
        import numpy as np

        length = ids.shape[1]
        wanted = length + 2 if length < 8 else length - 3
        wanted = max(1, min(wanted, self.longest))
        if wanted == length:
            wanted = max(1, length - 1)
        start = self.info.decoder_start_token_id if self.info is not None else None
        first = np.full((len(ids), 1), 0 if start is None else start, np.int64)
        rest = ids if seed is None else self._draw(seed + 7919, len(ids), wanted)
        return np.concatenate([first, rest], axis=1)[:, :wanted]


def valid_masks(case: Case) -> list[NDArray[np.bool_]]:
    """Which tokens count: masks [batch, length] of the decoder's and of the encoder's (or only) tokens."""
    import numpy as np

    masks = []
    decoder = case.inputs.get("decoder_input_ids")
    if decoder is not None:
        masks.append(np.ones(decoder.shape, bool))
    ids, mask = case.inputs.get("input_ids"), case.inputs.get("attention_mask")
    if ids is not None and ids.ndim == 2:
        masks.append(np.ones(ids.shape, bool) if mask is None else np.asarray(mask) != 0)
    return masks


def output_mask(shape: tuple[int, ...], masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_] | None:
    """The mask that an output of this shape is compared under, or None: all of it."""
    for mask in masks:
        if len(shape) >= 2 and tuple(shape[:2]) == mask.shape:
            return mask
    return None
