"""The process of one contestant: reads one JSON request per line, answers with one JSON line.

``python -m moe_export.bench.worker SPEC``; SPEC is a JSON object whose ``kind`` names the contestant. What
libraries print goes to stderr, so that it cannot mix with answers.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from ..errors import MoeExportError
from .process import first_line
from .runner import Host, NotPossible


def main(spec_text: str) -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    host: Host | None = None
    for line in sys.stdin:
        try:
            if host is None:
                from .contestants import make_runner

                host = Host(make_runner(json.loads(spec_text)))
            answer = host.handle(json.loads(line))
        except Exception as error:  # Whatever a library raises must reach the parent as an answer.
            answer = _failure(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


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
