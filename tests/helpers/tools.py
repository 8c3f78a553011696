"""Scripts of ``tools/`` as modules, and what the tests of all page generators have in common."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


@functools.cache
def tool(name: str) -> ModuleType:
    """``tools/<name>.py``, imported once, as a script finds its neighbours."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(TOOLS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


def check_stale_page_is_found(
    generator: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The generator's command writes its page, and its ``--check`` tells a missing or changed one."""
    script, page = f"{generator.__name__}.py", folder / generator.PAGE.name

    def main(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        return generator.main(), capsys.readouterr().err

    stale = f"{page.name} is stale: run python tools/{script}\n"
    monkeypatch.setattr(generator, "PAGE", page)
    assert main("--check") == (1, stale) and not page.exists()
    assert main() == (0, "")
    written = page.read_text(encoding="utf-8")
    assert main("--check") == (0, "")
    page.write_text(written + "stale", encoding="utf-8")
    assert main("--check") == (1, stale) and page.read_text(encoding="utf-8").endswith("stale")
    with pytest.raises(SystemExit) as refused:
        main("--chek2")
    assert refused.value.code == 2
