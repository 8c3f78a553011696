"""Tokens to text, piece by piece: no half of a character and no part of a stop string is let out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_export.errors import BundleError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BROKEN = "\ufffd"
_LONGEST = 4
"""Bytes of the longest UTF-8 character."""
_CONTEXT = 8
"""Tokens of the prompt that are decoded along, for tokenizers whose first token loses its leading space."""
_WINDOW = 64
"""Tokens without a whole character at their end that are decoded together at most."""


def load_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer in ``tokenizer.json``, without the truncation and padding that file may ask for.

    Raises:
        BundleError: the file cannot be read as a tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # The library raises bare Exception for every kind of damage.
        raise BundleError(f"{file} is not a tokenizer that the tokenizers library reads: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextStream:
    """The text of one generated sequence.

    Bytes of an unfinished character are held back until it is complete (or cannot become one), and text that
    may be the beginning of a stop string until that is decided. Special tokens give no text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """``prompt``: the token ids that the text continues; ``stop``: strings that end the text and are cut
        off.
        """
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._pending = ""
        self.stopped = False
        """A stop string has appeared."""
        self._context = self._context_of(list(prompt))
        self._base = len(self._decode(self._context).rstrip(_BROKEN))
        self._held: list[int] = []
        self._released = 0

    def push(self, token: int) -> str:
        """Add a token; returns the text that is final now, often one token's, sometimes nothing."""
        return self._cut(self._decoded(token))

    def finish(self) -> str:
        """The text still held back; the stream is over."""
        rest = "" if self.stopped else self._cut(self._window()[self._released :]) + self._pending
        self._pending = ""
        return rest

    def _decoded(self, token: int) -> str:
        self._held.append(token)
        window = self._window()
        broken = len(window) - len(window.rstrip(_BROKEN))
        if broken and len(self._held) >= _LONGEST:
            # More tokens than a character has bytes: only the last bytes can still become one.
            broken = min(broken, _LONGEST - 1)
        end = max(len(window) - broken, self._released)
        piece = window[self._released : end]
        self._released = end
        if not broken:
            # The window starts anew at a whole character. A token without text is no context on its own.
            self._context = self._held if window else self._context + self._held
            self._base = len(self._decode(self._context))
            self._held = []
            self._released = 0
        elif len(self._held) >= _WINDOW:
            # Endless broken bytes: keep the decoded window short. What is not released stays so.
            unreleased = len(window) - self._released
            self._context, self._held = self._held[-_CONTEXT:], []
            self._base = len(self._decode(self._context)) - unreleased
            self._released = 0
        return piece

    def _window(self) -> str:
        return self._decode(self._context + self._held)[self._base :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""

    def _context_of(self, prompt: list[int]) -> list[int]:
        tails = [prompt[-count:] for count in range(_CONTEXT, _CONTEXT + _LONGEST)]
        return next((tail for tail in tails if not self._decode(tail).startswith(_BROKEN)), tails[0])

    def _cut(self, piece: str) -> str:
        self._pending += piece
        found = [place for place in (self._pending.find(text) for text in self._stop) if place >= 0]
        if found:
            self.stopped = True
            cut, self._pending = self._pending[: min(found)], ""
            return cut
        keep = max((_overlap(self._pending, text) for text in self._stop), default=0)
        cut = self._pending[: len(self._pending) - keep]
        self._pending = self._pending[len(cut) :]
        return cut


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` that ``text`` ends with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
