"""What an op is: one contract object from which schema, function body, tests and docs are made or checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, choices_text

if TYPE_CHECKING:
    import onnx

DOMAIN = "moe_export"
VERSION = 1

FLOAT_TYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Param:
    """An input or output: shape by symbol (T tokens, E experts, K per token, H hidden, I intermediate,
    M = T*K)."""

    name: str
    shape: tuple[str, ...]
    dtypes: tuple[str, ...]
    doc: str
    optional: bool = False
    count: str = ""
    """Name of the attribute that says how many inputs of this kind there are; empty: one. The last input."""

    def names(self, attributes: Mapping[str, Any]) -> list[str]:
        """Its name, or one for each of them."""
        if not self.count:
            return [self.name]
        return [f"{self.name}_{index}" for index in range(attributes[self.count])]


@dataclass(frozen=True)
class Attribute:
    """An attribute. ``structural``: changes the body, so all nodes of one model must agree on it.

    ``minimum``: the least value of a number.
    """

    name: str
    kind: type[int] | type[float] | type[str]
    doc: str
    default: int | float | str | None = None
    choices: tuple[int | float | str, ...] = ()
    structural: bool = False
    minimum: int | None = None

    def check(self, op: str, value: Any) -> int | float | str:
        """Return ``value`` as the attribute's type.

        Raises:
            UsageError: wrong type, not one of the choices, below the minimum or not finite.
        """
        if self.kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if self.kind is int and isinstance(value, bool):
            value = int(value)
        if not isinstance(value, self.kind):
            raise UsageError(f"{op}.{self.name}: expected {self.kind.__name__}, got {value!r}")
        if self.choices and value not in self.choices:
            raise UsageError(
                f"{op}.{self.name}: unknown value {value!r}; "
                f"{choices_text(str(value), [str(c) for c in self.choices])}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{op}.{self.name}: expected a finite number, got {value!r}")
        if self.minimum is not None and not isinstance(value, str) and value < self.minimum:
            raise UsageError(f"{op}.{self.name}: expected at least {self.minimum}, got {value!r}")
        return value


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed max and RMS error, relative to max |reference| (at least 1), and why."""

    max: float
    rms: float
    reason: str


@dataclass(frozen=True)
class OpContract:
    """One op of the ``moe_export`` domain.

    ``reference`` takes and returns numpy arrays (float64 inside). ``body`` returns the ONNX function body as
    text in ONNX's own syntax for given attributes and opset; it runs in any runtime. None: the op has no
    meaning that standard ops could give it, so only a kernel runs it. ``collective``: the op needs all ranks;
    its reference takes and returns one array per rank. ``tolerance`` is empty where results equal the
    reference. ``conflict`` says why complete attributes do not go together; empty when they do.
    """

    name: str
    summary: str
    inputs: tuple[Param, ...]
    outputs: tuple[Param, ...]
    attributes: tuple[Attribute, ...]
    reference: Callable[..., Any]
    body: Callable[[Mapping[str, Any], int], str] | None
    tolerance: Mapping[str, Tolerance] = field(default_factory=dict)
    source: str = ""
    conflict: Callable[[Mapping[str, Any]], str] = field(default=lambda _attributes: "")
    collective: bool = False

    def __post_init__(self) -> None:
        if self.collective and self.body is not None:
            raise UsageError(f"{self.name}: a collective has no body; it would run without the other ranks")

    def complete(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """All attributes, defaults filled in and values checked.

        Raises:
            UsageError: unknown or missing attribute, a bad value, or values that do not go together.
        """
        known = {a.name: a for a in self.attributes}
        for name in attributes:
            if name not in known:
                raise UsageError(f"{self.name}: unknown attribute {name!r}; {choices_text(name, known)}")
        out: dict[str, Any] = {}
        for name, attribute in known.items():
            value = attributes.get(name, attribute.default)
            if value is None:
                raise UsageError(f"{self.name}: attribute {name!r} is required")
            out[name] = attribute.check(self.name, value)
        if conflict := self.conflict(out):
            raise UsageError(f"{self.name}: {conflict}")
        return out

    def variant(self, attributes: Mapping[str, Any]) -> tuple[Any, ...]:
        """The structural attributes' values: nodes with equal variants share one body."""
        full = self.complete(attributes)
        return tuple(full[a.name] for a in self.attributes if a.structural)

    def function(self, attributes: Mapping[str, Any], opset: int) -> onnx.FunctionProto:
        """The ONNX function: numeric attributes stay references, structural ones are built in.

        Raises:
            UsageError: the op has no body, or the attributes are wrong.
        """
        import onnx.parser

        if self.body is None:
            raise UsageError(f"{self.name} has no ONNX body: only a kernel runs it")
        full = self.complete(attributes)
        names = ", ".join(a.name for a in self.attributes)
        declared = f"<{names}>" if names else ""
        ins = ", ".join(name for p in self.inputs for name in p.names(full))
        outs = ", ".join(p.name for p in self.outputs)
        text = (
            f'<domain: "{DOMAIN}", opset_import: ["" : {opset}, "{DOMAIN}" : {VERSION}]>\n'
            f"{self.name} {declared} ({ins}) => ({outs})\n{{\n{self.body(full, opset)}\n}}"
        )
        function = onnx.parser.parse_function(text)
        function.doc_string = self.summary
        return function


FLOAT_TOLERANCE: dict[str, Tolerance] = {
    "float32": Tolerance(2e-6, 5e-7, "float32 accumulation over H or I up to a few thousand terms"),
    "float16": Tolerance(2e-3, 5e-4, "one rounding to float16 (2^-11) per intermediate"),
    "bfloat16": Tolerance(1.6e-2, 4e-3, "one rounding to bfloat16 (2^-8) per intermediate"),
}
