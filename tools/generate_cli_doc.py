"""Writes docs/cli.md from the commands themselves: python tools/generate_cli_doc.py [--check]."""

from __future__ import annotations

import inspect
import sys

import click
from doc_page import ROOT, write_or_check

from moe_export.cli.main import COMMANDS, cli

PAGE = ROOT / "docs" / "cli.md"
WIDTH = 100

HEAD = """\
# Command line

Written by `tools/generate_cli_doc.py` from the commands' own help; a test fails when it is stale.

Results go to stdout, progress and errors to stderr. With `--json` stdout holds JSON and nothing else.
Progress is a bar on a terminal and plain lines elsewhere.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a check ran and failed: parity outside the tolerance, a speed-up below the one asked for |
| 2 | wrong use: bad argument, bad configuration, bad input file |
| 3 | this machine lacks something; the message says how to get it |
| 70 | an error of moe-export itself; `--debug` shows where |
| 130 | interrupted with Ctrl-C |
| 141 | the reader of stdout went away |
| 143 | terminated with SIGTERM |

An error is one line, `error: ...`. `--debug`, before or after the command's name, adds the traceback.

## Shell completion

```bash
eval "$(_MOE_EXPORT_COMPLETE=bash_source moe-export)"    # in ~/.bashrc
eval "$(_MOE_EXPORT_COMPLETE=zsh_source moe-export)"     # in ~/.zshrc
_MOE_EXPORT_COMPLETE=fish_source moe-export | source     # in ~/.config/fish/config.fish
```
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    root = click.Context(cli, info_name="moe-export", **cli.context_settings)
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        parts += _sections(command, root, name)
    return "\n".join(parts)


def _sections(command: click.Command, parent: click.Context, name: str) -> list[str]:
    context = click.Context(command, info_name=name, parent=parent)
    usage = command.get_usage(context).removeprefix("Usage: ")
    about = inspect.cleandoc(command.help or "").replace("\b\n", "")
    parts = [f"## `{context.command_path}`", "", f"`{' '.join(usage.split())}`", "", about, ""]
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            assert found is not None
            parts += [
                "#" + line if line.startswith("## ") else line for line in _sections(found, context, child)
            ]
        return parts
    records = [p.get_help_record(context) for p in command.get_params(context)]
    rows = [record for record in records if record is not None and record[1]]
    parts += ["| option | meaning |", "|---|---|"]
    parts += [f"| `{_cell(names)}` | {_cell(text)} |" for names, text in rows]
    return [*parts, ""]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Write the page, or with ``--check`` tell whether it is fresh."""
    return write_or_check(PAGE, page, __file__)


if __name__ == "__main__":
    sys.exit(main())
