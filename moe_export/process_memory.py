"""Memory of this process: its peak, and giving back what is free."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_rss_bytes() -> int | None:
    """Largest resident size of this process so far, or since :func:`reset_peak`.

    On Linux from ``VmHWM``: ``getrusage`` would report the parent's size too, because a new process inherits
    the mark of the process it was forked from.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # Not Linux: fall through to getrusage.
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def reset_peak() -> bool:
    """Forget the peak so far, where the system can; says whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def give_back_memory() -> None:
    """Return memory that was freed to the system, where the C library keeps it (glibc does, after many pieces
    of a model)."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
