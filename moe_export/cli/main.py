"""The ``moe-export`` command: finds the subcommand, runs it, turns errors into one line and an exit code.

Exit codes: 0 done, 1 a check failed, 2 wrong use, 3 this machine lacks something, 70 an error of moe-export
itself, 130 interrupted, 141 the reader of the output went away, 143 terminated.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

import click

from moe_export.cli.ranks import refuse_other_command
from moe_export.errors import EnvironmentLacksError, MoeExportError, UsageError, choices_text
from moe_export.runtime.launch import launched

COMMANDS = (
    "build", "export", "verify", "bench", "run", "package", "inspect", "plan", "trace", "list", "doctor",
)  # fmt: skip
"""Subcommands in the order the help shows them; each is ``command`` of ``moe_export.cli.<name>_command``."""

EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_TERMINATED = 143

_EXTRAS = {"transformers": "hf", "tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}


class MainGroup(click.Group):
    """Imports a subcommand's file only when it is needed, and owns what happens on an error."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"moe_export.cli.{cmd_name}_command").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in COMMANDS:
            ctx.fail(f"no command {name!r}; {choices_text(name, COMMANDS)}")
        refusal = refuse_other_command(name)
        if refusal:
            raise UsageError(refusal)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # Python flushes stdout once more at exit; let that go nowhere instead of printing a warning.
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            return EXIT_BROKEN_PIPE
        return result

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        main = super().main

        def call() -> Any:
            name = prog_name or "moe-export"
            return main(words, name, complete_var, False, windows_expand_args=windows_expand_args, **extra)

        if not standalone_mode:
            return call()
        sys.exit(run_guarded(call, debug="--debug" in words))


def run_guarded(call: Callable[[], Any], debug: bool = False) -> int:
    """Run ``call`` and give its exit code. Errors become one ``error: ...`` line on stderr.

    An int that ``call`` returns is the exit code; anything else means 0. ``debug`` prints the traceback too.
    """
    try:
        result = call()
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else None
        hint = f" (see '{where} --help')" if where else ""
        text = error.format_message().rstrip(".")
        return _fail(text[:1].lower() + text[1:] + hint, 2, debug)
    except MoeExportError as error:
        return _fail(str(error), error.exit_code, debug)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted; nothing was written", EXIT_INTERRUPTED, debug, prefix="")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package.startswith("moe_export"):
            return _internal(error, debug)
        extra = _EXTRAS.get(package)
        wanted = f"'moe-export[{extra}]'" if extra else package
        message = f"the Python package {package!r} is not installed: pip install {wanted}"
        return _fail(message, EnvironmentLacksError.exit_code, debug)
    except MemoryError:
        return _fail("out of memory; `moe-export doctor` shows how much there is", 3, debug)
    except OSError as error:
        if error.strerror is None:
            return _internal(error, debug)
        name = f"{error.filename}: " if error.filename else ""
        return _fail(f"{name}{error.strerror}", 2, debug)
    except Exception as error:  # the last resort: a user must not meet a traceback unasked
        return _internal(error, debug)


def _fail(message: str, code: int, debug: bool, prefix: str = "error: ") -> int:
    if debug:
        traceback.print_exc()
    if launched().rank:
        return code  # Rank 0 prints what all ranks have in common; a rank's own failure ends all and is said.
    click.echo(prefix + " ".join(message.splitlines()) if prefix else message, err=True)
    return code


def _internal(error: Exception, debug: bool) -> int:
    hint = "" if debug else "; --debug shows where"
    message = f"{type(error).__name__}: {error} (an error of moe-export itself{hint})"
    return _fail(message, EXIT_INTERNAL, debug)


def _print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        from moe_export import __version__

        click.echo(f"moe-export {__version__}")
        ctx.exit()


@click.group(
    name="moe-export",
    cls=MainGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 1 a check failed, 2 wrong use, 3 this machine lacks something.",
)
@click.option(
    "-V", "--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version,
    help="Print the version and exit.",
)  # fmt: skip
@click.option("--debug", is_flag=True, expose_value=False, help="Print a traceback with an error.")
def cli() -> None:
    """Compile PyTorch mixture-of-experts models into verified ONNX engines.

    `moe-export build SOURCE -o DIR` does it all; the other commands are its parts.
    """


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(EXIT_TERMINATED)


def run() -> None:
    """Entry point of the command. SIGTERM unwinds like Ctrl-C, so that temporary files are removed."""
    signal.signal(signal.SIGTERM, _terminate)
    # transformers draws bars and prints warnings of its own; what matters is raised or noted by moe-export.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if launched().rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    cli()
