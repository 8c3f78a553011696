"""Simulation of TensorRT targets: the lowered graph on the CPU, with the same report as a real engine."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from moe_export.bundle.manifest import read_manifest
from moe_export.cli.main import cli
from moe_export.cli.parity_text import parity_text
from moe_export.errors import UsageError
from moe_export.ops import OPS
from moe_export.passes.base import PassContext
from moe_export.passes.inline_bodies import InlineBodies
from moe_export.passes.native_experts import NativeExperts
from moe_export.passes.plugin_experts import PluginExperts
from moe_export.progress import NullProgress
from moe_export.report.junit import parity_junit
from moe_export.report.markdown import parity_markdown
from moe_export.schema import Limits, Manifest, SourceInfo
from moe_export.trace import LayerTrace, TracedRun
from moe_export.verify import ParityReport, verify_bundle
from moe_export.verify.simulate import load_simulated
from moe_export.verify.simulated_graph import SimulatedGraph
from tests.helpers.tiny_bundle import make_tiny_bundle, write_manifest
from tests.helpers.tiny_model import TinyReference, TinyWeights
from tests.passes.moe_graphs import context_of, layer_text, layer_weights, model_of, run, tokens
from tests.passes.test_fuse_experts import KNOWN, context

SILU = KNOWN["silu"][0]
HEADING = "simulated, not run on a GPU"


class Plain:
    """The layer before it was lowered, by the ops' own bodies: the yardstick."""

    def __init__(self, made: PassContext) -> None:
        self.made = made

    def run(self, inputs: dict[str, Any]) -> TracedRun:
        names = ("out", "moe.0.expert_ids", "moe.0.weights", "moe.0.hidden", "moe.0.output")
        out, ids, weights, hidden, output = run(self.made.model, np.asarray(inputs["hidden"]), names)
        layer = LayerTrace(0, self.made.layers[0].name, ids, weights, hidden, output)
        return TracedRun({"out": out}, (layer,))


def bundle_of(made: PassContext, folder: Path) -> Path:
    """A bundle of target tensorrt-rtx, without plans, whose graph is ``made``."""
    folder.mkdir()
    InlineBodies().apply(made)
    made.model.graph.sort()
    onnx.save(ir.to_proto(made.model), folder / "model.onnx")
    source = SourceInfo("module", None, "module", "Plain", "0" * 64)
    write_manifest(
        folder,
        Manifest(source, "module", "tensorrt-rtx", "float32", 20, made.io, Limits(), made.layers),
    )
    return folder


def native(**options: Any) -> PassContext:
    made = context(SILU, gated=True)
    made.options = options
    NativeExperts().apply(made)
    return made


def plugin() -> PassContext:
    made = context(SILU, gated=True, biased=True)
    made.options = {"expert_lowering": "plugin"}
    PluginExperts().apply(made)
    return made


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ParityReport:
    bundle = bundle_of(native(), tmp_path_factory.mktemp("simulate") / "bundle")
    return verify_bundle(bundle, against=Plain(context(SILU, gated=True)), simulate=True, threads=1)


def test_a_right_graph_passes_and_every_report_is_headed(report: ParityReport) -> None:
    assert report.passed and report.simulated and report.summary()["simulated"] is True
    assert all(not layer.unused_experts for layer in report.coverage)
    text = parity_text(report)
    assert text.startswith(HEADING) and f"{HEADING}: verified" in text
    assert parity_markdown(report).startswith(f"# Parity ({HEADING}): PASSED")
    assert HEADING in str(ElementTree.fromstring(parity_junit(report)).get("name"))
    assert any("re-runs with larger buckets" in note for note in report.notes)
    assert ParityReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_wrong_graph_fails(tmp_path: Path) -> None:
    made = native()
    up = next(v for name, v in made.model.graph.initializers.items() if name.startswith("up_0"))
    assert up.const_value is not None
    array = up.const_value.numpy().copy()
    array[[2, 3]] = array[[3, 2]]
    up.const_value = ir.tensor(array, name=up.name)
    plain = Plain(context(SILU, gated=True))
    found = verify_bundle(bundle_of(made, tmp_path / "bundle"), against=plain, simulate=True, threads=1)
    assert not found.passed and found.findings[0].kind == "wrong expert"
    assert set(found.findings[0].experts) == {2, 3}
    assert f"{HEADING}: NOT VERIFIED" in parity_text(found)


def test_buckets_that_were_too_small_are_counted_and_their_runs_done_again(tmp_path: Path) -> None:
    def skewed(made: PassContext) -> PassContext:
        router = made.model.graph.initializers["router_0"]
        assert router.const_value is not None
        array = router.const_value.numpy().copy()
        array[:, 5], array[:, 1] = 9.0, 8.0
        router.const_value = ir.tensor(array, name="router_0")
        return made

    made, plain = context(SILU, gated=True), skewed(context(SILU, gated=True))
    NativeExperts().apply(skewed(made))
    hidden = np.abs(tokens(200))
    with load_simulated(bundle_of(made, tmp_path / "bundle")) as session:
        assert [spec.name for spec in session.io.inputs] == ["hidden"]
        outputs = session.run({"hidden": hidden})
        use = session.capacity_use
    assert use is not None and (use.runs, use.reruns, use.largest_load) == (1, 1, 200)
    np.testing.assert_allclose(outputs["out"], run(plain.model, hidden)[0], rtol=1e-4, atol=1e-4)


def reference_plugin(
    op: str, inputs: Sequence[NDArray[Any] | None], attributes: Mapping[str, Any]
) -> list[NDArray[Any]]:
    out = OPS[op].reference(*inputs, **OPS[op].complete(attributes))
    return [np.asarray(out, np.float32)]


def test_plugin_nodes_are_run_between_pieces_of_the_graph(tmp_path: Path) -> None:
    bundle = bundle_of(plugin(), tmp_path / "bundle")
    plain = context(SILU, gated=True, biased=True)
    with load_simulated(bundle, plugin=reference_plugin) as session:
        assert session.plugin_nodes == 1 and session.capacity_use is None
        for count in (1, 7):
            got = session.run_traced({"hidden": tokens(count)})
            want = Plain(plain).run({"hidden": tokens(count)})
            np.testing.assert_allclose(got.outputs["out"], want.outputs["out"], rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(got.layers[0].expert_ids, want.layers[0].expert_ids)
            forced = want.layers[0]
            forced = dataclasses.replace(forced, expert_ids=(forced.expert_ids + 1) % 8)
            other = session.run_traced({"hidden": tokens(count)}, force_routing=[forced])
            np.testing.assert_array_equal(other.layers[0].expert_ids, forced.expert_ids)
            assert not np.allclose(other.outputs["out"], want.outputs["out"], atol=1e-3)


def test_two_plugin_nodes_one_behind_the_other(tmp_path: Path) -> None:
    router = "scores = Softmax <axis = -1> (logits)\n weights, chosen = TopK <axis = -1> (scores, k)"

    def two() -> PassContext:
        second = layer_text(router, index=1, hidden="out_0")
        for name in ("logits", "scores", "weights", "chosen", "ids", "order", "offsets", "token_of"):
            second = second.replace(f"{name} =", f"{name}_b =").replace(f"{name},", f"{name}_b,")
            second = second.replace(f"({name})", f"({name}_b)").replace(f" {name})", f" {name}_b)")
            second = second.replace(f"({name}_b,", f"({name}_b,")
        for name in ("rows", "inner", "active", "out"):
            second = second.replace(f"expert_{name}", f"expert_{name}_b")
        text = layer_text(router) + second
        return context_of(model_of(text, {**layer_weights(0), **layer_weights(1)}, result="out_1"))

    made = two()
    made.options = {"expert_lowering": "plugin"}
    PluginExperts().apply(made)
    with load_simulated(bundle_of(made, tmp_path / "bundle"), plugin=reference_plugin) as session:
        assert session.plugin_nodes == 2
        got = session.run({"hidden": tokens(9)})["out"]
    np.testing.assert_allclose(got, run(two().model, tokens(9))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="pip install 'moe-export[gpu]'")
def test_plugin_nodes_run_by_the_gpu_s_kernels(tmp_path: Path) -> None:
    hidden = tokens(5)
    with load_simulated(bundle_of(plugin(), tmp_path / "bundle")) as session:
        got = session.run({"hidden": hidden})["out"]
    want = run(context(SILU, gated=True, biased=True).model, hidden)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))


def test_bfloat16_products_are_rounded_as_tensor_cores_do(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 20]>
    g (float[a, 8] x, bool flag) => (float[a, 4] y) {
        x16 = Cast <to = 16> (x)
        y = If (flag) <
            then_branch = one () => (float[a, 4] p) { p16 = MatMul (x16, w)
                p = Cast <to = 1> (p16) },
            else_branch = two () => (float[a, 4] q) { q32 = MatMul (x, v)
                q = Neg (q32) }>
    }""")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 4)).astype(ml_dtypes.bfloat16)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), "v"))
    graph = SimulatedGraph(model, tmp_path, "products", reference_plugin, threads=1)
    x = rng.standard_normal((5, 8)).astype(np.float32)
    low = x.astype(ml_dtypes.bfloat16).astype(np.float32) @ weight.astype(np.float32)
    got = graph.run({"x": x, "flag": np.asarray(True)})["y"]
    np.testing.assert_array_equal(got, low.astype(ml_dtypes.bfloat16).astype(np.float32))
    exact = graph.run({"x": x, "flag": np.asarray(False)})["y"]
    np.testing.assert_allclose(exact, -(x @ weight.astype(np.float32)), rtol=1e-5, atol=1e-6)


def for_gpu(folder: Path, **options: Any) -> Path:
    """The tiny text model, as if lowered for TensorRT-RTX."""
    make_tiny_bundle(folder, **options)
    write_manifest(folder, dataclasses.replace(read_manifest(folder), target="tensorrt-rtx"))
    return folder


def test_text_models_run_through_their_cache(tmp_path: Path) -> None:
    found = verify_bundle(for_gpu(tmp_path / "right"), against=TinyReference(), simulate=True, threads=1)
    assert found.passed and {"token by token", "chunks"} <= {c.name for c in found.cases}
    wrong = for_gpu(tmp_path / "wrong", broken="cache_shifted")
    found = verify_bundle(wrong, against=TinyReference(), simulate=True, threads=1)
    assert not found.passed and found.findings[0].kind == "KV cache"


def test_exit_codes_are_those_of_a_real_engine(tmp_path: Path) -> None:
    golden = tmp_path / "golden.npz"
    real = make_tiny_bundle(tmp_path / "real")
    verify_bundle(real, against=TinyReference(TinyWeights.make()), save_golden=golden, threads=1)

    def verify(bundle: Path, *more: str) -> Any:
        arguments = ["verify", str(bundle), "--against", str(golden), "--threads", "1", *more]
        return CliRunner().invoke(cli, arguments)

    right = verify(for_gpu(tmp_path / "right"), "--simulate")
    assert right.exit_code == 0 and HEADING in right.stdout, right.output
    wrong = verify(for_gpu(tmp_path / "wrong", broken="expert_swapped"), "--simulate")
    assert wrong.exit_code == 1 and "experts 0, 1" in wrong.stdout
    refused = verify(real, "--simulate")
    assert refused.exit_code == 2 and "onnxruntime, which runs on the CPU itself" in refused.stderr


@pytest.mark.parametrize(("broken", "kind"), [(None, ""), ("expert_swapped", "optimised engine")])
def test_a_plan_is_judged_by_its_own_outputs(broken: str | None, kind: str, tmp_path: Path) -> None:
    """Another engine stands for the plan, which needs a GPU: right, or wrong where its graph is right."""
    from moe_export.runtime.session import load
    from moe_export.verify.plan_session import PlanSession
    from moe_export.verify.runner import _Verification

    plan = load(make_tiny_bundle(tmp_path / "plan", broken=broken), threads=1)
    shown = load_simulated(for_gpu(tmp_path / "graph"), threads=1)
    with PlanSession(plan, shown) as session:
        verification = _Verification(session, TinyReference(), None, None, 0, NullProgress())
        found = verification.run(tmp_path / "graph", False, None, 0.0)
    assert found.passed == (broken is None) and not found.simulated
    assert [f.kind for f in found.findings] == ([kind] if kind else [])
    assert "the plan's, on its GPU" in found.notes[0] and found.summary()["routed_tokens"] > 0


def test_a_target_of_the_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--simulate is for tensorrt-rtx, tensorrt"):
        load_simulated(make_tiny_bundle(tmp_path / "bundle"))
