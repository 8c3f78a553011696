"""Connects the graphs of expert-parallel CPU ranks: the CPU plugin's AllReduce and AllToAll call the MPI that
mpi4py has loaded.

The plugin links no MPI. It gets a table of that library's function addresses and handles; what they are is in
``plugins/cpu/include/moe_export_exchange.h``.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.errors import EnvironmentLacksError, UsageError

from .plugin import cpu_plugin_path, cpu_plugin_problem

if TYPE_CHECKING:
    from mpi4py import MPI

DEFAULT_TIMEOUT = 60.0
"""Seconds that one exchange waits for the other ranks."""
_VERSION, _UNIT, _STATUS, _REQUEST, _MOST_RANKS = 1, 64, 256, 16, 1024
_INSTALL = "install moe-export with its extra mpi: pip install 'moe-export[mpi]'"
_FUNCTIONS = ("MPI_Iallreduce", "MPI_Ialltoall", "MPI_Test", "MPI_Error_string")


class _Table(ctypes.Structure):
    """MoeExportExchange."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("rank", ctypes.c_int32),
        ("ranks", ctypes.c_int32),
        ("timeout", ctypes.c_double),
        *((name, ctypes.c_size_t) for name in ("communicator", "unit", "float32", "int64", "sum", "max")),
        *((name, ctypes.c_void_p) for name in ("iallreduce", "ialltoall", "test", "error_string")),
        ("error_string_bytes", ctypes.c_int32),
    )


class _OpUse(ctypes.Structure):
    """MoeExportOpUse."""

    _fields_ = (("calls", ctypes.c_uint64), ("bytes", ctypes.c_uint64), ("seconds", ctypes.c_double))


class _Use(ctypes.Structure):
    """MoeExportExchangeUse."""

    _fields_ = (("all_reduce", _OpUse), ("all_to_all", _OpUse), ("failed", ctypes.c_int32))


@dataclass(frozen=True)
class _Connection:
    """What the plugin holds handles of."""

    plugin: ctypes.CDLL
    communicator: MPI.Intracomm
    unit: MPI.Datatype


_connection: _Connection | None = None


def connect_exchange(communicator: MPI.Intracomm, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Let AllReduce and AllToAll in this process's sessions exchange with the other ranks.

    Collective: every rank of ``communicator`` calls it, in the same order relative to other collective calls
    on it. It is duplicated, so nothing else meets the graphs' messages. A connection that was there ends.

    Args:
        communicator: one process per rank of the engine, in the engine's order.
        timeout: seconds that one exchange, or this call, waits for the other ranks.

    After a failed exchange this rank is out of step and exchanges no more until all ranks connect again. MPI
    may not come to an orderly end then (its finalisation waits for all ranks): end with ``Abort``.

    Raises:
        EnvironmentLacksError: no mpi4py, no CPU plugin, an MPI older than 3.0, one that threads may not use,
            or ranks that do not all connect in time.
        UsageError: more ranks than the exchange takes, or a timeout that is no positive number.
    """
    global _connection
    mpi = _mpi()
    plugin = _plugin()
    functions = _functions(mpi)
    if not 0 < timeout < float("inf"):
        raise UsageError(f"the exchange's timeout is {timeout!r}; expected a positive number of seconds")
    if communicator.size > _MOST_RANKS:
        raise UsageError(f"{communicator.size} ranks; the exchange takes up to {_MOST_RANKS}")
    disconnect_exchange()
    own = _duplicate(communicator, timeout)
    own.Set_errhandler(mpi.ERRORS_RETURN)
    unit = mpi.BYTE.Create_contiguous(_UNIT).Commit()
    handles = {
        "communicator": own,
        "unit": unit,
        "float32": mpi.FLOAT,
        "int64": mpi.INT64_T,
        "sum": mpi.SUM,
        "max": mpi.MAX,
    }
    table = _Table(
        version=_VERSION,
        rank=own.rank,
        ranks=own.size,
        timeout=timeout,
        error_string_bytes=mpi.MAX_ERROR_STRING,
        **{name: mpi._handleof(handle) % 2**64 for name, handle in handles.items()},
        **functions,
    )
    problem = plugin.MoeExportSetExchange(ctypes.byref(table))
    if problem is not None:
        raise UsageError(f"the CPU plugin refuses the exchange: {problem.decode()}")
    _connection = _Connection(plugin, own, unit)


def disconnect_exchange() -> None:
    """End the connection; nothing happens where there is none. Collective; not while a session runs."""
    global _connection
    if _connection is None:
        return
    ended, _connection = _connection, None
    failed = bool(_use(ended.plugin).failed)
    ended.plugin.MoeExportSetExchange(None)
    # MPI may still work on an exchange that failed.
    if not failed and not _mpi().Is_finalized():
        ended.unit.Free()
        ended.communicator.Free()


def exchange_use() -> dict[str, float]:
    """What this rank exchanged since it connected; empty without a connection.

    ``all_reduce_calls``, ``all_to_all_calls``: exchanges that ended well. ``all_reduce_bytes``: of this
    rank's tensors. ``all_to_all_bytes``: of this rank's blocks for other ranks. Neither counts what MPI and
    the checks add (64 bytes per block, 8 numbers per AllReduce). ``all_reduce_seconds``,
    ``all_to_all_seconds``: in exchanges, waiting for other ranks included. ``failed``: 1 after a failure.
    """
    if _connection is None:
        return {}
    use = _use(_connection.plugin)
    counts: dict[str, float] = {
        f"{op}_{field}": getattr(getattr(use, op), field)
        for op in ("all_reduce", "all_to_all")
        for field in ("calls", "bytes", "seconds")
    }
    return {**counts, "failed": use.failed}


def _use(plugin: ctypes.CDLL) -> _Use:
    use = _Use()
    plugin.MoeExportGetExchangeUse(ctypes.byref(use))
    return use


def _mpi() -> Any:
    """mpi4py's module MPI, initialised so that the thread of a session may call it."""
    try:
        from mpi4py import MPI
    except ModuleNotFoundError as error:
        if error.name != "mpi4py":
            raise
        raise EnvironmentLacksError(f"ranks exchange through MPI; mpi4py is missing; {_INSTALL}") from None
    except (ImportError, RuntimeError) as error:  # mpi4py raises either where it finds no libmpi
        raise EnvironmentLacksError(f"mpi4py finds no MPI ({error}); {_INSTALL}") from error
    if not MPI.Is_initialized() or MPI.Is_finalized():
        raise EnvironmentLacksError("MPI is not initialised, or it has ended; connect between the two")
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise EnvironmentLacksError(
            "MPI was started for one thread only; let mpi4py start it (mpi4py.rc.thread_level 'multiple'), "
            "with an MPI that allows several threads"
        )
    return MPI


def _plugin() -> ctypes.CDLL:
    """The CPU plugin; ONNX Runtime opens the same file, so both see one library."""
    path = cpu_plugin_path()
    if path is None:
        raise EnvironmentLacksError(
            f"ranks exchange in the CPU plugin, which is missing: {cpu_plugin_problem()}"
        )
    try:
        plugin = ctypes.CDLL(str(path))
        plugin.MoeExportSetExchange.restype = ctypes.c_char_p
        plugin.MoeExportSetExchange.argtypes = [ctypes.c_void_p]
        plugin.MoeExportGetExchangeUse.restype = None
        plugin.MoeExportGetExchangeUse.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError) as error:
        raise EnvironmentLacksError(
            f"{path} is no CPU plugin that exchanges between ranks ({error}); install moe-export again"
        ) from error
    return plugin


def _functions(mpi: Any) -> dict[str, int]:
    """Addresses of the MPI functions, by their fields of the table."""
    # A look-up in mpi4py's own module continues in the libraries it was linked with: the MPI it uses.
    module = ctypes.CDLL(mpi.__file__)
    addresses = {}
    for name in _FUNCTIONS:
        try:
            function = getattr(module, name)
        except AttributeError:
            raise EnvironmentLacksError(
                f"the MPI of mpi4py ({Path(mpi.__file__).name}) has no {name}; expected an MPI of version "
                f"3.0 or newer; {_INSTALL}"
            ) from None
        addresses[name.removeprefix("MPI_").lower()] = ctypes.cast(function, ctypes.c_void_p).value or 0
    if mpi._sizeof(mpi.Status) > _STATUS or mpi._sizeof(mpi.Request) > _REQUEST:
        raise EnvironmentLacksError("the MPI of mpi4py has larger handles than the CPU plugin knows")
    return addresses


def _duplicate(communicator: MPI.Intracomm, timeout: float) -> MPI.Intracomm:
    """A communicator of the same ranks.

    Raises:
        EnvironmentLacksError: they did not all ask for it in time.
    """
    own, request = communicator.Idup()
    end = time.monotonic() + timeout
    while not request.Test():
        if time.monotonic() > end:
            raise EnvironmentLacksError(
                f"rank {communicator.rank} of {communicator.size}: the other ranks did not connect within "
                f"{timeout:g} s; one has stopped or is slow"
            )
        time.sleep(0.001)
    return own
