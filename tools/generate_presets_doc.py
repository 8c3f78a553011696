"""Writes docs/presets.md from presets and GPUs: python tools/generate_presets_doc.py [--check]."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from doc_page import ROOT, write_or_check

from moe_export.costs import FORMATS, GPUS
from moe_export.inspect.presets import RULES, Preset, presets
from moe_export.inspect.summary import COUNTING_RULE

PAGE = ROOT / "docs" / "presets.md"

HEAD = f"""\
# Presets and GPUs

Written by `tools/generate_presets_doc.py` from `moe_export/inspect/presets/` and `moe_export/costs/`; a test
fails when it is stale. `moe-export inspect NAME` and `moe-export plan NAME` take these names; case, dots and
underscores do not matter. What the numbers are for: [planning.md](planning.md).

## Models

Counted from each model's public config, without its weights.
{COUNTING_RULE[0].upper()}{COUNTING_RULE[1:]}.
Tests compare every count with the model's class in transformers, built without memory.

"""

FIGURES = """
## Against published figures

Publishers count by different rules. Each figure is compared by the rule that it follows; "ours" is this
project's count by the same rule. A test requires 1 %, or the figure's own rounding where its note says so.

| model | what | published | ours | counting rule | source | note |
|---|---|---|---|---|---|---|
"""

GPU_HEAD = """
## GPUs

From data sheets. Peaks are dense, with float32 accumulation where a sheet tells both; link and network are
one direction per GPU. GB are 10^9 bytes.

| name | GPU | memory | GB/s | TFLOPS float32 | 16 bits | float8 | link GB/s | network GB/s | source | note |
|---|---|---|---|---|---|---|---|---|---|---|
"""

FORMAT_HEAD = """
## Weight formats

| name | bits per weight | multiplied in | what |
|---|---|---|---|
"""


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD, "\n".join(_models()), "\n", FIGURES, "\n".join(_figures()), "\n"]
    parts += [GPU_HEAD, "\n".join(_gpus()), "\n", FORMAT_HEAD, "\n".join(_formats()), "\n"]
    return "".join(parts)


def _models() -> Iterator[str]:
    yield "| name | total | active | experts | MoE layers | cache per token | published as | config | note |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for preset in presets().values():
        arch = preset.architecture
        total, active = (sum(c.values()) / 1e9 for c in (arch.parameters(), arch.active_parameters()))
        experts = sorted({(moe.top_k, moe.experts) for moe in arch.moe_layers})
        chosen = f"{experts[0][0]} of {experts[0][1]}" if experts else "dense"
        cells = (
            f"`{preset.name}`",
            f"{total:.3f} B",
            f"{active:.3f} B",
            chosen,
            f"{len(arch.moe_layers)} of {len(arch.layers)}",
            _cache(preset),
            preset.weights,
            f"[{preset.title}]({preset.source})",
            " ".join(preset.notes),
        )
        yield f"| {' | '.join(cells)} |"


def _cache(preset: Preset) -> str:
    """Bytes per token in bfloat16 while no window is full."""
    arch = preset.architecture
    fixed = sum(block.state for layer in arch.decoder for block in layer.attentions)
    text = f"{2 * (arch.cache_elements(1) - fixed) / 1e3:.1f} kB"
    return f"{text} and {2 * fixed / 1e6:.1f} MB per sequence" if fixed else text


def _figures() -> Iterator[str]:
    for preset in presets().values():
        for figure in preset.published:
            cells = (
                f"`{preset.name}`",
                figure.count,
                figure.text,
                f"{figure.ours(preset.architecture):.3f} B",
                RULES[figure.rule],
                f"<{figure.source}>",
                figure.note,
            )
            yield f"| {' | '.join(cells)} |"


def _gpus() -> Iterator[str]:
    for gpu in GPUS.values():
        peaks = [
            f"{gpu.peaks[name] / 1e12:g}" if name in gpu.peaks else "none"
            for name in ("float32", "bfloat16", "float8")
        ]
        numbers = (f"{value / 1e9:g}" for value in (gpu.link, gpu.network))
        cells = (
            f"`{gpu.name}`", gpu.title, f"{gpu.memory / 1e9:g} GB", f"{gpu.bandwidth / 1e9:g}", *peaks,
            *numbers, gpu.source, gpu.note,
        )  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _formats() -> Iterator[str]:
    for fmt in FORMATS.values():
        yield f"| `{fmt.name}` | {fmt.bits:.5g} | {fmt.compute} | {fmt.about} |"


def main() -> int:
    """Write the page, or with ``--check`` tell whether it is fresh."""
    return write_or_check(PAGE, page, __file__)


if __name__ == "__main__":
    sys.exit(main())
