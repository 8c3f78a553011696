"""For all tests: signals have their usual meaning, also where the suite was started in the background."""

from __future__ import annotations

import signal

# A job that a shell starts in the background, or that nohup starts, ignores these, and so would the processes
# that tests start and interrupt.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)
