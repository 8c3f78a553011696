"""Every rank but the first: it loads its engine and does what rank 0 says."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_export.bundle.reader import Bundle, open_bundle
from moe_export.errors import MoeExportError
from moe_export.runtime.joining import SERVE, Joined, join_ranks
from moe_export.runtime.launch import ending
from moe_export.runtime.opened import Opened, open_engine
from moe_export.runtime.ranked import RankWork, connect_graphs, fed
from moe_export.runtime.ranks import is_shared
from moe_export.runtime.rows import Deal, check_rows_lead
from moe_export.runtime.stepping import Stepper
from moe_export.runtime.traced import TracedEngines

Array = NDArray[Any]


def serve_rank(
    path: str | os.PathLike[str],
    *,
    trust: bool = False,
    threads: int | None = None,
    ep_timeout: float | None = None,
) -> None:
    """Run this rank's part of a bundle, until rank 0 closes its session. For ranks 1 and above.

    Args: as for :func:`moe_export.runtime.load`, which rank 0 calls meanwhile.

    A failure of this rank alone, while it serves, is printed in one line and ends all ranks.

    Raises:
        MoeExportError: what :func:`~moe_export.runtime.load` raises on rank 0: all ranks raise it.
    """
    meeting = join_ranks(path, SERVE, ep_timeout)
    assert meeting is not None
    ranks = meeting.ranks

    def work() -> tuple[Bundle, Opened]:
        bundle = open_bundle(path, trust=trust, rank=ranks.rank)
        meeting.choose_gpu(bundle.manifest)
        return bundle, open_engine(bundle, meeting.threads(threads))

    bundle, local = ranks.together(work)
    divided = meeting.parallel.mode == "alltoall"
    ranks.together(lambda: check_rows_lead(bundle.manifest.io, str(path)) if divided else None)
    own = RankWork(ranks, connect_graphs(ranks, bundle.manifest, local), local)
    try:
        _Server(meeting, local, own).serve()
        local.close()
    except BaseException as error:  # Whatever ends this rank: the others would wait for it.
        ranks.abort(ending(error))


class _Server:
    def __init__(self, meeting: Joined, local: Opened, work: RankWork) -> None:
        self._ranks = meeting.ranks
        self._divided = meeting.parallel.mode == "alltoall"
        self._local = local
        self._work = work
        self._steppers: dict[int, Stepper] = {}
        self._runs: dict[str, Callable[[dict[str, Any], dict[str, Array]], dict[str, Array]]] = {
            "run": lambda values, arrays: self._local.engine.run(arrays),
            "traced": lambda values, arrays: self._traced().outputs(arrays, values["form"]),
            "chunked": self._chunked,
            "feed": self._feed,
        }

    def serve(self) -> None:
        """Until rank 0 says that it is over."""
        ranks = self._ranks
        while True:
            values, arrays = ranks.receive(0, idle=True)
            for number in values["freed"]:
                self._steppers.pop(number, None)
            op = values["op"]
            if op == "close":
                return
            if op == "use":
                ranks.send((0,), self._work.use(), {})
            elif op == "prepare":
                self._prepare(values["form"])
            else:
                self._run(op, values, arrays)

    def _prepare(self, form: str) -> None:
        with contextlib.suppress(MoeExportError):  # Rank 0 raises it, and may go on with something else.
            self._ranks.together(lambda: self._traced().prepare(form))

    def _run(self, op: str, values: dict[str, Any], arrays: dict[str, Array]) -> None:
        try:
            results = self._work.timed(lambda: self._runs[op](values, arrays))
        except MoeExportError as error:
            if is_shared(error):
                return  # Rank 0 has the same error and raises it.
            raise
        deal = Deal(values["batch"], self._ranks.size)
        if self._divided and deal.own(self._ranks.rank):
            self._ranks.send((0,), {}, deal.without_repetitions(results, self._ranks.rank))

    def _chunked(self, values: dict[str, Any], arrays: dict[str, Array]) -> dict[str, Array]:
        return self._traced().chunked_outputs(
            arrays["ids"].astype(np.int64), arrays["mask"].astype(np.int64), values["chunks"], lambda: None
        )

    def _feed(self, values: dict[str, Any], arrays: dict[str, Array]) -> dict[str, Array]:
        number = values["stepper"]
        if number not in self._steppers:
            self._steppers[number] = self._local.stepper(len(arrays["ids"]))
        return fed(self._steppers[number], arrays, values["last"])

    def _traced(self) -> TracedEngines:
        traced = self._local.traced
        assert isinstance(traced, TracedEngines), "rank 0 refuses traces of plans"
        return traced
