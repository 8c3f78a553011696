"""The ranks of one run, and messages between them. Nothing here waits without a limit.

Every wait polls, and ends all ranks when its time is over. Rank 0 waits ``timeout`` seconds, rank 1 five
more, the others ten more: so one rank, and only one, says what happened. Who works for long (hashes, loading)
says every few seconds that it is alive, and others wait as long as it does. Workers between two commands wait
:data:`IDLE` times as long for a sign of life of rank 0.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from moe_export.errors import BundleError, EnvironmentLacksError, MoeExportError
from moe_export.runtime.launch import launched
from moe_export.runtime.tensors import numpy_dtype

if TYPE_CHECKING:
    from mpi4py import MPI

Array = NDArray[Any]
Message = tuple[dict[str, Any], dict[str, Array]]
"""Plain JSON values, and arrays by name."""
Result = TypeVar("Result")

ABORTED = 2
"""Exit code when one rank ends all."""
LATER = (0.0, 5.0, 10.0)
"""How many seconds longer rank 0, rank 1 and the others wait."""
IDLE = 5
"""How many time limits a worker without a command waits for a sign of life of rank 0."""
SHARED = "all ranks: "
"""In an error's text: every rank fails alike, so none needs to be ended."""
_DATA, _ALIVE = 1, 2
_NAPS = ((0.002, 0.0), (0.2, 0.0001), (5.0, 0.002))
_LONGEST_NAP = 0.01
_LONGEST_TICK = 1.0
"""Of a pause between two looks no more counts as waiting: this process itself may have been suspended."""
_ABORT_SECONDS = 5.0

_world: Ranks | None = None


def is_shared(error: BaseException) -> bool:
    """Whether all ranks fail with this error, each by itself."""
    return SHARED in str(error)


def connect(timeout: float) -> Ranks:
    """All ranks of this run; started once per process.

    Raises:
        EnvironmentLacksError: there is no MPI for Python here, or one that threads cannot use.
    """
    global _world
    if _world is None:
        _world = Ranks(timeout)
    _world.timeout = timeout
    return _world


def connected() -> Ranks | None:
    """The ranks, if this process has connected to them."""
    return _world


class Ranks:
    """The processes of one run. One thread at a time uses it: take :attr:`lock`."""

    def __init__(self, timeout: float) -> None:
        """Start MPI. Use :func:`connect`."""
        self.timeout = timeout
        self.host = socket.gethostname()
        self.lock = threading.RLock()
        self.met = False
        """All ranks have told each other what they are here for."""
        self._collecting = False
        self._mpi = _start_mpi(timeout)
        world = self._mpi.COMM_WORLD
        self.rank, self.size = int(world.Get_rank()), int(world.Get_size())
        launch = launched()
        if (self.rank, self.size) != (launch.rank, launch.size):
            vendor = " ".join(str(part) for part in self._mpi.get_vendor()[:1])
            raise EnvironmentLacksError(
                f"mpiexec started {launch.size} processes, and MPI ({vendor}) knows of {self.size}: mpiexec "
                "is not that of the MPI which mpi4py finds; start them with the one that belongs to it"
            )
        self._last_beat = time.monotonic()
        self._beating: list[Any] = []
        self._beat_lock = threading.Lock()
        self._comm = self._duplicate(world)

    @property
    def patience(self) -> float:
        """Seconds that this rank waits for another one."""
        return self.timeout + LATER[min(self.rank, len(LATER) - 1)]

    @property
    def name(self) -> str:
        """``rank 1 of 4 (host)``."""
        return f"rank {self.rank} of {self.size} ({self.host})"

    @property
    def communicator(self) -> MPI.Intracomm:
        """All ranks."""
        return self._comm

    def send(self, to: Sequence[int], values: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
        """Send one message to each of ``to``; returns when it has left."""
        self.send_each({rank: (dict(values), dict(arrays)) for rank in to})

    def send_each(self, messages: Mapping[int, Message]) -> None:
        """Send each rank its message; returns when all have left."""
        kept: list[Any] = []
        requests: list[tuple[int, Any]] = []
        for rank, (values, arrays) in messages.items():
            plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            shapes = [[name, array.dtype.name, list(array.shape)] for name, array in plain.items()]
            header = json.dumps({"values": values, "arrays": shapes}).encode()
            for data in (header, *(_bytes(array) for array in plain.values() if array.nbytes)):
                kept.append(data)
                requests.append((rank, self._comm.Isend([data, self._mpi.BYTE], rank, _DATA)))
        for rank, request in requests:
            self._wait(request.Test, f"rank {rank} does not take a message")

    def receive(self, source: int, *, idle: bool = False) -> Message:
        """The next message of rank ``source``; ``idle``: there is nothing to do meanwhile."""
        header = json.loads(bytes(self._receive_bytes(source, None, IDLE if idle else 1)))
        arrays = {}
        for name, dtype, shape in header["arrays"]:
            array = np.empty(shape, numpy_dtype(dtype))
            if array.nbytes:
                self._receive_bytes(source, _bytes(array), 1)
            arrays[name] = array
        return header["values"], arrays

    def exchange(self, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each rank gave, in the order of ranks. All ranks call this."""
        if self.rank:
            self.send((0,), values, {})
            everything: list[dict[str, Any]] = self.receive(0)[0]["all"]
            return everything
        others = range(1, self.size)
        self._collecting = True
        try:
            everything = [dict(values), *(self.receive(rank)[0] for rank in others)]
        finally:
            self._collecting = False
        self.send(others, {"all": everything}, {})
        return everything

    def together(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` here while the other ranks do theirs; it may take long. All ranks call this.

        Raises:
            MoeExportError: it failed on a rank; then it is raised on all of them.
        """
        result, failure, told = None, None, ""
        with self.alive():
            try:
                result = work()
            except Exception as error:  # Whatever it is, the others must hear of it, or they would wait.
                failure, told = error, _told(error)
        code = failure.exit_code if isinstance(failure, MoeExportError) else BundleError.exit_code
        answers = self.exchange({"problem": told, "code": code, "host": self.host})
        if failure is not None and all(answer["problem"] == told for answer in answers):
            raise failure
        problem = problems_text(answers)
        if problem:
            codes = [int(answer["code"]) for answer in answers if answer["problem"]]
            kind = EnvironmentLacksError if codes[0] == EnvironmentLacksError.exit_code else BundleError
            raise kind(problem) from failure
        return result  # type: ignore[return-value] # None only where work() returns None

    @contextlib.contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """End all ranks when the block takes longer than this rank's patience: for calls that wait for other
        ranks and know no limit of their own."""
        text = f"{what} took longer than {self.patience:.0f} s (time limit {self.timeout:g} s)"
        timer = threading.Timer(self.patience, self.abort, [text])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def abort(self, text: str) -> NoReturn:
        """Say what happened in one line, and end all ranks."""
        line = " ".join(f"error: {self.name}: {text}; all ranks are ended".split())
        print(line, file=sys.__stderr__, flush=True)
        time.sleep(0.2)  # The launcher forwards the line, then ends everybody.
        # Where it cannot be reached, MPI may not return either; Python's threads do not run meanwhile.
        faulthandler.dump_traceback_later(_ABORT_SECONDS, exit=True, file=open(os.devnull, "w"))  # noqa: SIM115
        self._mpi.COMM_WORLD.Abort(ABORTED)
        os._exit(ABORTED)

    def _duplicate(self, communicator: MPI.Intracomm) -> MPI.Intracomm:
        fresh, request = communicator.Idup()
        self._wait(request.Test, "not all ranks came to the start")
        return fresh

    def _receive_bytes(self, source: int, into: Any, times: int) -> Any:
        """The bytes of the next message; meanwhile signs of life prolong the wait. ``times``: how many time
        limits to wait."""
        while True:
            status = self._mpi.Status()
            found: list[Any] = []

            def arrived(status: Any = status, found: list[Any] = found) -> bool:
                message = self._comm.Improbe(source, self._mpi.ANY_TAG, status)
                if message is not None:
                    found.append(message)
                return message is not None

            self._wait(arrived, f"rank {source} does not answer", times)
            alive = status.Get_tag() == _ALIVE
            size = status.Get_count(self._mpi.BYTE)
            buffer = bytearray(size) if alive or into is None else into
            if len(buffer) != size:
                self.abort(f"rank {source} sent {size} bytes where {len(buffer)} were announced")
            self._wait(found[0].Irecv([buffer, self._mpi.BYTE]).Test, f"rank {source} stopped in a message")
            if not alive:
                return buffer

    def _wait(self, poll: Callable[[], Any], what: str, times: int = 1) -> None:
        waited, last = 0.0, time.monotonic()
        while not poll():
            now = time.monotonic()
            waited, last = waited + min(now - last, _LONGEST_TICK), now
            if waited > times * self.timeout + self.patience - self.timeout:
                self.abort(f"{what} for {waited:.0f} s (time limit {times * self.timeout:g} s)")
            if self._collecting:
                self._beat()
            time.sleep(next((nap for until, nap in _NAPS if waited < until), _LONGEST_NAP))

    def _beat(self) -> None:
        """Tell those who wait for this rank that it is alive, every now and then."""
        with self._beat_lock:
            now = time.monotonic()
            if now - self._last_beat < min(self.timeout / 4, 5.0):
                return
            self._last_beat = now
            others = range(1, self.size) if self.rank == 0 else (0,)
            self._beating = [request for request in self._beating if not request.Test()]
            self._beating += [self._comm.Isend([bytearray(1), self._mpi.BYTE], r, _ALIVE) for r in others]

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Signs of life from a thread of their own."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(0.05):
                self._beat()

        thread = threading.Thread(target=beat, name="signs of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def problems_text(answers: Sequence[Mapping[str, Any]]) -> str:
    """The problems of all ranks in one line, equal ones together; empty where there is none."""
    ranks: dict[str, list[int]] = {}
    for rank, answer in enumerate(answers):
        if answer["problem"]:
            ranks.setdefault(str(answer["problem"]), []).append(rank)
    if len(ranks) == 1 and len(next(iter(ranks.values()))) == len(answers):
        return next(iter(ranks))
    return "; ".join(f"{_ranks_text(which, answers)}: {text}" for text, which in ranks.items())


def _ranks_text(ranks: list[int], answers: Sequence[Mapping[str, Any]]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} ({answers[ranks[0]]['host']})"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, MoeExportError) else f"{type(error).__name__}: {text}"


def _bytes(array: Array) -> Any:
    """The memory of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _start_mpi(timeout: float) -> Any:
    """The module ``mpi4py.MPI``, initialised. The start waits for all ranks inside MPI, without Python's
    lock, so that this process can be ended when its time is over."""
    try:
        import mpi4py
    except ModuleNotFoundError as error:
        raise EnvironmentLacksError(
            "running several ranks needs MPI for Python: pip install 'moe-export[mpi]'"
        ) from error
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise EnvironmentLacksError(
            f"mpi4py finds no MPI library here: {error}; pip install 'moe-export[mpi]', or install an MPI"
        ) from error
    if not MPI.Is_initialized():
        launch = launched()
        rank, size = launch.rank, launch.size
        seconds = timeout + LATER[min(rank, len(LATER) - 1)]

        def too_late() -> None:
            print(
                f"error: rank {rank} of {size}: MPI did not start for {seconds:.0f} s (time limit "
                f"{timeout:g} s): another rank does not start, or has ended; all ranks are ended",
                file=sys.__stderr__, flush=True,
            )  # fmt: skip
            # Not os._exit: only of a process that dies by a signal the launcher takes note at this stage.
            os.kill(os.getpid(), signal.SIGKILL)

        timer = threading.Timer(seconds, too_late)
        timer.daemon = True
        timer.start()
        provided = ctypes.c_int()
        # By ctypes, which gives Python's lock away during the call; mpi4py's own call keeps it.
        library = ctypes.CDLL(str(MPI.__file__))
        library.MPI_Init_thread(None, None, ctypes.c_int(MPI.THREAD_MULTIPLE), ctypes.byref(provided))
        timer.cancel()
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise EnvironmentLacksError(
            "this MPI does not allow calls of several threads (MPI_THREAD_MULTIPLE); the one of "
            "pip install 'moe-export[mpi]' does"
        )
    return MPI
