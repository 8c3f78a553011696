"""The calling convention itself: expressions, shapes, limits, PTX parameters, Triton's signatures."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moe_export_plugins.gpu as package
import pytest
from moe_export_plugins.gpu import ptx
from moe_export_plugins.gpu.constexprs import constexprs
from moe_export_plugins.gpu.contract import CONTRACTS, LIMITS, contract
from moe_export_plugins.gpu.expressions import evaluate
from moe_export_plugins.gpu.sm import SMS, find_sm

from moe_export.costs.tiles import KERNELS, Tile, tiles
from moe_export.errors import CheckFailed, UsageError
from moe_export.ops.expert_mlp import EXPERT_MLP
from moe_export.ops.router import ROUTER

from . import kernel_cases

FOLDER = Path(next(iter(package.__path__)))
SIZES: dict[str, Any] = {"num_experts": 6, "top_k": 2, "hidden": 48, "inner": 40}


def complete(name: str, **more: Any) -> dict[str, Any]:
    names = {a.name for a in CONTRACTS[name].constants}
    return CONTRACTS[name].complete({k: v for k, v in {**SIZES, **more}.items() if k in names})


def test_limits_of_error_are_those_promised() -> None:
    assert LIMITS == kernel_cases.LIMITS


@pytest.mark.parametrize(
    ("text", "value"),
    [("T * K", 15), ("max(1, cdiv(T, 4))", 2), ("(T - K) // K", 0), ("min(T, 3) + 2 * K", 9), ("7", 7)],
)
def test_expressions(text: str, value: int) -> None:
    assert evaluate(text, {"T": 5, "K": 3}) == value


@dataclass(frozen=True)
class Symbol:
    """As TensorRT's: takes ints on the right only."""

    text: str

    def __add__(self, other: Any) -> Symbol:
        return Symbol(f"({self.text} + {getattr(other, 'text', other)})")

    def __sub__(self, other: Any) -> Symbol:
        return Symbol(f"({self.text} - {getattr(other, 'text', other)})")

    def __mul__(self, other: Any) -> Symbol:
        return Symbol(f"({self.text} * {getattr(other, 'text', other)})")

    def __floordiv__(self, other: Any) -> Symbol:
        return Symbol(f"({self.text} // {getattr(other, 'text', other)})")


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
def test_symbolic_dimensions_give_the_same_numbers(name: str, tokens: int) -> None:
    def two(word: str) -> Any:
        return lambda a, b: Symbol(f"{word}({getattr(a, 'text', a)}, {getattr(b, 'text', b)})")

    rules, constants, tile = CONTRACTS[name], complete(name), Tile(16, 32, 32)
    functions = {"cdiv": two("cdiv"), "maximum": two("max"), "minimum": two("min")}
    symbolic = rules.symbols(constants, tile, Symbol("T"), **functions)
    launch = rules.launch(constants, tile, tokens)
    texts = [*rules.grid, *(s.value for s in rules.scalars)]
    for text, number in zip(texts, [*launch.grid, *launch.scalars], strict=True):
        made = evaluate(text, symbolic, **functions)
        plain = made.text if isinstance(made, Symbol) else str(made)
        scope = {"T": tokens, "cdiv": lambda a, b: -(-a // b), "max": max, "min": min}
        assert eval(plain, scope) == number


@pytest.mark.parametrize(
    "text", ["T.real", "f(T, 1)", "T / 2", "T ** 2", "max(1, 2, 3)", "'a'", "3 // T", "1.5"]
)
def test_what_an_expression_may_not_hold(text: str) -> None:
    with pytest.raises(UsageError, match="expression"):
        evaluate(text, {"T": Symbol("T")})
    with pytest.raises(UsageError, match="unknown symbol 'Q'"):
        evaluate("Q", {"T": 1})


@pytest.mark.parametrize("name", KERNELS)
def test_no_grid_is_empty_and_scratch_has_a_block(name: str) -> None:
    for tokens in (0, 1, 1000):
        launch = CONTRACTS[name].launch(complete(name), tiles(name, "float16")[0], tokens)
        assert min(launch.grid) >= 1 and launch.threads % 32 == 0
        for tensor, shape in zip(CONTRACTS[name].outputs, launch.output_shapes, strict=True):
            assert min(shape) >= 1 or (tokens == 0 and tensor.shape[0] in ("T", "M"))


@pytest.mark.parametrize("name", KERNELS)
def test_triton_functions_have_the_contract_s_parameters(name: str) -> None:
    """Read from the source: this process does not import Triton."""
    tree = ast.parse((FOLDER / "kernels" / f"{name}.py").read_text(encoding="utf-8"))
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    pointers = [a.arg for a in function.args.args if "constexpr" not in ast.unparse(a.annotation or a)]
    rules = CONTRACTS[name]
    wanted = [
        *(t.name for t in rules.inputs),
        *(s.name for s in rules.scalars),
        *(t.name for t in rules.outputs),
    ]
    assert pointers == wanted
    compiled_in = {a.arg for a in function.args.args} - set(pointers)
    assert compiled_in == set(constexprs(name, complete(name), "float16", tiles(name, "float16")[0]))


def test_every_attribute_of_the_ops_is_a_constant_or_refused() -> None:
    router = {a.name for a in CONTRACTS["router"].constants}
    assert {a.name for a in ROUTER.attributes} - router == {"capacity", "layer"}
    gate_up = {a.name for a in CONTRACTS["gate_up"].constants}
    assert {a.name for a in EXPERT_MLP.attributes} - gate_up == {"packed", "layer"}


def test_limits() -> None:
    with pytest.raises(UsageError, match="num_experts is 2000; expected at most 1024"):
        complete("dispatch", num_experts=2000)
    with pytest.raises(UsageError, match="clamped_swiglu needs gated 1"):
        complete("gate_up", activation="clamped_swiglu", gated=0)
    with pytest.raises(
        UsageError, match="hidden 32768 x inner 32768; expected fewer than 2147483648 numbers"
    ):
        complete("gate_up", hidden=2**15, inner=2**15)
    complete("down", hidden=2**15, inner=2**15)
    with pytest.raises(UsageError, match="constant 'inner' is required"):
        CONTRACTS["down"].complete({"num_experts": 2, "top_k": 1, "hidden": 8})
    with pytest.raises(UsageError, match="top_k: expected int, got 2.0"):
        complete("dispatch", top_k=2.0)
    with pytest.raises(UsageError, match="expected fewer than 1073741824 assignments"):
        CONTRACTS["dispatch"].launch(complete("dispatch"), Tile(16, 64), 2**30)
    with pytest.raises(UsageError, match="no GPU kernel 'gateup'; nearest: gate_up"):
        contract("gateup")


def test_sm_names() -> None:
    for name in (90, "90", "90a", "sm_90a", "SM90", "9.0"):
        assert find_sm(name) is SMS["sm_90a"]
    assert find_sm("100") is SMS["sm_100a"]
    with pytest.raises(UsageError, match="no GPU kernels for SM '70'"):
        find_sm("70")


def test_occupancy() -> None:
    """By registers: 255 per thread, 8 warps: 65536 / (8 * 8192) = 1 block of 8 of 64 warps."""
    assert SMS["sm_80"].occupancy(255, 0, 8) == 8 / 64
    assert SMS["sm_80"].occupancy(32, 0, 4) == 1.0
    assert SMS["sm_89"].occupancy(32, 48 * 1024, 4) == 2 * 4 / 48


PTX = """.version 8.0
.visible .entry down(
	.param .u64 .ptr .global .align 1 down_param_0,
	.param .u32 down_param_1,
	.param .u64 .ptr .global .align 1 down_param_2,
	.param .u64 .ptr .global .align 1 down_param_3
)
.reqntid 128
{
	ld.param.b64 %rd1, [down_param_0];
	ld.param.b32 %r1, [down_param_1];
}
"""


def test_hidden_parameters_are_stripped_and_refused_when_used() -> None:
    assert ptx.parameters(PTX) == ("pointer", "int32", "pointer", "pointer")
    text = ptx.strip_hidden(PTX, 2)
    assert ptx.parameters(text) == ("pointer", "int32") and "param_2" not in text
    with pytest.raises(CheckFailed, match="kernel down uses the hidden parameter down_param_1"):
        ptx.strip_hidden(PTX, 1)
    with pytest.raises(CheckFailed, match="has 4 parameters in PTX; its contract has 5"):
        ptx.strip_hidden(PTX, 5)
    with pytest.raises(CheckFailed, match="2 kernels; expected 1"):
        ptx.parameters(PTX + PTX)


def test_renaming() -> None:
    text = ptx.rename(PTX, "moe_down_1")
    assert (
        ".entry moe_down_1(" in text
        and "[moe_down_1_param_1]" in text
        and "down_param" not in text.replace("moe_down_1_param", "")
    )
    assert ptx.parameters(text) == ptx.parameters(PTX)


def test_only_workers_import_triton() -> None:
    code = (
        "import sys, moe_export_plugins.gpu.compile, moe_export_plugins.gpu.interpret, "
        "moe_export_plugins.gpu.chain, moe_export_plugins.gpu.matrix; "
        "print([m for m in ('triton', 'torch', 'onnx', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
