"""The public header of the exchange: plain C, and laid out as Python's table is."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from moe_export.backends.onnxruntime import exchange

HEADER = Path(__file__).resolve().parents[2] / "plugins" / "cpu" / "include" / "moe_export_exchange.h"
STRUCTS = {
    "MoeExportExchange": exchange._Table,
    "MoeExportOpUse": exchange._OpUse,
    "MoeExportExchangeUse": exchange._Use,
}
NUMBERS = {
    "VERSION": exchange._VERSION,
    "UNIT": exchange._UNIT,
    "STATUS": exchange._STATUS,
    "REQUEST": exchange._REQUEST,
    "RANKS": exchange._MOST_RANKS,
}


def layout(struct: type[ctypes.Structure]) -> list[int]:
    """Its size, and where each field begins."""
    return [ctypes.sizeof(struct), *(getattr(struct, name).offset for name, *_ in struct._fields_)]


def test_c_and_python_agree(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    lines = [f'printf("%d\\n", MOE_EXPORT_EXCHANGE_{name});' for name in NUMBERS]
    for name, struct in STRUCTS.items():
        lines.append(f'printf("%d\\n", (int)sizeof({name}));')
        lines += [f'printf("%d\\n", (int)offsetof({name}, {field}));' for field, *_ in struct._fields_]
    body = "\n".join(lines)
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n"
        f'#include "{HEADER}"\nint main(void) {{\n{body}\nreturn 0;\n}}\n',
        encoding="utf-8",
    )
    program = tmp_path / "layout"
    flags = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    shown = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    want = [*NUMBERS.values(), *(number for struct in STRUCTS.values() for number in layout(struct))]
    assert [int(line) for line in shown.split()] == want
