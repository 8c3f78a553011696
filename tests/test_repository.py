"""Rules about the files of the repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 400

# Written in pieces, so that this file is not a finding itself.
MACHINE_PATHS = re.compile(
    "|".join(["/wor" + "k/", "/ro" + "ot/", "/ho" + "me/[a-z]+/", r"/tm" + r"p/[a-z]"])
)
REGISTRY_HOSTS = re.compile(
    "|".join([r"pypi" + r"\.org", r"pythonhosted" + r"\.org", r"registry\.npmjs", r"deb\.debian"])
)


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_modules_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in tracked("moe_export/*.py", "tools/*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES
    }
    assert long == {}


@pytest.mark.parametrize("pattern", [MACHINE_PATHS, REGISTRY_HOSTS], ids=["machine paths", "registry hosts"])
def test_no_names_of_one_machine(pattern: re.Pattern[str]) -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
            for number, line in enumerate(text.splitlines(), 1)
            if pattern.search(line)
        ]
    assert found == []


def test_the_patterns_find_what_they_forbid() -> None:
    assert MACHINE_PATHS.search("see /wor" + "k/main")
    assert MACHINE_PATHS.search("/ho" + "me/ann/x")
    assert REGISTRY_HOSTS.search("https://files.pythonhosted" + ".org/x")
    assert not MACHINE_PATHS.search("docs/homework/x")


def test_no_open_ends() -> None:
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked("*.py", "*.md", "*.toml", "Makefile")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if words.search(line)
    ]
    assert found == []


def broken_links(path: Path, text: str) -> list[str]:
    """Relative link targets in Markdown ``text`` (of the file ``path``) that do not exist."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose)
    return [
        t
        for t in targets
        if "://" not in t and not t.startswith("mailto:") and not (path.parent / t).exists()
    ]


def test_links_between_pages_lead_somewhere() -> None:
    found = {
        str(path.relative_to(ROOT)): broken
        for path in tracked("*.md")
        if (broken := broken_links(path, path.read_text(encoding="utf-8")))
    }
    assert found == {}
    assert broken_links(ROOT / "README.md", "see [this](docs/no-such-page.md#part)") == [
        "docs/no-such-page.md"
    ]


def test_packaged_data_files_are_in_the_package() -> None:
    """Data that the code reads at run time is found beside it, from a checkout and from a wheel alike."""
    assert (ROOT / "moe_export" / "py.typed").is_file()
    import moe_export

    assert Path(moe_export.__file__).parent == ROOT / "moe_export"
