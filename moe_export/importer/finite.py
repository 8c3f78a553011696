"""Finding NaN and infinite weights in safetensors files: one pass, block by block, on the bit patterns."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_export.errors import SourceError
from moe_export.importer.safetensors_header import HeaderEntry
from moe_export.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BLOCK_BYTES = 4 << 20
_MOST_NAMED = 3


@dataclass(frozen=True)
class _Bits:
    """How a dtype writes non-finite numbers: element type, the exponent's bits, and single patterns.

    A number is infinite when its exponent bits are all set and the others but the sign are zero, NaN when the
    exponent bits are all set and another is; or its pattern is one of ``nan``.
    """

    element: str
    exponent: int = 0
    nan: tuple[int, ...] = ()


_FORMATS: dict[str, _Bits] = {
    "F64": _Bits("<u8", 0x7FF0_0000_0000_0000),
    "F32": _Bits("<u4", 0x7F80_0000),
    "C64": _Bits("<u4", 0x7F80_0000),
    "F16": _Bits("<u2", 0x7C00),
    "BF16": _Bits("<u2", 0x7F80),
    "F8_E5M2": _Bits("u1", 0x7C),
    "F8_E4M3": _Bits("u1", nan=(0x7F, 0xFF)),
    "F8_E4M3FNUZ": _Bits("u1", nan=(0x80,)),
    "F8_E5M2FNUZ": _Bits("u1", nan=(0x80,)),
    "F8_E8M0": _Bits("u1", nan=(0xFF,)),
}
"""Float dtypes that can hold NaN or infinity; the 4- and 6-bit floats cannot."""


@dataclass
class _Fault:
    nan: int = 0
    infinite: int = 0
    first: int | None = None


def check_finite_tensors(places: Mapping[str, tuple[Path, HeaderEntry]], progress: Progress) -> None:
    """Read each float tensor once. ``places``: tensor name → its file and where it lies there.

    Raises:
        SourceError: names up to three tensors with how many NaN and infinite values and the first coordinate.
    """
    floats = {name: place for name, place in places.items() if place[1].dtype in _FORMATS}
    faults: dict[str, _Fault] = {}
    with progress.stage("check weights", sum(entry.nbytes for _, entry in floats.values())) as advance:
        for name, (path, entry) in sorted(floats.items(), key=lambda item: (item[1][0], item[1][1].begin)):
            try:
                fault = _scan(path, entry, advance)
            except OSError as error:
                raise SourceError(f"{path} cannot be read: {error.strerror}") from error
            if fault.first is not None:
                faults[name] = fault
    if not faults:
        return
    texts = []
    for name, fault in list(faults.items())[:_MOST_NAMED]:
        path, entry = floats[name]
        counts = [f"{n} {what}" for n, what in ((fault.nan, "NaN"), (fault.infinite, "infinite")) if n]
        where = list(_coordinate(fault.first or 0, entry))
        texts.append(
            f"tensor {name!r} in {path} has {' and '.join(counts)} of its values, the first at {where}"
        )
    more = f"; and {len(faults) - _MOST_NAMED} more tensors" if len(faults) > _MOST_NAMED else ""
    raise SourceError(f"{'; '.join(texts)}{more}; such weights give wrong output, take a sound checkpoint")


def _scan(path: Path, entry: HeaderEntry, advance: Any) -> _Fault:
    import numpy as np

    bits = _FORMATS[entry.dtype]
    buffer = np.empty(min(_BLOCK_BYTES, entry.nbytes), np.uint8)
    fault = _Fault()
    done = 0
    with path.open("rb", buffering=0) as stream:
        stream.seek(entry.begin)
        while done < entry.nbytes:
            hole = _hole(stream, entry.begin + done, entry.begin + entry.nbytes)
            if hole:  # zeros that were never written
                hole -= hole % np.dtype(bits.element).itemsize
            if hole >= _BLOCK_BYTES:
                done += hole
                advance(hole)
                stream.seek(entry.begin + done)
                continue
            block = buffer[: min(_BLOCK_BYTES, entry.nbytes - done)]
            _fill(stream, block, path)
            values = block.view(bits.element)
            _count(values, bits, done // values.itemsize, fault)
            done += block.size
            advance(block.size)
    return fault


def _hole(stream: Any, begin: int, end: int) -> int:
    """How many bytes from ``begin`` on lie in a hole of a sparse file. Leaves the stream at ``begin``."""
    seek_data = getattr(os, "SEEK_DATA", None)
    if seek_data is None:
        return 0
    try:
        found = stream.seek(begin, seek_data)
    except OSError as error:  # ENXIO: no data up to the end of the file; others: no such thing here
        found = end if error.errno == errno.ENXIO else begin
    stream.seek(begin)
    return max(0, min(int(found), end) - begin)


def _fill(stream: Any, block: NDArray[np.uint8], path: Path) -> None:
    view = memoryview(block.data)
    while view:
        count = stream.readinto(view)
        if not count:
            raise SourceError(f"{path} became shorter while it was read")
        view = view[count:]


def _count(values: NDArray[Any], bits: _Bits, start: int, fault: _Fault) -> None:
    """Add what one block holds. The usual block needs its largest value without signs."""
    import numpy as np

    kind = values.dtype.type
    if bits.exponent:
        # The exponent is the highest but the sign: a number with all of it set is larger than any other.
        if (values & kind((1 << (8 * values.itemsize - 1)) - 1)).max(initial=0) < bits.exponent:
            return
        bad = (values & kind(bits.exponent)) == kind(bits.exponent)
    else:
        bad = np.isin(values, np.array(bits.nan, values.dtype))
    where = np.flatnonzero(bad)
    if not where.size:
        return
    if fault.first is None:
        fault.first = start + int(where[0])
    found = values[where]
    sign = 1 << (8 * values.itemsize - 1)
    infinite = (
        (found & kind(sign - 1)) == kind(bits.exponent) if bits.exponent else np.zeros(found.shape, bool)
    )
    fault.infinite += int(infinite.sum())
    fault.nan += int(found.size - infinite.sum())


def _coordinate(flat: int, entry: HeaderEntry) -> tuple[int, ...]:
    if entry.dtype == "C64":
        flat //= 2
    result = []
    for size in reversed(entry.shape):
        flat, index = divmod(flat, size)
        result.append(index)
    return tuple(reversed(result))
