"""Parameters of the kernel in a PTX text. Two changes to it: hidden ones leave, and the kernel is renamed."""

from __future__ import annotations

import re

from moe_export.errors import CheckFailed

_ENTRY = re.compile(r"\.visible\s+\.entry\s+([A-Za-z_$][\w$]*)\s*\(([^)]*)\)")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)(?:\s+\.ptr[^,]*?)?\s+([A-Za-z_$][\w$]*)\s*$")
_KINDS = {"u64": "pointer", "b64": "pointer", "s32": "int32", "u32": "int32", "b32": "int32"}


def parameters(ptx: str) -> tuple[str, ...]:
    """``pointer`` or ``int32`` (or PTX's own word for anything else) of each kernel parameter, in order.

    Raises:
        CheckFailed: the text has not exactly one kernel.
    """
    return tuple(_KINDS.get(kind, kind) for kind, _ in _entry(ptx)[1])


def strip_hidden(ptx: str, keep: int) -> str:
    """``ptx`` without the parameters after the first ``keep``: Triton appends two pointers to scratch memory,
    which no adapter can fill.

    Raises:
        CheckFailed: fewer parameters than ``keep``, or the kernel uses one of the hidden ones.
    """
    match, found = _entry(ptx)
    if len(found) < keep:
        raise CheckFailed(f"kernel {match[1]} has {len(found)} parameters in PTX; its contract has {keep}")
    kept = match[2].split(",")[:keep]
    head, tail = ptx[: match.start(2)], ptx[match.end(2) :]
    for kind, name in found[keep:]:
        if re.search(rf"{re.escape(name)}\b", tail):
            raise CheckFailed(
                f"kernel {match[1]} uses the hidden parameter {name} (.{kind}), Triton's scratch memory; no "
                "adapter provides it"
            )
    return head + ",".join(kept).rstrip() + "\n" + tail


def rename(ptx: str, name: str) -> str:
    """``ptx`` with its kernel, and its parameters after it, named ``name``."""
    old = re.escape(_entry(ptx)[0][1])
    return re.sub(rf"(?<![\w$.%]){old}(?=_param_\d|\b(?!_))", name, ptx)


def _entry(ptx: str) -> tuple[re.Match[str], list[tuple[str, str]]]:
    entries = list(_ENTRY.finditer(ptx))
    if len(entries) != 1:
        raise CheckFailed(f"PTX text with {len(entries)} kernels; expected 1")
    found = []
    for text in entries[0][2].split(","):
        if text.strip():
            match = _PARAMETER.match(text.strip())
            if match is None:
                raise CheckFailed(f"kernel {entries[0][1]}: cannot read the parameter {text.strip()!r}")
            found.append((match[1], match[2]))
    return entries[0], found
