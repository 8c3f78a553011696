"""The NCCL communicator over which the plans of several ranks exchange. *Not run on a GPU.*

MPI starts the ranks and carries NCCL's name for them; what the plans exchange goes through NCCL.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moe_export.backends.trt.machine import gpu_identity
from moe_export.backends.trt.nccl import Nccl
from moe_export.errors import EnvironmentLacksError
from moe_export.runtime.ranks import Ranks

_LATER = 5.0
"""Seconds after a rank's patience."""
SetCommunicator = Callable[[Nccl, int], None]
"""Gives a plan the library, and the address of its communicator."""


def connect_gpus(ranks: Ranks, set_communicator: SetCommunicator) -> None:
    """Let the plans of all ranks exchange. All ranks call this before the first run.

    Raises:
        EnvironmentLacksError: NCCL is missing on a rank, or two ranks have one GPU. BundleError: NCCL or
        TensorRT refuses. All ranks raise it; where one does not come back in time, it ends all.
    """
    nccl = ranks.together(Nccl)

    def own() -> dict[str, str]:
        unique_id = nccl.unique_id().hex() if ranks.rank == 0 else ""
        return {"id": unique_id, "gpu": gpu_identity(), "host": ranks.host}

    everything = ranks.exchange(ranks.together(own))
    check_gpus(everything)

    def connect() -> None:
        with _ended_after(ranks.patience + _LATER), ranks.watched("connecting the GPUs through NCCL"):
            address = nccl.communicator(bytes.fromhex(everything[0]["id"]), ranks.rank, ranks.size)
            set_communicator(nccl, address)

    ranks.together(connect)


@contextlib.contextmanager
def _ended_after(seconds: float) -> Iterator[None]:
    """TensorRT may keep Python's lock while it waits for other ranks. Then this still ends the process, after
    it has printed where it hangs, and the launcher ends the others."""
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def check_gpus(everything: Sequence[Mapping[str, Any]]) -> None:
    """No two ranks have one GPU, with which NCCL may hang. ``gpu`` and ``host`` of each rank.

    Raises:
        EnvironmentLacksError: names them.
    """
    seen: dict[str, int] = {}
    for rank, given in enumerate(everything):
        if given["gpu"] and seen.setdefault(given["gpu"], rank) != rank:
            raise EnvironmentLacksError(
                f"ranks {seen[given['gpu']]} and {rank} have the same GPU (host {given['host']}); each rank "
                "needs a GPU of its own"
            )
