"""From a prompt to a generation that is ready to run on an engine of any kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moe_export.errors import InputError
from moe_export.runtime.generation import GenerationLoop, Request
from moe_export.runtime.inputs import InputChecker, check_batch
from moe_export.runtime.opened import Opened
from moe_export.runtime.prompts import Prompt, encode_prompts, pad
from moe_export.runtime.stepping import (
    DECODER_IDS,
    EncoderDecoderStepper,
    ReplayStepper,
    Stepper,
)
from moe_export.runtime.text import TextStream
from moe_export.schema import Limits, ModelIO, TextInfo

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ints = NDArray[np.int64]


class Generator:
    """Prepares generations on one text engine."""

    def __init__(
        self,
        opened: Opened,
        io: ModelIO,
        limits: Limits,
        text: TextInfo,
        checker: InputChecker,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._opened = opened
        self._engine = opened.engine
        self._io = io
        self._limits = limits
        self._text = text
        self._checker = checker
        self._tokenizer = tokenizer

    def prepare(
        self, prompt: Prompt, request: Request, check_open: Callable[[], None]
    ) -> tuple[GenerationLoop, list[list[int]]]:
        """The loop for ``prompt`` and the prompts as token ids. ``check_open`` is called before every step.

        Raises:
            InputError: the prompt or the request does not fit the engine.
        """
        request.check_fits(self._text, self._tokenizer)
        prompts = encode_prompts(prompt, self._tokenizer, self._text)
        check_batch(len(prompts), self._limits)
        if DECODER_IDS in {spec.name for spec in self._io.inputs}:
            stepper, start = self._encoder_decoder(prompts)
            before: list[list[int]] = [[] for _ in prompts]
        else:
            stepper, start = self._decoder(prompts)
            before = prompts
        length, most = start[0].shape[1], self._limits.max_sequence
        if most is not None and length >= most:
            raise InputError(
                f"the prompt has {length} tokens; the bundle's maximum is {most}, new tokens included; "
                "rebuild with --max-seq"
            )
        streams = None
        if self._tokenizer is not None:
            streams = [TextStream(self._tokenizer, tokens, request.stop_strings) for tokens in before]
        room = None if most is None else most - length
        eos = self._text.eos_token_ids
        return GenerationLoop(stepper, start, request, eos, streams, room, check_open), prompts

    def _decoder(self, prompts: list[list[int]]) -> tuple[Stepper, tuple[Ints, Ints]]:
        masked = any(spec.role == "mask" for spec in self._io.inputs)
        if not masked and len({len(tokens) for tokens in prompts}) > 1:
            raise InputError("this engine has no attention mask, so prompts of a batch must have one length")
        return self.stepper(len(prompts)), pad(prompts, self._filler(), left=True)

    def stepper(self, batch: int) -> Stepper:
        """A stepper for ``batch`` sequences of a decoder, at their beginning.

        Raises:
            InputError: the batch is beyond the limit, or the engine is no decoder that token ids suffice for.
        """
        check_batch(batch, self._limits)
        if DECODER_IDS in {spec.name for spec in self._io.inputs}:
            raise InputError("an encoder-decoder has no stepper; use generate() or run()")
        if self._io.cache_inputs:
            return self._opened.stepper(batch)
        return ReplayStepper(self._engine, self._io, self._checker)

    def _encoder_decoder(self, prompts: list[list[int]]) -> tuple[Stepper, tuple[Ints, Ints]]:
        if self._text.decoder_start_token_id is None:
            raise InputError("the manifest names no decoder_start_token_id, so generation cannot start")
        ids, mask = pad(prompts, self._filler(), left=False)
        source = {}
        for spec in self._io.inputs:
            if spec.name != DECODER_IDS and spec.role in ("token_ids", "mask"):
                source[spec.name] = ids if spec.role == "token_ids" else mask
        first = np.full((len(prompts), 1), self._text.decoder_start_token_id, np.int64)
        self._checker.check({**source, DECODER_IDS: first})
        return EncoderDecoderStepper(self._engine, self._checker, source), (first, np.ones_like(first))

    def _filler(self) -> int:
        """The token that padding consists of; the mask hides it."""
        candidates = (self._text.pad_token_id, *self._text.eos_token_ids, 0)
        return next(token for token in candidates if token is not None)
