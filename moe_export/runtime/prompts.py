"""Prompts as token ids, and batches of them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_export.errors import InputError
from moe_export.runtime.inputs import check_token_ids
from moe_export.schema import TextInfo

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ints = NDArray[np.int64]
Prompt = str | Sequence[int] | Sequence[Sequence[int]] | Sequence[str]


def encode_prompts(prompt: Prompt, tokenizer: Tokenizer | None, text: TextInfo) -> list[list[int]]:
    """Token ids of one prompt or of a batch of prompts.

    An empty prompt becomes the model's begin-of-sequence token.

    Raises:
        InputError: not a prompt, no tokenizer for text, an id outside the vocabulary, an empty prompt without
            a begin-of-sequence token.
    """
    items = _prompt_list(prompt)
    encoded = []
    for number, item in enumerate(items):
        if isinstance(item, str):
            if tokenizer is None:
                raise InputError("the prompt is text, and this bundle has no tokenizer; give token ids")
            ids = list(tokenizer.encode(item).ids)
        else:
            ids = [_token_id(value, number) for value in item]
        if not ids:
            if text.bos_token_id is None:
                raise InputError(
                    f"prompt {number} is empty, and the model has no begin-of-sequence token to start from"
                )
            ids = [text.bos_token_id]
        check_token_ids(np.array(ids, np.int64), text.vocab_size, f"prompt {number}")
        encoded.append(ids)
    return encoded


def _prompt_list(prompt: Any) -> list[Any]:
    if isinstance(prompt, str):
        return [prompt]
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
        raise InputError(
            f"prompt is a {type(prompt).__name__}; expected text, token ids, or a list of either"
        )
    if not prompt:
        raise InputError("prompt is an empty list; expected at least one prompt or token id")
    if all(isinstance(item, str) for item in prompt):
        return list(prompt)
    nested = [isinstance(item, Sequence) or hasattr(item, "tolist") for item in prompt]
    if not any(nested):
        return [prompt]
    if not all(nested) or any(isinstance(item, str) for item in prompt):
        raise InputError("prompt mixes text, token ids and lists; expected one kind")
    return [item.tolist() if hasattr(item, "tolist") else item for item in prompt]


def _token_id(value: Any, prompt: int) -> int:
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        return operator.index(value)
    except TypeError as error:
        raise InputError(f"prompt {prompt} contains {value!r}; expected whole-number token ids") from error


def pad(prompts: Sequence[Sequence[int]], token: int, *, left: bool) -> tuple[Ints, Ints]:
    """``prompts`` as ids [batch, longest] and mask (1 token, 0 padding), one side padded with ``token``."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), token, np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        ids[row, place] = prompt
        mask[row, place] = 1
    return ids, mask
