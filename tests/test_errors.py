"""The error family: exit codes, and the text for an unknown name."""

from __future__ import annotations

import inspect

import pytest

from moe_export import errors
from moe_export.errors import MoeExportError, choices_text

CODES = {
    "MoeExportError": 2,
    "CheckFailed": 1,
    "UsageError": 2,
    "SourceError": 2,
    "UnsupportedModelError": 2,
    "ExportError": 2,
    "BundleError": 2,
    "InputError": 2,
    "BuildError": 2,
    "EnvironmentLacksError": 3,
}


def test_every_error_has_its_exit_code() -> None:
    found = {
        name: cls.exit_code
        for name, cls in vars(errors).items()
        if inspect.isclass(cls) and issubclass(cls, MoeExportError)
    }
    assert found == CODES


def test_who_is_caught_with_whom() -> None:
    assert issubclass(errors.UnsupportedModelError, errors.SourceError)
    assert issubclass(errors.SourceError, errors.UsageError)
    assert not issubclass(errors.CheckFailed, errors.UsageError)
    assert not issubclass(errors.EnvironmentLacksError, errors.UsageError)


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("mixtrl", ["qwen2_moe", "mixtral"], "nearest: mixtral; choices: mixtral, qwen2_moe"),
        ("zzz", ["b", "a"], "choices: a, b"),
        ("", ["a"], "choices: a"),
        ("x", [], "choices: "),
        ("float3", ("float32", "float16"), "nearest: float32, float16; choices: float16, float32"),
    ],
)
def test_choices_text(name: str, known: list[str], text: str) -> None:
    assert choices_text(name, known) == text
    assert choices_text(name, iter(known)) == text
