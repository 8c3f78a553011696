"""``moe-export run``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_export.cli.options import IntList, common_options, json_option, quiet_option, read_text
from moe_export.cli.ranks import ranked_command
from moe_export.errors import InputError, UsageError

if TYPE_CHECKING:
    from moe_export.runtime.session import Session


@click.command("run", short_help="Run an engine: text or tensors in and out.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--prompt", help="Text to continue.  [default: stdin]")
@click.option("--prompt-ids", type=IntList(minimum=0), help="Token ids to continue.")
@click.option("--inputs", type=click.Path(path_type=Path), help=".npz with the engine's inputs by name.")
@click.option("--outputs", type=click.Path(path_type=Path), help=".npz to write the outputs to.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Most new tokens."
)
@click.option("--temperature", type=float, help="0 is greedy.  [default: 0; 1 with --top-k or --top-p]")
@click.option("--top-k", type=click.IntRange(1), help="Draw from the K most probable tokens.")
@click.option("--top-p", type=float, help="Draw from the most probable tokens that sum to P.")
@click.option("--stop", multiple=True, help="Text that ends the answer; it is cut off. Repeatable.")
@click.option("--seed", type=click.IntRange(0), help="Seed of the drawing.  [default: random]")
@click.option("--threads", type=click.IntRange(1), help="Threads of the engine.  [default: all cores]")
@click.option("--trust", is_flag=True, help="Skip the check of file hashes.")
@json_option
@quiet_option
@common_options
@ranked_command("bundle")
def command(
    bundle: Path,
    prompt: str | None,
    prompt_ids: tuple[int, ...] | None,
    inputs: Path | None,
    outputs: Path | None,
    threads: int | None,
    trust: bool,
    as_json: bool,
    quiet: bool,
    **generation: Any,
) -> int:
    """Run an engine: a prompt in and text out, or tensors from .npz in and .npz out.

    Of stdin one line end at the very end is left out. Text is printed as it is generated; --json prints
    the whole result at the end instead. Timing goes to stderr.
    """
    from moe_export.runtime.session import load

    if (inputs is None) != (outputs is None):
        raise UsageError("--inputs and --outputs belong together: give both, or neither for text")
    if sum(given is not None for given in (prompt, prompt_ids, inputs)) > 1:
        raise UsageError("--prompt, --prompt-ids and --inputs exclude each other")
    if inputs is not None and outputs is not None:
        feeds = _read_npz(inputs)
        with load(bundle, trust=trust, threads=threads) as session:
            _say_notes(session, quiet)
            _write_npz(outputs, session.run(feeds))
            _say_buckets(session, quiet)
        return 0
    if prompt is None and prompt_ids is None:
        if sys.stdin.isatty():
            raise UsageError("nothing to continue: give --prompt TEXT, text on stdin, or --inputs FILE.npz")
        prompt = read_text("-").removesuffix("\n")
    if generation["temperature"] is None:
        sampled = generation["top_k"] is not None or generation["top_p"] is not None
        generation["temperature"] = 1.0 if sampled else 0.0
    with load(bundle, trust=trust, threads=threads) as session:
        _say_notes(session, quiet)
        _generate(session, prompt_ids or prompt or "", as_json, quiet, generation)
        _say_buckets(session, quiet)
    return 0


def _say_notes(session: Session, quiet: bool) -> None:
    for note in () if quiet else session.notes:
        click.echo(f"note: {note}", err=True)


def _say_buckets(session: Session, quiet: bool) -> None:
    use = None if quiet else session.capacity_use
    if use is not None:
        click.echo(f"buckets of experts: {use.text()}", err=True)


def _generate(
    session: Session, prompt: str | tuple[int, ...], as_json: bool, quiet: bool, options: dict[str, Any]
) -> None:
    import time

    if as_json:
        from moe_export.cli.output import print_json
        from moe_export.schema import to_json

        print_json({"prompt": to_json(prompt), **to_json(session.generate(prompt, **options))})
        return
    began = time.perf_counter()
    first = began
    count, reason = 0, None
    for event in session.stream(prompt, **options):
        count += 1
        first = time.perf_counter() if count == 1 else first
        reason = event.finish_reason
        click.echo(event.text if session.tokenizer else f"{event.token_id} ", nl=False)
        sys.stdout.flush()
    click.echo()
    if not quiet:
        decode = time.perf_counter() - first
        speed = f", then {(count - 1) / decode:.1f} tokens/s" if count > 1 and decode > 0 else ""
        click.echo(
            f"{count} new tokens, the first after {1000 * (first - began):.0f} ms{speed}; ended by: {reason}",
            err=True,
        )


def _read_npz(path: Path) -> dict[str, Any]:
    import zipfile

    import numpy as np

    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise InputError(f"{path}: one array without a name; expected .npz with the inputs by name")
        with arrays:
            return {name: arrays[name] for name in arrays.files}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an .npz file of plain arrays ({error})") from error


def _write_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Write beside ``path`` and rename, so that an interrupted run leaves nothing half-written."""
    import os
    import tempfile

    import numpy as np

    plain = {
        n: a if a.dtype.isbuiltin else a.astype(np.float32) for n, a in arrays.items()
    }  # bfloat16 → float32
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            try:
                np.savez(file, **plain)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UsageError(f"--outputs {path}: cannot be written: {error.strerror}") from error
