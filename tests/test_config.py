"""BuildConfig, its TOML file, and docs/configuration.md."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_export.config import _PLACES, OPSETS, BuildConfig, load_config_file, merge
from moe_export.errors import UsageError

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def write(folder: Path, text: str) -> Path:
    path = folder / "build.toml"
    path.write_text(text)
    return path


def example(number: int = 0) -> str:
    """One of the page's example files: of a CPU target, of a GPU target, of several ranks."""
    found = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(found) == 3
    return str(found[number])


def test_defaults() -> None:
    config = BuildConfig()
    assert (config.target, config.dtype, config.opset, config.expert_lowering) == (
        "onnxruntime",
        "float32",
        20,
        "auto",
    )
    assert config.verify and config.bench
    assert not config.trust_remote_code and not config.overwrite
    assert merge({}, {}) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target": "onnxruntim"},
            "target: unknown value 'onnxruntim'; nearest: onnxruntime; choices: onnxr",
        ),
        ({"target": 1}, "target: expected a text, got 1; choices: onnxruntime, portable"),
        ({"dtype": "fp16"}, "dtype: unknown value 'fp16'; .*choices: bfloat16, float16, float32"),
        ({"task": "generation"}, "task: unknown value 'generation'; nearest: text-generation"),
        ({"expert_lowering": "loops"}, "expert_lowering: unknown value 'loops'; nearest: loop"),
        ({"expert_weights": "pack"}, "expert_weights: unknown value 'pack'; nearest: packed"),
        ({"expert_weights": "packed", "target": "portable"}, "expert_weights: packed is for fused experts"),
        ({"expert_weights": "packed", "expert_lowering": "loop"}, "packed is for fused experts"),
        ({"expert_weights": "packed", "quantize": "int8"}, "packed is for fused experts"),
        ({"quantize": "int3"}, "quantize: unknown value 'int3'; .*choices: int8, int4|choices: int4, int8"),
        ({"quantize": "int8", "target": "portable"}, "quantize: int8 needs target onnxruntime"),
        (
            {"quantize": "int8", "quantized_lowering": "plugn"},
            "quantized_lowering: unknown value 'plugn'; nearest: plugin",
        ),
        ({"native_lowering": "buckts"}, "native_lowering: unknown value 'buckts'; nearest: buckets"),
        ({"native_lowering": "dense"}, "native_lowering: dense needs target tensorrt-rtx or tensorrt"),
        (
            {"target": "tensorrt", "expert_lowering": "plugin", "native_lowering": "dense"},
            "and expert_lowering auto or native",
        ),
        (
            {"quantized_lowering": "qmoe"},
            "quantized_lowering: qmoe is for quantised experts; it needs quantize",
        ),
        ({"verify": 1}, "verify: expected true or false, got 1"),
        ({"bench": None}, "bench: expected true or false, got None"),
        ({"trust_remote_code": "yes"}, "trust_remote_code: expected true or false"),
        ({"max_batch": 0}, "max_batch: expected a whole number of 1 or more, got 0"),
        ({"max_batch": True}, "max_batch: expected a whole number of 1 or more, got True"),
        ({"max_sequence": 1.5}, "max_sequence: expected a whole number"),
        ({"threads": -1}, "threads: expected a whole number of 1 or more"),
        ({"seed": -1}, "seed: expected a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed: expected a whole number from 0 to 4294967295"),
        ({"opset": "20"}, "opset: expected a whole number, got '20'; choices: 20, 21, 22, 24"),
        ({"opset": 23}, "opset: 23 is refused: ONNX Runtime's RotaryEmbedding .*; choices: 20, 21, 22, 24"),
        ({"opset": 19}, "opset: 19 is refused: the exported operators need opset 20"),
        ({"opset": 25}, "opset: 25 is refused: .*not been tested"),
        ({"tolerances": [1]}, "tolerances: expected a table"),
        (
            {"tolerances": {"logits": -1}},
            "tolerances: 'logits': expected a finite number of 0 or more, got -1",
        ),
        ({"tolerances": {"logits": float("nan")}}, "'logits': expected a finite number"),
        ({"tolerances": {"logits": float("inf")}}, "'logits': expected a finite number"),
        ({"tolerances": {"logits": True}}, "'logits': expected a finite number"),
        ({"tolerances": {"": 1}}, "expected an output name, got ''"),
        ({"bench_batches": 1}, "bench_batches: expected a list of whole numbers"),
        ({"bench_batches": []}, "bench_batches: expected a list"),
        ({"bench_batches": [1, 0]}, "bench_batches: expected a whole number of 1 or more, got 0"),
        ({"bench_sequences": [4, 4]}, r"bench_sequences: \[4, 4\] names a size twice"),
        ({"bench_baselines": ["pytorch"]}, "bench_baselines: unknown value 'pytorch'; nearest: pytorch-"),
        ({"bench_baselines": "pytorch-eager"}, "bench_baselines: expected a list of names"),
        ({"bench_rounds": 0}, "bench_rounds: expected a whole number of 1 or more"),
        ({"ep": 0}, "ep: expected a whole number of 1 or more, got 0"),
        ({"ep_mode": "alltoal"}, "ep_mode: unknown value 'alltoal'; nearest: alltoall"),
        ({"ep_mode": "alltoall"}, "ep_mode: alltoall is for several ranks; it needs ep = 2 or more"),
        ({"redundant_experts": 1}, "redundant_experts: 1 is for several ranks"),
        ({"ep": 2, "target": "portable"}, "ep: 2 needs a target that runs"),
        ({"ep": 2, "quantize": "int8"}, "quantize: int8 is for one rank"),
        ({"ep": 2, "ep_overflow": "error"}, "error and ep_capacity_factor need each other"),
        ({"ep": 2, "ep_capacity_factor": 2}, "error and ep_capacity_factor need each other"),
        (
            {"ep": 2, "ep_overflow": "error", "ep_capacity_factor": 2},
            "ep_overflow: error is for ep_mode alltoall",
        ),
        ({"ep": 2, "ep_capacity_factor": float("nan")}, "ep_capacity_factor: expected a finite number above"),
        ({"ep": 2, "ep_capacity_factor": 0}, "ep_capacity_factor: expected a finite number above 0, got 0"),
        ({"ep": 2, "placement": "balanced"}, "placement: balanced and trace belong together"),
        ({"ep": 2, "trace": "t.json"}, "placement: balanced and trace belong together"),
        ({"ep": 2, "placement": "balanced", "trace": ""}, "trace: expected a file's name, got ''"),
        ({"ep": 2, "redundant_experts": 1}, "redundant_experts and ep_nodes need placement balanced"),
        ({"ep": 2, "redundant_experts": -1}, "redundant_experts: expected a whole number of 0 or more"),
        (
            {"ep": 4, "ep_nodes": 3, "placement": "balanced", "trace": "t.json"},
            "ep_nodes: 4 ranks do not lie evenly on 3 machines",
        ),
        ({"bench_batches": [1, 9], "max_batch": 8}, "bench_batches: 9 is above max_batch = 8"),
        ({"bench_sequences": [9], "max_sequence": 8}, "bench_sequences: 9 is above max_sequence = 8"),
    ],
)
def test_wrong_values_name_the_field_and_the_choices(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        BuildConfig(**changes)


def test_values_are_normalised_and_apart_from_the_callers() -> None:
    given_tolerances: dict[str, float] = {"logits": 1}
    config = BuildConfig(tolerances=given_tolerances, bench_batches=[1, 2])  # type: ignore[arg-type]
    given_tolerances["logits"] = -5
    assert config.tolerances == {"logits": 1.0}
    assert config.bench_batches == (1, 2)
    assert BuildConfig(bench=False, bench_batches=(9,), max_batch=8).max_batch == 8
    assert [BuildConfig(opset=opset).opset for opset in OPSETS] == [20, 21, 22, 24]


def test_key_fields_are_all_but_overwrite() -> None:
    names = {f.name for f in dataclasses.fields(BuildConfig)}
    assert set(BuildConfig().key_fields()) == names - {"overwrite"}


def test_key_fields_hold_what_the_trace_says_not_its_name(tmp_path: Path) -> None:
    def key(name: str) -> Any:
        return BuildConfig(ep=2, placement="balanced", trace=str(tmp_path / name)).key_fields()["trace"]

    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    assert key("a") == key("b") != key("c")
    with pytest.raises(UsageError, match="trace: .*none.json: No such file"):
        key("none.json")


def test_file_gives_only_what_it_states(tmp_path: Path) -> None:
    assert load_config_file(write(tmp_path, "")) == {}
    text = '[build]\ndtype = "float16"\n[verify.tolerances]\n"present.0.key" = 1\n[bench]\nbatch = [1]\n'
    assert load_config_file(write(tmp_path, text)) == {
        "dtype": "float16",
        "tolerances": {"present.0.key": 1},
        "bench_batches": [1],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[build\n", "build.toml is not valid TOML: .*line 1"),
        ("[build]\nseed = 1\nseed = 2\n", "is not valid TOML: .*line 3"),
        ("[buidl]\nseed = 1", r"build.toml: unknown table or top-level key 'buidl'; nearest: build"),
        ("seed = 1", r"unknown table or top-level key 'seed'; it belongs below a line \[build\]"),
        ("bench = true", r"top-level key 'bench'; it belongs below a line \[build\]"),
        ("colour = 1", "top-level key 'colour'; choices: bench, build, verify"),
        ("[build]\ndtyp = 'float32'", r"build.toml: unknown key 'dtyp' in \[build\]; nearest: dtype"),
        ("[build]\nmax_seq = 5", r"unknown key 'max_seq' in \[build\]; nearest: max_sequence"),
        ("[build]\ndtype = 'floatt32'", r"build.toml: dtype in \[build\]: unknown value .*nearest: float32"),
        ("[build]\nopset = 23", r"opset in \[build\]: 23 is refused"),
        ("[build]\nverify = 'yes'", r"verify in \[build\]: expected true or false, got 'yes'"),
        ("[build]\ntolerances = {}", r"unknown key 'tolerances' in \[build\]"),
        ("[verify]\nlogits = 1", r"unknown key 'logits' in \[verify\]; choices: tolerances"),
        ("[verify.tolerances]\nlogits = 'x'", r"tolerances in \[verify\]: 'logits': expected a finite"),
        ("[verify]\ntolerances = 1", r"tolerances in \[verify\]: expected a table"),
        ("[bench]\nbatches = [1]", r"unknown key 'batches' in \[bench\]; nearest: batch"),
        ("[bench]\nbatch = 1", r"batch in \[bench\]: expected a list"),
        ("[bench]\nrounds = 0", r"rounds in \[bench\]: expected a whole number"),
        ("[build]\ntrust_remote_code = true", "trust_remote_code is not taken from a file.*as a flag"),
        ("[build]\ntrust_remote_code = false", "trust_remote_code is not taken from a file"),
        ("[build]\nseed = 2024-01-01", r"seed in \[build\]: expected a whole number"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_config_file(write(tmp_path, text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing.toml: No such file"):
        load_config_file(tmp_path / "nothing.toml")
    with pytest.raises(UsageError, match="Is a directory"):
        load_config_file(tmp_path)
    (tmp_path / "build.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="is not valid TOML"):
        load_config_file(tmp_path / "build.toml")


@given(text=st.text(alphabet="[]buildverchnkqustop.=\"'\n 0123456789{},", max_size=60))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_read_or_refused(tmp_path: Path, text: str) -> None:
    try:
        merge(load_config_file(write(tmp_path, text)), {})
    except UsageError as error:
        assert "build.toml" in str(error)


def test_flags_win_and_none_is_not_given() -> None:
    values = {"dtype": "float16", "seed": 3, "verify": True, "tolerances": {"logits": 1e-3, "hidden": 1e-4}}
    flags = {"dtype": None, "seed": 0, "verify": False, "tolerances": {"logits": 1e-5}, "task": None}
    config = merge(values, flags)
    assert (config.dtype, config.seed, config.verify, config.task) == ("float16", 0, False, None)
    assert config.tolerances == {"logits": 1e-5, "hidden": 1e-4}
    assert values["tolerances"] == {"logits": 1e-3, "hidden": 1e-4}


@pytest.mark.parametrize(
    ("values", "flags", "message"),
    [
        ({}, {"dtyp": "float32"}, "unknown build option 'dtyp'; nearest: dtype"),
        ({"sed": 1}, {}, "unknown build option 'sed'; nearest: seed"),
        ({}, {"tolerances": 3}, "tolerances: expected a table"),
        ({"tolerances": {"a": 1}}, {"tolerances": 3}, "tolerances: expected a table"),
        ({"bench_batches": [16]}, {"max_batch": 8}, "bench_batches: 16 is above max_batch = 8"),
    ],
)
def test_wrong_merges(values: dict[str, Any], flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        merge(values, flags)


def test_the_pages_example_parses_and_shows_every_key(tmp_path: Path) -> None:
    values = load_config_file(write(tmp_path, example()))
    merge(values, {})
    gpu = load_config_file(write(tmp_path, example(1)))
    assert merge(gpu, {}).sm == (80, 89, 120)
    ranks = load_config_file(write(tmp_path, example(2)))
    assert merge(ranks, {}).ep == 4
    fields = {f.name for f in dataclasses.fields(BuildConfig)}
    assert {*values, *gpu, *ranks} == fields - {"trust_remote_code"}


def test_the_page_documents_every_field_default_and_choice() -> None:
    page = PAGE.read_text()
    rows = {m[1]: m[0] for m in re.finditer(r"^\| `(\w+)` .*$", page, re.MULTILINE)}
    for field in dataclasses.fields(BuildConfig):
        table, key = _PLACES[field.name]
        if field.name == "trust_remote_code":
            assert "`trust_remote_code`" in page
        elif field.name == "tolerances":
            assert "## `[verify.tolerances]`" in page and "BuildConfig.tolerances" in page
        else:
            assert key in rows, f"{field.name} has no row in {PAGE.name}"
            if table == "bench":
                assert f"`{field.name}`" in rows[key]
            elif field.default is not None:
                default = (
                    f'"{field.default}"' if isinstance(field.default, str) else str(field.default).lower()
                )
                assert rows[key].split("|")[2].strip() == f"`{default}`", field.name
    stated = [row for row in rows if row not in {key for _, key in _PLACES.values()}]
    assert not stated, f"the page documents keys that do not exist: {stated}"
    from moe_export.config import (
        EXPERT_LOWERINGS,
        NATIVE_LOWERINGS,
        QUANTIZATIONS,
        QUANTIZED_LOWERINGS,
        TARGETS,
    )
    from moe_export.schema import DTYPES, EP_MODES, EP_OVERFLOWS, PLACEMENTS, TASKS

    for row, choices in (
        ("target", TARGETS),
        ("dtype", DTYPES),
        ("task", TASKS),
        ("expert_lowering", EXPERT_LOWERINGS),
        ("native_lowering", NATIVE_LOWERINGS),
        ("quantize", QUANTIZATIONS),
        ("quantized_lowering", QUANTIZED_LOWERINGS),
        ("opset", tuple(map(str, OPSETS))),
        ("ep_mode", EP_MODES),
        ("ep_overflow", EP_OVERFLOWS),
        ("placement", PLACEMENTS),
    ):
        assert all(choice in rows[row] for choice in choices), row


def test_every_field_has_its_own_check() -> None:
    from moe_export import config

    assert set(config._CHECKS) == {f.name for f in dataclasses.fields(BuildConfig)}


def test_a_file_may_hold_what_goes_together_with_its_target_only(tmp_path: Path) -> None:
    values = load_config_file(
        write(tmp_path, "[build]\ntarget = 'portable'\nverify = false\nbench = false\nweights = 'reference'")
    )
    assert merge(values, {}).weights == "reference"
    without_target = load_config_file(write(tmp_path, "[build]\nsm = [89]\nexpert_lowering = 'native'"))
    assert merge(without_target, {"target": "tensorrt-rtx"}).sm == (89,)
    with pytest.raises(UsageError, match=r"weights in \[build\]: reference needs target portable"):
        load_config_file(write(tmp_path, "[build]\ntarget = 'onnxruntime'\nweights = 'reference'"))
