"""The Python code of docs/own-modules.md runs, and its adapters describe its blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_export.errors import UnsupportedModelError, UsageError
from moe_export.importer.own_module import module_source
from moe_export.models.adapted import adapted, check_adapters
from moe_export.models.adapters import ADAPTERS, NOT_MOE, MoEBlockSpec
from moe_export.models.moe_patterns import require_adapters

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "own-modules.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
ADAPTED = ("CosineMoE", "SharedMoE", "PreviousTokenMoE", "MoEWithLoss")


@pytest.fixture(scope="module")
def code() -> Iterator[dict[str, Any]]:
    """What the page's blocks define, run in order; those that build an engine are only compiled."""
    adapters, not_moe = dict(ADAPTERS), set(NOT_MOE)
    namespace: dict[str, Any] = {"__name__": "own_modules_page"}
    for block in BLOCKS:
        compiled = compile(block, "docs/own-modules.md", "exec")
        if "moe_export.build(" not in block:
            exec(compiled, namespace)
    yield namespace
    ADAPTERS.clear()
    ADAPTERS.update(adapters)
    NOT_MOE.clear()
    NOT_MOE.update(not_moe)


def block_of(code: dict[str, Any], name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    block = code[name](hidden=16, inner=24, num_experts=6, top_k=2).eval()
    return block, torch.randn(3, 7, 16)


@pytest.mark.parametrize("name", ADAPTED)
def test_each_adapter_computes_what_its_block_does(code: dict[str, Any], name: str) -> None:
    block, x = block_of(code, name)
    require_adapters(block)
    check_adapters(block, lambda: block(x))
    with torch.no_grad():
        want = block(x)
        with adapted(block):
            assert "forward" in block.__dict__
            got = block(x)
        assert "forward" not in block.__dict__
    first_got, first_want = (v[0] if isinstance(v, tuple) else v for v in (got, want))
    assert type(got) is type(want)
    torch.testing.assert_close(first_got, first_want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("CosineMoE", {"gate_proj": "w3", "up_proj": "w1"}),
        ("CosineMoE", {"activation": "gelu"}),
        ("SharedMoE", {"after": None}),
        ("MoEWithLoss", {"output": None}),
    ],
    ids=["gate and up exchanged", "activation", "shared expert forgotten", "second output forgotten"],
)
def test_an_adapter_that_says_something_else_is_refused(
    code: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, Any]
) -> None:
    block, x = block_of(code, name)
    monkeypatch.setitem(ADAPTERS, code[name], replace(ADAPTERS[code[name]], **change))
    with pytest.raises(UsageError, match="the block and its adapter compute different things"):
        check_adapters(block, lambda: block(x))


def test_a_router_over_sequences_needs_flatten_false(
    code: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, x = block_of(code, "PreviousTokenMoE")
    cls = code["PreviousTokenMoE"]
    monkeypatch.setitem(ADAPTERS, cls, replace(ADAPTERS[cls], flatten=True))
    with pytest.raises(RuntimeError, match="size of tensor"):
        check_adapters(block, lambda: block(x))


def test_without_its_own_spec_the_subclass_is_refused(
    code: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, _ = block_of(code, "SharedMoE")
    monkeypatch.delitem(ADAPTERS, code["SharedMoE"])
    with pytest.raises(
        UnsupportedModelError, match="has its own forward, and the adapter is that of its base"
    ):
        require_adapters(block)


def test_the_module_that_is_no_moe_needs_its_entry(
    code: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = code["MixedHeads"](hidden=8, heads=3)
    assert module(torch.randn(2, 8)).shape == (2, 8)
    require_adapters(module)
    monkeypatch.setattr("moe_export.models.moe_patterns.NOT_MOE", set())
    with pytest.raises(UnsupportedModelError, match="looks like a Mixture of Experts"):
        require_adapters(module)


def test_the_page_builds_a_source_that_is_accepted(code: dict[str, Any]) -> None:
    model, inputs, dynamic = code["build"]()
    source = module_source(model, None, inputs, dynamic, None)
    assert source.dynamic == {"frames": {0: "batch", 1: "sequence"}}
    check_adapters(source.module, lambda: source.module(**source.inputs))
    assert set(source.module(**source.inputs)) == {"features"}


def test_every_field_of_the_spec_is_explained() -> None:
    table = "\n".join(line for line in PAGE.splitlines() if line.startswith("| `"))
    for field in fields(MoEBlockSpec):
        assert f"`{field.name}`" in table
