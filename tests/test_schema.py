"""The schema's JSON: every manifest survives the way there and back, every broken one is a ValueError."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_export.bundle.manifest import MANIFEST_NAME, read_manifest, write_manifest
from moe_export.errors import BundleError
from moe_export.schema import (
    DTYPES,
    TASKS,
    Alternative,
    Decision,
    FileEntry,
    Limits,
    Manifest,
    ModelIO,
    MoELayer,
    SourceInfo,
    TensorSpec,
    TextInfo,
    from_json,
    to_json,
)

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
COUNTS = st.integers(1, 2**40)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=5), ANY_JSON, max_size=3)
MEASURED = st.dictionaries(st.text(max_size=5), NUMBERS, max_size=2)


def some(items: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(items, max_size=2).map(tuple)


SPECS = st.builds(
    TensorSpec,
    name=st.text(),
    dtype=st.sampled_from(["float32", "int64"]),
    shape=some(st.integers(0, 2**40) | st.text()),
    role=st.text(max_size=5),
    pair=st.none() | st.text(max_size=5),
)
ALTERNATIVES = st.builds(Alternative, st.text(), st.text(), MEASURED)
MANIFESTS = st.builds(
    Manifest,
    source=st.builds(
        SourceInfo,
        kind=st.sampled_from(["huggingface", "module"]),
        path=st.none() | st.text(),
        model_type=st.text(),
        class_name=st.text(),
        hash=st.text(),
    ),
    task=st.sampled_from(TASKS),
    target=st.text(),
    dtype=st.sampled_from(DTYPES),
    opset=st.integers(),
    io=st.builds(ModelIO, some(SPECS), some(SPECS)),
    limits=st.builds(Limits, st.none() | COUNTS, st.none() | COUNTS),
    moe_layers=some(
        st.builds(
            MoELayer,
            **{
                n: st.integers()
                for n in ("index", "num_experts", "top_k", "hidden_size", "intermediate_size")
            },
            **{n: st.text() for n in ("name", "hidden", "expert_ids", "weights", "output", "router_note")},
            logits=st.none() | st.text(),
            router=st.none() | OBJECTS,
        )
    ),
    decisions=some(st.builds(Decision, st.text(), st.text(), st.text(), some(ALTERNATIVES), MEASURED)),
    notes=some(st.text()),
    text=st.none()
    | st.builds(TextInfo, vocab_size=st.integers(), eos_token_ids=some(st.integers()), tokenizer=st.none()),
    parameters=st.dictionaries(st.text(), st.integers(), max_size=3),
    files=some(st.builds(FileEntry, st.text(), st.integers(), st.text())),
    tools=st.dictionaries(st.text(), st.text(), max_size=3),
    evidence=OBJECTS,
    created=st.text(),
)


@given(manifest=MANIFESTS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_manifest_survives_json(manifest: Manifest) -> None:
    text = json.dumps(to_json(manifest), allow_nan=False)
    assert from_json(Manifest, json.loads(text)) == manifest


@given(manifest=MANIFESTS)
@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
def test_every_manifest_survives_the_file_or_is_refused(tmp_path: Path, manifest: Manifest) -> None:
    manifest = dataclasses.replace(manifest, files=(FileEntry("model.onnx", 1, "0" * 64),))
    write_manifest(tmp_path, manifest)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]
    try:
        assert read_manifest(tmp_path) == manifest
    except BundleError as error:
        assert "is listed twice" in str(error)  # tensor names drawn equal


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in items for place in _places(item, (*at, key)))]


@given(manifest=MANIFESTS, data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_broken_json_is_a_value_error_or_another_manifest(manifest: Manifest, data: st.DataObject) -> None:
    value = json.loads(json.dumps(to_json(manifest)))
    place = data.draw(st.sampled_from(_places(value)[1:]))
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()):
        del holder[place[-1]]
    else:
        holder[place[-1]] = data.draw(ANY_JSON)
    before = copy.deepcopy(value)
    try:
        result = from_json(Manifest, value)
    except ValueError as error:
        assert str(error).startswith("Manifest")
    else:
        assert to_json(result).keys() == to_json(manifest).keys()
        assert from_json(Manifest, json.loads(json.dumps(to_json(result)))) == result
    assert value == before


@given(value=ANY_JSON)
@settings(max_examples=100, deadline=None)
def test_any_json_is_no_manifest(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^Manifest: (expected an object|unknown field|missing field)"):
        from_json(Manifest, value)


SPEC = {"name": "x", "dtype": "float32", "shape": ["batch", 4]}


@pytest.mark.parametrize(
    ("cls", "value", "message"),
    [
        (TensorSpec, {**SPEC, "name": 1}, r"^TensorSpec.name: expected str, got 1$"),
        (TensorSpec, {**SPEC, "name": None}, r"^TensorSpec.name: expected str, got None$"),
        (TensorSpec, {**SPEC, "shape": [1.5]}, r"^TensorSpec.shape\[0\]: expected int, got 1.5$"),
        (TensorSpec, {**SPEC, "shape": [True]}, r"^TensorSpec.shape\[0\]: expected int, got True$"),
        (TensorSpec, {**SPEC, "shape": "batch"}, r"^TensorSpec.shape: expected a list, got str$"),
        (TensorSpec, {**SPEC, "sahpe": []}, r"^TensorSpec: unknown field 'sahpe'$"),
        (TensorSpec, {"name": "x", "shape": []}, r"^TensorSpec: missing field 'dtype'$"),
        (TensorSpec, {**SPEC, "pair": {}}, r"^TensorSpec.pair: expected str, got an object$"),
        (TensorSpec, {**SPEC, "role": [1]}, r"^TensorSpec.role: expected str, got a list$"),
        (Limits, {"max_batch": "8"}, r"^Limits.max_batch: expected int, got '8'$"),
        (Limits, [], r"^Limits: expected an object, got list$"),
        (FileEntry, {"path": "a", "size": "9" * 200, "sha256": ""}, r"size: expected int, got '9{76}\.\.\.$"),
        (
            Alternative,
            {"choice": "a", "reason": "b", "measured_ms": {"x": 10**400}},
            r"^Alternative.measured_ms.x: the number is too large$",
        ),
        (
            Alternative,
            {"choice": "a", "reason": "b", "measured_ms": {"x": "1"}},
            r"measured_ms.x: expected float, got '1'$",
        ),
        (
            SourceInfo,
            {"kind": ["module"], "path": None, "model_type": "", "class_name": "", "hash": ""},
            r"^SourceInfo.kind: expected one of \('huggingface', 'module'\), got a list$",
        ),
    ],
)
def test_errors_name_the_field(cls: type, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(cls, value)


def test_small_things() -> None:
    spec = from_json(TensorSpec, SPEC)
    assert spec == TensorSpec("x", "float32", ("batch", 4))
    assert from_json(Alternative, {"choice": "a", "reason": "b", "measured_ms": {"x": 1}}).measured_ms == {
        "x": 1.0
    }
    cache = TensorSpec("past.0.key", "float32", ("batch", 2, "past", 8), "cache", "present.0.key")
    assert ModelIO((spec, cache), ()).cache_inputs == (cache,)
    assert to_json({"a": (1, None, spec)}) == {"a": [1, None, {**SPEC, "role": "data", "pair": None}]}
