"""``python -m moe_export``: the same as the ``moe-export`` command."""

from __future__ import annotations

from moe_export.cli.main import run

if __name__ == "__main__":
    run()
