"""Whether processes that were stopped are gone."""

from __future__ import annotations

import time

import psutil


def has_ended(pid: int, within: float = 5.0) -> bool:
    """Whether the process is gone within that many seconds; an entry that nobody asks for does not count."""
    until = time.monotonic() + within
    while True:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
