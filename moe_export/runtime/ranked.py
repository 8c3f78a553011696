"""Rank 0 of an engine of several ranks: it gives the commands, and every rank runs the same graphs in the
same order."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.bundle.reader import Bundle
from moe_export.errors import InputError, MoeExportError
from moe_export.runtime.gpu_ranks import connect_gpus
from moe_export.runtime.inputs import check_sequence
from moe_export.runtime.joining import Joined
from moe_export.runtime.launch import ending
from moe_export.runtime.opened import Opened, ShowsRouting
from moe_export.runtime.ranks import Ranks, is_shared
from moe_export.runtime.rows import Deal, check_rows_lead, joined
from moe_export.runtime.stepping import LOGITS, Stepper, check_step
from moe_export.runtime.traced import BARE, FORCED, SHOWN, TracedEngines, check_chunks
from moe_export.schema import Limits, Manifest
from moe_export.trace import LayerTrace, TracedRun

Array = NDArray[Any]
Ints = NDArray[np.int64]
Local = Callable[[dict[str, Array]], dict[str, Array]]


@dataclass(frozen=True)
class RankUse:
    """What one rank did so far. ``seconds``: in its graphs, waiting for other ranks included.
    ``peak_rss``: bytes; None where the system does not tell. ``exchange``: calls, bytes and seconds of the
    graphs' exchanges, where the backend counts them."""

    rank: int
    host: str
    pid: int
    runs: int
    seconds: float
    peak_rss: int | None
    exchange: dict[str, float]


class RankWork:
    """This rank's own part: counts runs and their time."""

    def __init__(self, ranks: Ranks, exchange_use: Callable[[], dict[str, float]], local: Opened) -> None:
        self._ranks = ranks
        self._unlimited = local.set_communicator is not None
        self._exchange_use = exchange_use
        self._runs, self._seconds = 0, 0.0

    def timed(self, work: Callable[[], dict[str, Array]]) -> dict[str, Array]:
        """The result of ``work``, a run of a graph."""
        began = time.perf_counter()
        # MPI's exchanges in a graph have a limit each; NCCL's have none.
        with self._ranks.watched("a run") if self._unlimited else contextlib.nullcontext():
            result = work()
        self._runs += 1
        self._seconds += time.perf_counter() - began
        return result

    def use(self) -> dict[str, Any]:
        """The fields of :class:`RankUse`."""
        from moe_export.process_memory import peak_rss_bytes

        return {
            "rank": self._ranks.rank,
            "host": self._ranks.host,
            "pid": os.getpid(),
            "runs": self._runs,
            "seconds": self._seconds,
            "peak_rss": peak_rss_bytes(),
            "exchange": self._exchange_use(),
        }


@dataclass(frozen=True)
class RankedOpened(Opened):
    """``use``: what each rank did, in the order of ranks."""

    use: Callable[[], tuple[RankUse, ...]] = tuple


def connect_graphs(ranks: Ranks, manifest: Manifest, local: Opened) -> Callable[[], dict[str, float]]:
    """Let the graphs of all ranks exchange values. All ranks call this.

    Returns: what reads how much was exchanged so far.
    """
    if local.set_communicator is not None:
        connect_gpus(ranks, local.set_communicator)
    if manifest.target != "onnxruntime":
        return dict
    from moe_export.backends.onnxruntime.exchange import connect_exchange, exchange_use

    ranks.together(lambda: connect_exchange(ranks.communicator, ranks.patience))
    return exchange_use


def open_ranked(meeting: Joined, bundle: Bundle, local: Opened) -> RankedOpened:
    """All ranks as one engine; ``local`` is rank 0's. Until it is closed the other ranks serve.

    Raises:
        BundleError: the engine's batch cannot be divided.
    """
    manifest, ranks = bundle.manifest, meeting.ranks
    divided = meeting.parallel.mode == "alltoall"
    ranks.together(lambda: check_rows_lead(manifest.io, str(bundle.path)) if divided else None)
    work = RankWork(ranks, connect_graphs(ranks, manifest, local), local)
    driver = Driver(ranks, divided, work)
    traced: ShowsRouting = local.traced
    if isinstance(traced, TracedEngines):
        traced = RankedTraces(driver, traced)
    return RankedOpened(
        engine=RankedEngine(driver, local),
        traced=traced,
        stepper=lambda batch: RankedStepper(driver, local, manifest.limits, batch),
        capacity_use=local.capacity_use,
        close=lambda: _close(driver, local),
        use=driver.use,
    )


def _close(driver: Driver, local: Opened) -> None:
    driver.close()
    local.close()


class Driver:
    """Sends commands to the workers and runs rank 0's part. Thread-safe: one run at a time."""

    def __init__(self, ranks: Ranks, divided: bool, work: RankWork) -> None:
        """``divided``: each rank gets its part of the batch; otherwise each gets all of it."""
        self._ranks = ranks
        self._divided = divided
        self._work = work
        self._closed = False
        self._alive = contextlib.ExitStack()
        self._alive.enter_context(ranks.alive())
        self.freed: list[int] = []
        """Numbers of steppers that nobody uses any more."""
        atexit.register(self.close)

    def call(
        self, op: str, values: Mapping[str, Any], arrays: Mapping[str, Array], batch: int, local: Local
    ) -> dict[str, Array]:
        """Have every rank do ``op`` on ``batch`` sequences; ``local`` is rank 0's part of it.

        Raises:
            InputError: the session is closed.
            MoeExportError: all ranks failed alike. Any other failure ends all ranks.
        """
        ranks = self._ranks
        deal = Deal(batch, ranks.size if self._divided else 1)
        with ranks.lock:
            freed = self._begin()
            try:
                common = {"op": op, "batch": batch, "freed": freed, **values}
                ranks.send_each(
                    {
                        rank: (common, deal.parts(arrays, rank) if self._divided else dict(arrays))
                        for rank in range(1, ranks.size)
                    }
                )
                own = deal.parts(arrays, 0) if self._divided else dict(arrays)
                results = self._work.timed(lambda: local(own))
                if not self._divided:
                    return results
                parts = [deal.without_repetitions(results, 0)]
                parts += [ranks.receive(rank)[1] for rank in range(1, ranks.size) if deal.own(rank)]
                return joined(parts)
            except BaseException as error:  # The others are in the middle of the same run, and would wait.
                if isinstance(error, MoeExportError) and is_shared(error):
                    raise
                ranks.abort(ending(error))

    def prepare(self, form: str, work: Callable[[], None]) -> None:
        """Have every rank load a form of the model that shows or takes routing."""
        with self._ranks.lock:
            freed = self._begin()
            others = range(1, self._ranks.size)
            self._ranks.send(others, {"op": "prepare", "form": form, "freed": freed}, {})
            self._ranks.together(work)

    def use(self) -> tuple[RankUse, ...]:
        """What each rank did so far."""
        with self._ranks.lock:
            freed = self._begin()
            others = range(1, self._ranks.size)
            self._ranks.send(others, {"op": "use", "freed": freed}, {})
            answers = [self._work.use(), *(self._ranks.receive(rank)[0] for rank in others)]
        return tuple(RankUse(**answer) for answer in answers)

    def close(self) -> None:
        """Let the workers go."""
        with self._ranks.lock:
            if not self._closed:
                self._closed = True
                self._alive.close()
                self._ranks.send(range(1, self._ranks.size), {"op": "close", "freed": []}, {})
        atexit.unregister(self.close)

    def _begin(self) -> list[int]:
        if self._closed:
            raise InputError("this session is closed; its ranks serve no more")
        freed, self.freed[:] = list(self.freed), []
        return freed


class RankedEngine:
    """Whole runs on all ranks."""

    def __init__(self, driver: Driver, local: Opened) -> None:
        self._driver, self._local = driver, local

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """All outputs for checked inputs, of the whole batch."""
        return self._driver.call("run", {}, feeds, _batch(feeds), self._local.engine.run)


class RankedTraces:
    """Runs on all ranks that show routing, or take it."""

    def __init__(self, driver: Driver, local: TracedEngines) -> None:
        self._driver, self._local = driver, local
        self._ready: set[str] = set()

    def run(self, feeds: dict[str, Array], routing: Sequence[LayerTrace] | None) -> TracedRun:
        """As :meth:`TracedEngines.run`, of the whole batch."""
        local, form = self._local, SHOWN if routing is None else FORCED
        local.check_routing(routing)
        self._prepare(form)
        forced = local.forced_feeds(routing)
        return local.finished(self._outputs(feeds, forced, form), forced)

    def run_forced(
        self, feeds: dict[str, Array], routing: Sequence[tuple[Array, Array]]
    ) -> dict[str, Array]:
        """As :meth:`TracedEngines.run_forced`, of the whole batch."""
        self._prepare(BARE)
        return self._outputs(feeds, self._local.bare_feeds(routing), BARE)

    def _outputs(self, feeds: dict[str, Array], forced: dict[str, Array], form: str) -> dict[str, Array]:
        batch = _batch(feeds)
        for name, array in forced.items():
            if not len(array) or len(array) % batch:
                raise InputError(
                    f"forced routing: {name} has {len(array)} tokens, no multiple of the batch {batch}"
                )
        every = {**feeds, **forced}
        return self._driver.call(
            "traced", {"form": form}, every, batch, lambda own: self._local.outputs(own, form)
        )

    def run_chunked(
        self, ids: Ints, mask: Ints, chunks: Sequence[int], check_open: Callable[[], None]
    ) -> TracedRun:
        """As :meth:`TracedEngines.run_chunked`, of the whole batch."""
        check_chunks(chunks, ids.shape[1])
        check_open()
        self._prepare(SHOWN)
        outputs = self._driver.call(
            "chunked",
            {"chunks": list(chunks)},
            {"ids": ids, "mask": mask},
            len(ids),
            lambda own: self._local.chunked_outputs(own["ids"], own["mask"], chunks, _always),
        )
        return self._local.finished_chunked(outputs)

    def _prepare(self, form: str) -> None:
        if form not in self._ready:
            self._driver.prepare(form, lambda: self._local.prepare(form))
            self._ready.add(form)


class RankedStepper(Stepper):
    """A KV-cached stepper on every rank: of all sequences, or of those that the rank got."""

    _numbers = itertools.count()

    def __init__(self, driver: Driver, local: Opened, limits: Limits, batch: int) -> None:
        self._driver, self._local, self._limits, self._batch = driver, local, limits, batch
        self._own: Stepper | None = None
        self._past = 0
        self._number = next(self._numbers)
        weakref.finalize(self, driver.freed.append, self._number)

    def feed(self, ids: Ints, mask: Ints) -> dict[str, Array]:
        return self._feed(ids, mask, last=False)

    def feed_for_last(self, ids: Ints, mask: Ints) -> Array:
        last: Array = self._feed(ids, mask, last=True)[LOGITS][:, -1]
        return last

    def _feed(self, ids: Ints, mask: Ints, *, last: bool) -> dict[str, Array]:
        check_step(ids, mask, self._batch)
        total = self._past + ids.shape[1]
        check_sequence(total, self._past, self._limits)
        arrays: dict[str, Array] = {"ids": ids.astype(np.int64), "mask": mask.astype(np.int64)}

        def local(own: dict[str, Array]) -> dict[str, Array]:
            if self._own is None:
                self._own = self._local.stepper(len(own["ids"]))
            return fed(self._own, own, last)

        results = self._driver.call(
            "feed", {"stepper": self._number, "last": last}, arrays, self._batch, local
        )
        self._past = total
        return results


def fed(stepper: Stepper, arrays: Mapping[str, Array], last: bool) -> dict[str, Array]:
    """One step of a rank: the logits, of the last token only where ``last``."""
    if last:
        return {LOGITS: stepper.feed_for_last(arrays["ids"], arrays["mask"])[:, None]}
    return stepper.feed(arrays["ids"], arrays["mask"])


def _batch(feeds: Mapping[str, Array]) -> int:
    return len(feeds["input_ids"]) if "input_ids" in feeds else len(next(iter(feeds.values())))


def _always() -> None:
    """A worker's session is open for as long as it serves."""
