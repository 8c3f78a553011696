"""Imports run one way, only the command line knows Click, and importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "moe_export"

# Every part of the package and what stands above it may import. "base" is what stands below all.
BASE = {
    "digests", "errors", "schema", "progress", "config", "config_checks", "files", "trace", "costs",
    "placement", "sms", "process_memory",
}  # fmt: skip
LAYERS = (
    {"ops"},
    {"graph"},
    {"models", "importer", "passes", "bundle"},
    {"backends"},
    {"runtime"},
    {"verify", "bench", "report", "inspect", "planning", "package"},
    {"api", "evidence", "expert_parallel"},
    {"cli"},
    {"__main__"},
)
# Side by side in one layer, yet strangers to each other.
STRANGERS = {
    ("passes", "models"), ("passes", "importer"), ("models", "passes"), ("importer", "passes"),
    ("bundle", "models"), ("bundle", "importer"), ("bundle", "passes"), ("bundle", "graph"),
}  # fmt: skip
HEAVY = {
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "onnx_ir",
    "matplotlib",
    "jinja2",
    "rich",
}


def height(part: str) -> int:
    if part in BASE:
        return -1
    return next(i for i, layer in enumerate(LAYERS) if part in layer)


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Dotted names that the file imports when it runs; imports for type checking only are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["moe_export", *path.relative_to(PACKAGE).parts[:-1]]
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*module, alias.name]) for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def faults(part: str, names: Iterator[str] | list[str]) -> list[str]:
    found = []
    for name in names:
        pieces = name.split(".")
        if pieces[0] != "moe_export" or len(pieces) < 2 or pieces[1].startswith("__") or pieces[1] == part:
            continue
        if height(pieces[1]) > height(part) or (part, pieces[1]) in STRANGERS:
            found.append(f"{part} imports {name}")
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    assert faults(part_of(path), imports(path)) == []


def test_the_rule_catches_what_it_forbids() -> None:
    assert faults("passes", ["moe_export.backends.base.Backend"])
    assert faults("errors", ["moe_export.ops.OPS"])
    assert faults("passes", ["moe_export.models.FAMILIES"])
    assert not faults("cli", ["moe_export.ops.OPS", "moe_export.errors", "click"])


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_the_command_line_knows_click(path: Path) -> None:
    if part_of(path) not in ("cli", "__main__"):
        assert not [name for name in imports(path) if name.split(".")[0] in ("click", "rich")]


def _python(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["moe_export", "moe_export.cli.main", "moe_export.models.families"])
def test_light_imports_load_nothing_heavy(module: str) -> None:
    loaded = set(_python(f"import sys, {module}; print('\\n'.join(sys.modules))").split())
    assert not HEAVY & loaded


def test_running_needs_no_torch() -> None:
    """An engine runs where neither torch nor transformers is installed."""
    loaded = set(_python("import sys, moe_export.runtime.session; print('\\n'.join(sys.modules))").split())
    assert not {"torch", "transformers"} & loaded


def test_import_is_fast() -> None:
    """Best of several, so that a busy machine does not decide; the bound is the product's promise."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        _python("pass")
        empty = time.perf_counter() - start
        start = time.perf_counter()
        _python("import moe_export")
        times.append(time.perf_counter() - start - empty)
    assert min(times) < 0.3


def test_lazy_names() -> None:
    import moe_export

    assert set(moe_export.__all__) <= set(dir(moe_export))
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = moe_export.nothing_like_this
    for name in moe_export.__all__:
        if name != "__version__":
            assert callable(getattr(moe_export, name))


@pytest.mark.parametrize("first", ["", "import moe_export.verify, moe_export.bench;"])
def test_verify_bench_and_package_are_functions_and_packages(first: str) -> None:
    """Whether the subpackage was imported before must not decide what ``moe_export.verify`` is."""
    script = f"""
{first}
import moe_export
import moe_export.verify.compare
for name in ("verify", "bench", "package"):
    function = name + "_bundle"
    package = getattr(moe_export, name)
    assert callable(package)
    seen = []
    setattr(package, function, lambda *args, **kwargs: seen.append((args, kwargs)))
    package("bundle", seed=3)
    assert seen == [(("bundle",), {{"seed": 3}})], seen
assert moe_export.verify.compare.__name__ == "moe_export.verify.compare"
"""
    _python(script)
