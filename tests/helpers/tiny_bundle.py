"""A complete bundle of the tiny model, written by hand without the exporter, with one known defect or none.

The ONNX graph follows ``docs/architecture.md``: flat KV cache, ``moe.<i>.*`` values, external weights.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from moe_export.schema import (
    FileEntry,
    Limits,
    Manifest,
    ModelIO,
    MoELayer,
    SourceInfo,
    TensorSpec,
    TextInfo,
    to_json,
)
from tests.helpers import tiny_model as tiny
from tests.helpers.tiny_model import TinyLayer, TinyReference, TinyWeights

__all__ = ["BROKEN", "TinyReference", "TinyWeights", "make_tiny_bundle", "write_manifest"]

BROKEN: dict[str, str] = {
    "expert_swapped": "layer 1: experts 0 and 1 have each other's weights",
    "weights_scaled": "layer 0: routing weights are 1.1 times too large",
    "router_bias_dropped": "layer 0: router logits lack the bias",
    "token_dropped": "layer 1: the last token of a run of two or more gets no MoE output; routing is right",
    "no_renormalise": "layer 0: routing weights do not sum to 1",
    "cache_shifted": "layer 0: cached values are read one position off; a run without past is right",
    "rope_offset": "layer 0: queries are rotated as if one position later",
}
"""Every defect :func:`make_tiny_bundle` can build in, and what it does to the graph."""


class GraphBuilder:
    """Collects nodes and constants of an ONNX graph.

    Calling it adds a node and returns its output name(s); an array passed as an input becomes an initialiser.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def constant(self, value: NDArray[Any], name: str | None = None) -> str:
        name = name or f"const.{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def __call__(
        self, op: str, *inputs: Any, out: str | None = None, outputs: int = 1, **attributes: Any
    ) -> Any:
        names = [i if isinstance(i, str) else self.constant(np.asarray(i)) for i in inputs]
        stem = f"v{len(self.nodes)}.{op}"
        results = [out] if out else [f"{stem}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, names, results, name=stem, **attributes))
        return results[0] if len(results) == 1 else results

    def model(self, io: ModelIO) -> onnx.ModelProto:
        """The model with these inputs and outputs, checked."""

        def infos(specs: tuple[TensorSpec, ...]) -> list[onnx.ValueInfoProto]:
            kinds = {"float32": "FLOAT", "float16": "FLOAT16"}
            types = [TensorProto.DataType.Value(kinds.get(s.dtype, s.dtype.upper())) for s in specs]
            return [
                helper.make_tensor_value_info(s.name, t, s.shape) for s, t in zip(specs, types, strict=True)
            ]

        graph = helper.make_graph(self.nodes, "tiny", infos(io.inputs), infos(io.outputs), self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def _ints(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def _rms_norm(g: GraphBuilder, x: str, gain: NDArray[Any]) -> str:
    mean = g("ReduceMean", g("Mul", x, x), _ints(-1), keepdims=1)
    root = g("Sqrt", g("Add", mean, np.float32(tiny.EPSILON)))
    return str(g("Mul", g("Div", x, root), gain))


def _rope_tables(g: GraphBuilder, positions: str) -> tuple[str, str]:
    inverse = tiny.ROPE_BASE ** (-np.arange(0, tiny.HEAD_DIM, 2) / tiny.HEAD_DIM)
    frequencies = np.concatenate([inverse, inverse]).astype(np.float32)
    column = g("Unsqueeze", g("Cast", positions, to=TensorProto.FLOAT), _ints(1, 3))
    angles = g("Mul", column, frequencies)
    return g("Cos", angles), g("Sin", angles)


def _rotate(g: GraphBuilder, x: str, tables: tuple[str, str]) -> str:
    first, second = g("Split", x, axis=-1, num_outputs=2, outputs=2)
    swapped = g("Concat", g("Neg", second), first, axis=-1)
    return str(g("Add", g("Mul", x, tables[0]), g("Mul", swapped, tables[1])))


def _heads(g: GraphBuilder, x: str, projection: NDArray[Any], count: int) -> str:
    shaped = g("Reshape", g("MatMul", x, projection), _ints(0, 0, count, tiny.HEAD_DIM))
    return str(g("Transpose", shaped, perm=[0, 2, 1, 3]))


def _repeat_heads(g: GraphBuilder, x: str) -> str:
    """[B, KV_HEADS, S, D] → [B, HEADS, S, D], each head repeated in place."""
    times = tiny.HEADS // tiny.KV_HEADS
    wide = g("Concat", *[g("Unsqueeze", x, _ints(2))] * times, axis=2)
    shape = g("Shape", x)
    target = g(
        "Concat",
        g("Slice", shape, _ints(0), _ints(1)),
        _ints(tiny.HEADS),
        g("Slice", shape, _ints(2), _ints(4)),
        axis=0,
    )
    return str(g("Reshape", wide, target))


def _attention_bias(g: GraphBuilder) -> str:
    """Additive mask [B, 1, sequence, total]: key j is visible to query i if j ≤ past + i and unmasked."""
    total = g("Squeeze", g("Shape", "attention_mask", start=1, end=2))
    sequence = g("Squeeze", g("Shape", "input_ids", start=1, end=2))
    keys = g("Range", np.int64(0), total, np.int64(1))
    queries = g("Range", g("Sub", total, sequence), total, np.int64(1))
    causal = g("LessOrEqual", keys, g("Unsqueeze", queries, _ints(1)))
    real = g("Unsqueeze", g("Cast", "attention_mask", to=TensorProto.BOOL), _ints(1, 2))
    return str(g("Where", g("And", causal, real), np.float32(0), np.float32(tiny.MASKED)))


def _attention(
    g: GraphBuilder,
    i: int,
    layer: TinyLayer,
    x: str,
    tables: tuple[str, str],
    late: tuple[str, str],
    bias: str,
    broken: Any,
    cache: bool,
) -> str:
    query = _rotate(g, _heads(g, x, layer.query, tiny.HEADS), late if broken == "rope_offset" else tables)
    new_key = _rotate(g, _heads(g, x, layer.key, tiny.KV_HEADS), tables)
    new_value = _heads(g, x, layer.value, tiny.KV_HEADS)
    key, value = new_key, new_value
    if cache:
        key = g("Concat", f"past.{i}.key", new_key, axis=2, out=f"present.{i}.key")
        value = g("Concat", f"past.{i}.value", new_value, axis=2, out=f"present.{i}.value")
    if broken == "cache_shifted":
        past = f"past.{i}.value"
        last = g("Slice", past, _ints(-1), _ints(2**31), _ints(2))
        rest = g("Slice", past, _ints(0), _ints(-1), _ints(2))
        value = g("Concat", last, rest, new_value, axis=2)
    transposed = g("Transpose", _repeat_heads(g, key), perm=[0, 1, 3, 2])
    scores = g("Div", g("MatMul", query, transposed), np.float32(np.sqrt(tiny.HEAD_DIM)))
    shares = g("Softmax", g("Add", scores, bias), axis=-1)
    mixed = g("Transpose", g("MatMul", shares, _repeat_heads(g, value)), perm=[0, 2, 1, 3])
    flat = g("Reshape", mixed, _ints(0, 0, tiny.HEADS * tiny.HEAD_DIM))
    return str(g("MatMul", flat, layer.attention_out))


def _moe(g: GraphBuilder, i: int, layer: TinyLayer, x: str, broken: Any) -> str:
    """Routes over [T, H] and computes every expert densely; an expert id of -1 contributes nothing."""
    hidden = g("Reshape", x, _ints(-1, tiny.HIDDEN), out=f"moe.{i}.hidden")
    scores = g("MatMul", hidden, layer.router)
    bias = np.zeros_like(layer.router_bias) if broken == "router_bias_dropped" else layer.router_bias
    logits = g("Add", scores, bias, out=f"moe.{i}.logits")
    top, ids = g("TopK", g("Softmax", logits, axis=-1), _ints(tiny.TOP_K), axis=-1, outputs=2)
    ids = g("Cast", ids, to=TensorProto.INT32, out=f"moe.{i}.expert_ids")
    divisor = g("ReduceSum", top, _ints(-1), keepdims=1)
    if broken == "no_renormalise":
        divisor = np.float32(1)
    if broken == "weights_scaled":
        divisor = g("Div", divisor, np.float32(1.1))
    weights = g("Div", top, divisor, out=f"moe.{i}.weights")
    order = [1, 0, *range(2, tiny.EXPERTS)] if broken == "expert_swapped" else list(range(tiny.EXPERTS))
    rows = g("Unsqueeze", hidden, _ints(0))
    gate = g("MatMul", rows, layer.gate[order])
    inner = g("Mul", g("Mul", gate, g("Sigmoid", gate)), g("MatMul", rows, layer.up[order]))
    each = g("Transpose", g("MatMul", inner, layer.down[order]), perm=[1, 0, 2])
    chosen = g("Equal", g("Unsqueeze", ids, _ints(2)), np.arange(tiny.EXPERTS, dtype=np.int32))
    dense = g("Mul", g("Cast", chosen, to=TensorProto.FLOAT), g("Unsqueeze", weights, _ints(2)))
    mixed = g("MatMul", g("ReduceSum", dense, _ints(1), keepdims=1), each)
    if broken != "token_dropped":
        return str(g("Squeeze", mixed, _ints(1), out=f"moe.{i}.output"))
    tokens = g("Squeeze", g("Shape", hidden, start=0, end=1))
    row = g("Range", np.int64(0), tokens, np.int64(1))
    kept = g("Or", g("Less", row, g("Sub", tokens, np.int64(1))), g("Equal", tokens, np.int64(1)))
    factor = g("Unsqueeze", g("Cast", kept, to=TensorProto.FLOAT), _ints(1))
    return str(g("Mul", g("Squeeze", mixed, _ints(1)), factor, out=f"moe.{i}.output"))


def tiny_io(cache: bool = True) -> ModelIO:
    """Inputs and outputs of the tiny engine."""
    shape: tuple[int | str, ...] = ("batch", tiny.KV_HEADS, "past", tiny.HEAD_DIM)
    names = [f"{i}.{kind}" for i in range(tiny.LAYERS * cache) for kind in ("key", "value")]
    grown = tuple("total" if d == "past" else d for d in shape)
    return ModelIO(
        inputs=(
            TensorSpec("input_ids", "int64", ("batch", "sequence"), "token_ids"),
            TensorSpec("attention_mask", "int64", ("batch", "total" if cache else "sequence"), "mask"),
            TensorSpec("position_ids", "int64", ("batch", "sequence"), "positions"),
            *(TensorSpec(f"past.{n}", "float32", shape, "cache", f"present.{n}") for n in names),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", "sequence", tiny.VOCAB), "logits"),
            *(TensorSpec(f"present.{n}", "float32", grown, "cache", f"past.{n}") for n in names),
        ),
    )


def _moe_layer(index: int) -> MoELayer:
    return MoELayer(
        index=index,
        name=f"layers.{index}.moe",
        num_experts=tiny.EXPERTS,
        top_k=tiny.TOP_K,
        hidden_size=tiny.HIDDEN,
        intermediate_size=tiny.INTERMEDIATE,
        hidden=f"moe.{index}.hidden",
        expert_ids=f"moe.{index}.expert_ids",
        weights=f"moe.{index}.weights",
        output=f"moe.{index}.output",
        logits=f"moe.{index}.logits",
        router={"top_k": tiny.TOP_K, "score": "softmax", "renormalize": True, "scale": 1.0},
        router_note="softmax, top-k, renormalise",
    )


def build_tiny_model(
    weights: TinyWeights, broken: str | None = None, *, cache: bool = True
) -> onnx.ModelProto:
    """The tiny model as ONNX with its weights inside, with the defect ``broken`` of :data:`BROKEN`.

    Without ``cache`` it has no past inputs and no present outputs.
    """
    if broken is not None and broken not in BROKEN:
        raise ValueError(f"broken={broken!r}; choices: {', '.join(BROKEN)}")
    g = GraphBuilder()
    x = g("Gather", weights.embedding, "input_ids")
    bias = _attention_bias(g)
    tables = _rope_tables(g, "position_ids")
    late = _rope_tables(g, g("Add", "position_ids", np.int64(1)))
    here = {"expert_swapped": 1, "token_dropped": 1}.get(broken or "", 0)
    for i, layer in enumerate(weights.layers):
        defect = broken if i == here else None
        mixed = _attention(
            g, i, layer, _rms_norm(g, x, layer.attention_norm), tables, late, bias, defect, cache
        )
        x = g("Add", x, mixed)
        flat = _moe(g, i, layer, _rms_norm(g, x, layer.moe_norm), defect)
        x = g("Add", x, g("Reshape", flat, g("Shape", x)))
    g("MatMul", _rms_norm(g, x, weights.final_norm), weights.head, out="logits")
    return g.model(tiny_io(cache))


def write_tiny_tokenizer(folder: Path) -> None:
    """``tokenizer.json``: one id per byte, then ``<bos>``, ``<eos>``, ``<pad>``; encoding adds nothing."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<bos>", "<eos>", "<pad>")])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_manifest(bundle: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` with the sizes and hashes of the files that are in ``bundle`` now."""
    paths = sorted(p for p in bundle.rglob("*") if p.is_file() and p.name != "manifest.json")
    entries = tuple(
        FileEntry(
            p.relative_to(bundle).as_posix(), p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()
        )
        for p in paths
    )
    data = to_json(dataclasses.replace(manifest, files=entries))
    (bundle / "manifest.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def make_tiny_bundle(
    dir: Path,
    *,
    broken: str | None = None,
    seed: int = 0,
    max_batch: int | None = 8,
    max_sequence: int | None = 64,
    tokenizer: bool = True,
    cache: bool = True,
) -> Path:
    """Write a bundle of the tiny model into ``dir`` (created, must be empty) and return ``dir``.

    ``broken`` is a key of :data:`BROKEN` or None; the yardstick is ``TinyReference(TinyWeights.make(seed))``.
    """
    dir = Path(dir)
    dir.mkdir(parents=True, exist_ok=True)
    weights = TinyWeights.make(seed)
    model = build_tiny_model(weights, broken, cache=cache)
    onnx.save(
        model,
        str(dir / "model.onnx"),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=1024,
    )
    if tokenizer:
        write_tiny_tokenizer(dir / "tokenizer")
    total = weights.count()
    idle = tiny.LAYERS * (tiny.EXPERTS - tiny.TOP_K) * 3 * tiny.HIDDEN * tiny.INTERMEDIATE
    embeddings = tiny.VOCAB * tiny.HIDDEN
    source_hash = hashlib.sha256(b"tiny%d" % seed).hexdigest()
    write_manifest(
        dir,
        Manifest(
            source=SourceInfo("module", None, "tiny", "TinyReference", source_hash),
            task="text-generation",
            target="onnxruntime",
            dtype="float32",
            opset=20,
            io=tiny_io(cache),
            limits=Limits(max_batch, max_sequence),
            moe_layers=tuple(_moe_layer(i) for i in range(tiny.LAYERS)),
            text=TextInfo(
                vocab_size=tiny.VOCAB,
                eos_token_ids=(tiny.EOS,),
                bos_token_id=tiny.BOS,
                pad_token_id=tiny.PAD,
                tokenizer="tokenizer" if tokenizer else None,
            ),
            parameters={
                "total": total,
                "active": total - idle,
                "active_without_embeddings": total - idle - embeddings,
            },
        ),
    )
    return dir
