"""The inputs of a workload: real text through the bundle's tokenizer where there is one, else seeded random
ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..schema import Manifest, TensorSpec
from .grid import Workload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class InputMaker:
    """Makes the same inputs for every contestant.

    ``described`` says in words where tokens come from.
    """

    def __init__(self, manifest: Manifest, tokenizer: Path | None, seed: int) -> None:
        """``tokenizer``: the bundle's tokenizer folder, or None."""
        self._manifest = manifest
        self._seed = seed
        self._text = _encode_text(tokenizer) if tokenizer is not None else None
        vocab = self.vocab_size
        if self._text is not None and (self._text.size < 2 or int(self._text.max()) >= vocab):
            self._text = None
        self.described = "text" if self._text is not None else "random values"

    @property
    def vocab_size(self) -> int:
        """Number of token ids; 2 for a model without text."""
        return self._manifest.text.vocab_size if self._manifest.text is not None else 2

    def tokens(self, batch: int, length: int) -> NDArray[np.int64]:
        """Token ids [batch, length]; rows start at different places of the text."""
        import numpy as np

        if self._text is None:
            random = np.random.default_rng([self._seed, batch, length])
            return random.integers(0, self.vocab_size, (batch, length), dtype=np.int64)
        starts = np.arange(batch) * (self._text.size // batch or 1)
        places = (starts[:, None] + np.arange(length)[None, :]) % self._text.size
        return np.ascontiguousarray(self._text[places])

    def inputs(self, workload: Workload, decode_tokens: int) -> dict[str, NDArray[Any]]:
        """Arrays by name. For a text model with a cache: ``input_ids`` [batch, sequence], and for decode the
        tokens that follow in ``next_ids`` [batch, decode_tokens]. Otherwise every input of the engine."""
        if self._manifest.io.cache_inputs:
            extra = decode_tokens if workload.phase == "decode" else 0
            ids = self.tokens(workload.batch, workload.sequence + extra)
            out = {"input_ids": ids[:, : workload.sequence].copy()}
            if extra:
                out["next_ids"] = ids[:, workload.sequence :].copy()
            return out
        return {spec.name: self._fill(spec, workload) for spec in self._manifest.io.inputs}

    def _fill(self, spec: TensorSpec, workload: Workload) -> NDArray[Any]:
        import numpy as np

        sizes = {"batch": workload.batch}
        shape = tuple(sizes.get(d, workload.sequence) if isinstance(d, str) else d for d in spec.shape)
        if spec.role == "token_ids" and len(shape) == 2:
            return self.tokens(*shape).astype(spec.dtype)
        if spec.role == "mask":
            return np.ones(shape, spec.dtype)
        if spec.role == "positions":
            return np.broadcast_to(np.arange(shape[-1]), shape).astype(spec.dtype)
        random = np.random.default_rng([self._seed, *shape])
        if spec.dtype.startswith(("int", "uint")):
            return random.integers(0, max(self.vocab_size, 2), shape).astype(spec.dtype)
        if spec.dtype == "bool":
            return np.ones(shape, np.bool_)
        dtype = "float32" if spec.dtype == "bfloat16" else spec.dtype
        return random.standard_normal(shape).astype(dtype)


def _encode_text(folder: Path) -> NDArray[np.int64] | None:
    import numpy as np
    from tokenizers import Tokenizer

    from ..verify.texts import CODE, PROSE

    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    encoding = Tokenizer.from_file(str(file)).encode(PROSE + "\n" + CODE, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int64)
