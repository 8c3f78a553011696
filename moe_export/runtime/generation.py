"""Text generation: what is asked for, what comes out, and the decode loop between."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moe_export.errors import InputError
from moe_export.runtime.inputs import check_token_ids
from moe_export.runtime.sampling import Sampler, Sampling
from moe_export.runtime.stepping import Stepper
from moe_export.runtime.text import TextStream
from moe_export.schema import TextInfo

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ints = NDArray[np.int64]

EOS, STOP, LENGTH, LIMIT = "eos", "stop", "length", "limit"


@dataclass(frozen=True)
class StreamEvent:
    """One new token of one sequence. ``text`` is what became final with it, possibly empty; ``finish_reason``
    is set on the sequence's last event."""

    sequence: int
    token_id: int
    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class Generation:
    """What was generated, per prompt and in their order.

    ``token_ids``: new tokens only, an ending eos or stop token included. ``texts``: without special tokens
    and without the stop string; None without a tokenizer. ``finish_reasons``: ``eos``, ``stop`` (a stop token
    or string), ``length`` (``max_new_tokens``) or ``limit`` (the bundle's maximum sequence).
    ``prompt_tokens`` and ``new_tokens`` count over the whole batch. ``prefill_seconds`` runs until the logits
    of the first new token are there.
    """

    token_ids: list[list[int]]
    texts: list[str] | None
    finish_reasons: list[str]
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Request:
    """When generation stops and how tokens are chosen."""

    sampling: Sampling
    max_new_tokens: int
    stop: tuple[str | int, ...]

    @classmethod
    def make(
        cls,
        max_new_tokens: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        stop: Sequence[str | int],
        seed: int | None,
    ) -> Request:
        """From the arguments of ``Session.generate``."""
        # One string or id means a list of one: taken as a sequence, a string would stop at each character.
        stops = (stop,) if isinstance(stop, (str, int)) else tuple(stop)
        return cls(Sampling(temperature, top_k, top_p, seed), max_new_tokens, stops)

    def __post_init__(self) -> None:
        if type(self.max_new_tokens) is not int or self.max_new_tokens < 1:
            raise InputError(
                f"max_new_tokens is {self.max_new_tokens!r}; expected a whole number of 1 or more"
            )
        for item in self.stop:
            if type(item) not in (int, str) or item == "":
                raise InputError(f"stop contains {item!r}; expected token ids and non-empty strings")

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset(item for item in self.stop if isinstance(item, int))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(item for item in self.stop if isinstance(item, str))

    def check_fits(self, text: TextInfo, tokenizer: Tokenizer | None) -> None:
        """Raise :class:`InputError` if a stop cannot happen with this vocabulary and tokenizer."""
        if self.stop_strings and tokenizer is None:
            raise InputError(
                f"stop string {self.stop_strings[0]!r} needs a tokenizer, which this bundle lacks"
            )
        check_token_ids(np.array(sorted(self.stop_ids), np.int64), text.vocab_size, "stop")


class GenerationLoop:
    """Feeds a stepper until every sequence has ended. Use :meth:`events` once."""

    def __init__(
        self,
        stepper: Stepper,
        start: tuple[Ints, Ints],
        request: Request,
        eos: Sequence[int],
        streams: Sequence[TextStream] | None,
        room: int | None,
        check_open: Callable[[], None],
    ) -> None:
        """``start``: ids and mask of the first step; ``room``: how many tokens fit behind them, None = no
        limit.
        """
        self._stepper = stepper
        self._start = start
        self._request = request
        self._eos = frozenset(eos)
        self._streams = streams
        self._check_open = check_open
        batch = len(start[0])
        self._sampler = Sampler(request.sampling, batch)
        clipped = room is not None and room < request.max_new_tokens
        self._most = room if clipped and room is not None else request.max_new_tokens
        self._most_reason = LIMIT if clipped else LENGTH
        self.finish_reasons: list[str | None] = [None] * batch
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0

    def events(self) -> Iterator[StreamEvent]:
        """Events of all sequences, step by step, within a step in the order of the prompts."""
        batch = len(self._start[0])
        began = time.perf_counter()
        self._check_open()
        logits = self._stepper.feed_for_last(*self._start)
        prefilled = time.perf_counter()
        self.prefill_seconds = prefilled - began
        # A sequence that has ended is fed its last token again; what it answers is not looked at.
        tokens = np.zeros((batch, 1), np.int64)
        ones = np.ones((batch, 1), np.int64)
        for count in range(1, self._most + 1):
            for sequence in range(batch):
                if self.finish_reasons[sequence] is None:
                    token = self._sampler.choose(logits[sequence], sequence)
                    tokens[sequence, 0] = token
                    yield self._event(sequence, token, count)
            if None not in self.finish_reasons:
                break
            self._check_open()
            logits = self._stepper.feed_for_last(tokens, ones)
        self.decode_seconds = time.perf_counter() - prefilled

    def _event(self, sequence: int, token: int, count: int) -> StreamEvent:
        stream = self._streams[sequence] if self._streams is not None else None
        reason, text = None, ""
        if token in self._eos:
            reason = EOS
        elif token in self._request.stop_ids:
            reason = STOP
        elif stream is not None:
            text = stream.push(token)
            reason = STOP if stream.stopped else None
        if reason is None and count == self._most:
            reason = self._most_reason
        if reason is not None and stream is not None:
            text += stream.finish()
        self.finish_reasons[sequence] = reason
        return StreamEvent(sequence, token, text, reason)
