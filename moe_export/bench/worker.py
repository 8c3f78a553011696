"""The process of one contestant: reads one JSON request per line, answers with one JSON line.

``python -m moe_export.bench.worker SPEC``; SPEC is a JSON object whose ``kind`` names the contestant. What
libraries print goes to stderr, so that it cannot mix with answers.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import Any

from ..errors import MoeExportError
from .process import first_line
from .runner import Host, NotPossible


def main(spec_text: str) -> None:
    """Serve until stdin ends, that is until the benchmark is gone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    host: Host | None = None
    while True:
        line = requests.get()
        try:
            if host is None:
                from .contestants import make_runner

                host = Host(make_runner(json.loads(spec_text)))
            answer = host.handle(json.loads(line))
        except Exception as error:  # Whatever a library raises must reach the parent as an answer.
            answer = _failure(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _listen(requests: queue.Queue[str]) -> None:
    """Hand over requests. When stdin ends, end the process at once, even in the middle of a compilation."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, NotPossible):
        return {"not_possible": str(error)}
    if isinstance(error, MoeExportError):
        return {"user_error": str(error)}
    import traceback

    traceback.print_exc()
    return {"error": first_line(error)}


if __name__ == "__main__":
    main(sys.argv[1])
