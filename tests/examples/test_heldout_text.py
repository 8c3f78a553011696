"""The held-out text is real, reproducible, and no part of what the example was trained on."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import heldout_text as source
import pytest
from heldout_text import heldout_text, split_of, stdlib_sources, top_level_name

from moe_export.errors import EnvironmentLacksError, UsageError


def test_splits_are_disjoint_and_both_large() -> None:
    training, held_out = stdlib_sources("training"), stdlib_sources("held-out")
    assert not set(training) & set(held_out)
    assert not {top_level_name(p) for p in training} & {top_level_name(p) for p in held_out}
    assert sum(map(len, training.values())) > 5_000_000
    assert sum(map(len, held_out.values())) > 200_000


def test_no_long_passage_of_the_held_out_text_is_in_the_training_text() -> None:
    training = set("\n".join(stdlib_sources("training").values()).splitlines())
    lines = [line for line in heldout_text(60_000, seed=3).splitlines() if len(line) > 40]
    seen = [line for line in lines if line in training]
    assert len(lines) > 300
    assert len(seen) < 0.03 * len(lines), seen  # a few idioms are common to all Python code


def test_the_same_check_notices_training_text() -> None:
    training = "\n".join(stdlib_sources("training").values())
    lines = set(training.splitlines())
    sample = [line for line in training[:60_000].splitlines() if len(line) > 40]
    assert sum(line in lines for line in sample) == len(sample)


def test_every_held_out_file_is_python_and_unused_by_the_trainer() -> None:
    from train_example import EOS, token_stream

    for name, text in stdlib_sources("held-out").items():
        ast.parse(text, name)
    sources = stdlib_sources("training")
    stream = token_stream(sources)
    assert int((stream == EOS).sum()) == len(sources)
    assert len(stream) == sum(len(t.encode()) for t in sources.values()) + len(sources)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("decimal.py", "_pydecimal.py"),
        ("datetime.py", "_pydatetime.py"),
        ("pathlib.py", "pathlib/_local.py"),
        ("asyncio/events.py", "asyncio/base_events.py"),
    ],
)
def test_a_module_stays_on_its_side_when_a_python_version_moves_it(one: str, other: str) -> None:
    assert top_level_name(one) == top_level_name(other)
    assert split_of(one) == split_of(other)


def test_text_depends_on_seed_only_and_grows_at_its_end() -> None:
    assert heldout_text(5_000, seed=1) == heldout_text(5_000, seed=1)
    assert heldout_text(5_000, seed=1).startswith(heldout_text(700, seed=1))
    assert heldout_text(5_000, seed=1) != heldout_text(5_000, seed=2)
    assert len(heldout_text(5_000)) == 5_000


def test_all_of_it_can_be_had_and_no_more() -> None:
    whole = len("\n".join(stdlib_sources("held-out").values()))
    assert len(heldout_text(whole)) == whole
    for wrong in (0, -1, whole + 1):
        with pytest.raises(UsageError, match=rf"n_chars is {wrong}; expected 1 to {whole}"):
            heldout_text(wrong)


def test_a_python_without_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source.sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(EnvironmentLacksError, match="no held-out source files .* under .*install"):
        heldout_text(10)


def test_command_line(tmp_path: Path) -> None:
    script = str(Path(source.__file__))
    file = tmp_path / "text.txt"
    subprocess.run([sys.executable, script, "--chars", "300", "--seed", "4", "-o", str(file)], check=True)
    assert file.read_text(encoding="utf-8") == heldout_text(300, seed=4)
    wrong = subprocess.run([sys.executable, script, "--chars", "0"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: n_chars is 0")
