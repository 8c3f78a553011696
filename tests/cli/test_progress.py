"""Progress on a terminal, elsewhere, and none."""

from __future__ import annotations

import io

import pytest

from moe_export.cli.progress import console_progress
from moe_export.progress import Progress


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _work(progress: Progress) -> None:
    with progress.stage("export the model"), progress.stage("check [hashes]", 10) as advance:
        advance(4)
        progress.note("cache [hit]")
        advance(6)


def test_plain_lines() -> None:
    stream = io.StringIO()
    with console_progress(stream=stream) as progress:
        _work(progress)
    assert stream.getvalue().splitlines() == [
        "export the model ...",
        "check [hashes] ...",
        "note: cache [hit]",
    ]


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = _Terminal()
    with console_progress(stream=stream) as progress:
        _work(progress)
    text = stream.getvalue()
    assert "export the model" in text
    assert "check [hashes]" in text
    assert "note: cache [hit]" in text


def test_quiet() -> None:
    stream = io.StringIO()
    with console_progress(quiet=True, stream=stream) as progress:
        _work(progress)
    assert stream.getvalue() == ""


def test_a_failing_stage_is_not_called_done(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 5.0, 0.0, 5.0))
    monkeypatch.setattr("moe_export.cli.progress.time.monotonic", lambda: next(times))
    stream = io.StringIO()
    with console_progress(stream=stream) as progress:
        with progress.stage("long"):
            pass
        with pytest.raises(ZeroDivisionError), progress.stage("broken"):
            raise ZeroDivisionError
    assert stream.getvalue().splitlines() == ["long ...", "long: done in 5.0 s", "broken ..."]
