"""Loading a bundle and running it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe_export.bundle.reader import Bundle, open_bundle
from moe_export.errors import BundleError, InputError
from moe_export.runtime.capacity import CapacityUse, own_io
from moe_export.runtime.generation import Generation, Request, StreamEvent
from moe_export.runtime.generator import Generator
from moe_export.runtime.inputs import InputChecker
from moe_export.runtime.joining import DRIVE, join_ranks
from moe_export.runtime.opened import Opened, open_engine
from moe_export.runtime.plugin import missing_plugin_note, runs_with_plugin
from moe_export.runtime.prompts import Prompt
from moe_export.runtime.ranked import RankUse, open_ranked
from moe_export.runtime.stepping import LOGITS, Stepper
from moe_export.runtime.text import load_tokenizer
from moe_export.schema import Manifest, ModelIO, TextInfo
from moe_export.sms import GPU_TARGETS
from moe_export.trace import LayerTrace, TracedRun

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = NDArray[Any]

CPU_TARGETS = ("onnxruntime", "portable")


def load(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    threads: int | None = None,
    ep_timeout: float | None = None,
) -> Session:
    """Open a bundle and make it ready to run.

    A bundle of several ranks runs under ``mpiexec``: rank 0 loads it, and meanwhile the others call
    :func:`moe_export.runtime.serve_rank`.

    Args:
        path: the bundle's folder.
        trust: skip the hash check (and nothing else).
        threads: threads inside one operator; None: the physical cores this process may use, divided by the
            ranks that share them.
        ep_timeout: seconds that ranks wait for each other; None: ``MOE_EXPORT_EP_TIMEOUT``, or 60.

    Raises:
        BundleError: the bundle is damaged, hostile, newer than this version, or not for this machine.
        EnvironmentLacksError: its plans need a GPU, driver or library that is not here; or its ranks need
            MPI.
        InputError: ``threads`` is not a whole number of 1 or more.
        UsageError: it has more or fewer ranks than were started.
    """
    started = time.perf_counter()
    joined = join_ranks(path, DRIVE, ep_timeout)
    if joined is None:
        session = Session(open_bundle(path, trust=trust), threads=threads)
    else:

        def work() -> tuple[Bundle, Opened]:
            bundle = open_bundle(path, trust=trust, rank=0)
            joined.choose_gpu(bundle.manifest)
            return bundle, open_engine(bundle, joined.threads(threads))

        bundle, local = joined.ranks.together(work)
        opened = open_ranked(joined, bundle, local)
        session = Session(bundle, opened=opened, notes=joined.notes(threads))
        session.rank_use = opened.use
        session.rank_note = joined.notes(threads)[0]
    session.load_seconds = time.perf_counter() - started
    return session


class Session:
    """A loaded bundle. Thread-safe; a context manager that closes itself.

    Attributes:
        manifest: the bundle's manifest.
        load_seconds: how long :func:`load` took, hash check included.
        notes: one line per thing worth knowing about how this bundle runs here.
        rank_use: what each rank did so far; None for a bundle of one rank.
        rank_note: on how many ranks it runs and how they exchange; empty for a bundle of one rank.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        opened: Opened | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """For a checked bundle; use :func:`load`. ``opened``: its engine, where it is open already."""
        manifest = bundle.manifest
        if manifest.target not in (*CPU_TARGETS, *GPU_TARGETS):
            raise BundleError(
                f"bundle {bundle.path} is for target {manifest.target!r}; this runtime runs "
                f"{', '.join((*CPU_TARGETS, *GPU_TARGETS))}"
            )
        self.manifest: Manifest = manifest
        self.load_seconds = 0.0
        self._bundle = bundle
        self._process = os.getpid()
        self._lock = threading.Lock()
        vocabulary = manifest.text.vocab_size if manifest.text is not None else None
        self._checker = InputChecker(own_io(manifest.io), manifest.limits, vocabulary)
        self.rank_use: Callable[[], tuple[RankUse, ...]] | None = None
        self.rank_note = ""
        self._opened: Opened | None = opened or open_engine(bundle, threads)
        self.notes: tuple[str, ...] = (*notes, *self._find_notes())

    @property
    def io(self) -> ModelIO:
        """Inputs and outputs of the engine."""
        return self.manifest.io

    @property
    def capacity_use(self) -> CapacityUse | None:
        """How often a TensorRT plan was run again with larger buckets of experts; None for engines without
        buckets."""
        return self._open().capacity_use()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's tokenizer, read on first use; None where the bundle has none."""
        self._check_open()
        return self._tokenizer

    def close(self) -> None:
        """Free the engine. Every later call, and the next step of a running generation, is an
        :class:`InputError`; single runs in other threads end as they should. Workers of other ranks return
        from :func:`moe_export.runtime.serve_rank`."""
        with self._lock:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def __enter__(self) -> Session:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """Run the engine once.

        Args:
            inputs: arrays by name. Cache inputs may be left out together (an empty past), and so may the mask
                (no padding) and the positions (counted from the mask).

        Returns:
            Every output by name, caches included.

        Raises:
            InputError: the inputs do not fit the engine; the message names the input.
            BundleError: ONNX Runtime failed.
        """
        return self._open().engine.run(self._checker.check(inputs).feeds)

    def run_traced(
        self, inputs: Mapping[str, Any], *, force_routing: Sequence[LayerTrace] | None = None
    ) -> TracedRun:
        """Run once and show routing and values of every MoE layer.

        The first call loads the model once more, with these values as outputs, and so does the first call
        with ``force_routing``. Weights in external files stay memory-mapped there.

        Args:
            inputs: as for :meth:`run`.
            force_routing: one trace per MoE layer whose ``expert_ids`` and ``weights`` replace the router's.

        Raises:
            InputError: inputs or routing do not fit the engine.
            BundleError: the graph lacks a layer's values, or ONNX Runtime failed.
        """
        return self._open().traced.run(self._checker.check(inputs).feeds, force_routing)

    def run_forced(
        self, inputs: Mapping[str, Any], routing: Sequence[tuple[Array, Array]]
    ) -> dict[str, Array]:
        """As :meth:`run`, with expert ids and weights [T, K] per MoE layer in place of the routers'. Nothing
        else is shown, so it takes the time that a run takes.

        The first call loads the model once more.

        Raises:
            InputError: inputs or routing do not fit the engine.
            BundleError: the routing of the graph cannot be replaced, or ONNX Runtime failed.
        """
        return self._open().traced.run_forced(self._checker.check(inputs).feeds, routing)

    def chunked_logits(self, input_ids: Any, attention_mask: Any, chunks: Sequence[int]) -> TracedRun:
        """Feed a sequence through the KV cache in pieces, as prefill and decode do.

        Args:
            input_ids: [batch, sequence] integers.
            attention_mask: [batch, sequence], 1 token, 0 padding.
            chunks: lengths of the pieces; they sum to the sequence length.

        Returns:
            ``logits`` [batch, sequence, vocab], and traces whose tokens run over batch, then sequence, as if
            the sequence had been run in one piece.

        Raises:
            InputError: the engine has no KV cache, or the inputs do not fit.
        """
        traced = self._open().traced
        self._text()
        if not self.io.cache_inputs:
            raise InputError("this engine has no KV cache to feed in chunks; use run_traced()")
        names = {spec.role: spec.name for spec in self.io.inputs if spec.role != "cache"}
        whole = {names["token_ids"]: input_ids}
        if "mask" in names:
            whole[names["mask"]] = attention_mask
        feeds = self._checker.check(whole).feeds
        ids = feeds[names["token_ids"]].astype(np.int64)
        mask = feeds[names["mask"]].astype(np.int64) if "mask" in names else np.ones_like(ids)
        return traced.run_chunked(ids, mask, list(chunks), self._check_open)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str | int] = (),
        seed: int | None = None,
    ) -> Generation:
        """Continue a prompt, or a batch of prompts.

        Args:
            prompt: text, token ids, or a list of either. Prompts of a batch are padded on the left.
            max_new_tokens: at most this many per prompt; fewer where the bundle's maximum sequence comes
                first (finish reason ``limit``).
            temperature: 0 is greedy; above, logits are divided by it and a token is drawn.
            top_k: draw from the k most probable tokens.
            top_p: draw from the smallest set of most probable tokens that holds this share.
            stop: token ids and strings that end a sequence, beside the model's own end tokens.
            seed: makes drawing repeatable; each prompt has its own stream of numbers.

        Raises:
            InputError: an argument is out of range, or the prompt does not fit the engine.
            BundleError: ONNX Runtime failed, or the logits are not numbers.
        """
        request = Request.make(max_new_tokens, temperature, top_k, top_p, stop, seed)
        loop, prompts = self._generator().prepare(prompt, request, self._check_open)
        ids: list[list[int]] = [[] for _ in prompts]
        texts: list[list[str]] = [[] for _ in prompts]
        for event in loop.events():
            ids[event.sequence].append(event.token_id)
            texts[event.sequence].append(event.text)
        return Generation(
            token_ids=ids,
            texts=None if self._tokenizer is None else ["".join(pieces) for pieces in texts],
            finish_reasons=[str(reason) for reason in loop.finish_reasons],
            prompt_tokens=sum(len(tokens) for tokens in prompts),
            new_tokens=sum(len(tokens) for tokens in ids),
            prefill_seconds=loop.prefill_seconds,
            decode_seconds=loop.decode_seconds,
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop: Sequence[str | int] = (),
        seed: int | None = None,
    ) -> Iterator[StreamEvent]:
        """Like :meth:`generate`, token by token. Arguments are checked now; the engine runs as events are
        taken."""
        request = Request.make(max_new_tokens, temperature, top_k, top_p, stop, seed)
        return self._generator().prepare(prompt, request, self._check_open)[0].events()

    def stepper(self, batch: int = 1) -> Stepper:
        """For sampling of your own: feed token ids step by step and get logits; the KV cache stays inside.

        One thread uses a stepper; any number of steppers may be in use.

        Raises:
            InputError: the batch is beyond the limit, or the engine is no decoder that token ids suffice for.
        """
        return self._generator().stepper(batch)

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        file = self._tokenizer_file()
        return None if file is None else load_tokenizer(file)

    def _generator(self) -> Generator:
        opened = self._open()
        text = self._text()
        return Generator(opened, self.io, self.manifest.limits, text, self._checker, self._tokenizer)

    def _open(self) -> Opened:
        opened = self._opened
        if opened is None:
            raise InputError("this session is closed; call load() again")
        if os.getpid() != self._process:
            raise InputError(
                "this session was loaded by the parent process, and its threads do not survive a fork; call "
                "load() in this process"
            )
        return opened

    def _check_open(self) -> None:
        self._open()

    def _text(self) -> TextInfo:
        text = self.manifest.text
        generates = any(spec.name == LOGITS for spec in self.io.outputs)
        if text is None or self.manifest.task != "text-generation" or not generates:
            raise InputError(f"this bundle's task is {self.manifest.task}; it generates no text, use run()")
        return text

    def _tokenizer_file(self) -> Path | None:
        folder = self._bundle.tokenizer_path
        file = None if folder is None else folder / "tokenizer.json"
        return file if file is not None and file.is_file() else None

    def _find_notes(self) -> Iterator[str]:
        if self.manifest.source.trial:
            yield self.manifest.source.trial
        if self.manifest.target in GPU_TARGETS:
            yield "moe-export's runner of TensorRT plans was not run on a GPU before its release"
        slower = missing_plugin_note(self._bundle.model_path) if runs_with_plugin(self.manifest) else None
        if slower is not None:
            yield slower
        if self.manifest.task != "text-generation":
            return
        if not self.io.cache_inputs:
            yield "no KV cache: generation runs the whole sequence again for every new token"
        if self._bundle.tokenizer_path is None:
            yield "no tokenizer: prompts are token ids, and generated text is not shown"
        elif self._tokenizer_file() is None:
            yield "no tokenizer.json: prompts are token ids, and generated text is not shown"
