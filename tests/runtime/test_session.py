"""Loading, running, traced and forced runs, chunked prefill, closing, threads, processes."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moe_export.errors import BundleError, InputError, MoeExportError
from moe_export.runtime.session import Session, load
from tests.helpers import tiny_model
from tests.helpers.tiny_bundle import TinyReference, make_tiny_bundle

Batch = dict[str, np.ndarray]


def _edit_manifest(bundle: Path, **values: object) -> None:
    file = bundle / "manifest.json"
    data = json.loads(file.read_text())
    data.update(values)
    file.write_text(json.dumps(data))


def test_run_matches_the_reference(tiny: Session, batch: Batch) -> None:
    real = batch["attention_mask"].astype(bool)
    want = TinyReference().run(batch).outputs["logits"]
    got = tiny.run(batch)
    assert set(got) == {spec.name for spec in tiny.io.outputs}
    np.testing.assert_allclose(got["logits"][real], want[real], atol=2e-5)
    assert got["present.0.key"].shape == (3, tiny_model.KV_HEADS, 11, tiny_model.HEAD_DIM)


def test_run_with_its_own_cache_continues(tiny: Session, batch: Batch) -> None:
    whole = tiny.run(batch)["logits"]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    first = tiny.run({"input_ids": ids[:, :7], "attention_mask": mask[:, :7]})
    caches = {spec.name: first[str(spec.pair)] for spec in tiny.io.cache_inputs}
    second = tiny.run({"input_ids": ids[:, 7:], "attention_mask": mask, **caches})
    np.testing.assert_allclose(second["logits"], whole[:, 7:], atol=2e-5)


def test_derived_inputs_equal_given_ones(tiny: Session, batch: Batch) -> None:
    ids = batch["input_ids"]
    full = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(ids.shape[1]), (len(ids), 1)),
    }
    np.testing.assert_array_equal(tiny.run({"input_ids": ids})["logits"], tiny.run(full)["logits"])
    shifted = {**full, "position_ids": full["position_ids"][:, ::-1].copy()}
    assert np.abs(tiny.run(shifted)["logits"] - tiny.run(full)["logits"]).max() > 0.1


def test_traced_run_shows_what_the_reference_shows(tiny: Session, batch: Batch) -> None:
    real = batch["attention_mask"].astype(bool)
    want, got = TinyReference().run(batch), tiny.run_traced(batch)
    np.testing.assert_allclose(got.outputs["logits"], tiny.run(batch)["logits"], atol=1e-6)
    assert [t.name for t in got.layers] == [t.name for t in want.layers]
    for ours, theirs in zip(got.layers, want.layers, strict=True):
        rows = real.ravel()
        assert ours.expert_ids.dtype == np.int32 and ours.weights.dtype == np.float32
        np.testing.assert_array_equal(ours.expert_ids[rows], theirs.expert_ids[rows])
        for kind in ("weights", "hidden", "output", "logits"):
            np.testing.assert_allclose(
                getattr(ours, kind)[rows], getattr(theirs, kind)[rows], atol=1e-5, err_msg=kind
            )


def test_forced_routing_replays_and_changes(tiny: Session, batch: Batch) -> None:
    plain = tiny.run_traced(batch)
    same = tiny.run_traced(batch, force_routing=plain.layers)
    np.testing.assert_allclose(same.outputs["logits"], plain.outputs["logits"], atol=1e-6)
    other = [dataclasses.replace(t, expert_ids=(t.expert_ids + 1) % tiny_model.EXPERTS) for t in plain.layers]
    forced = tiny.run_traced(batch, force_routing=other)
    assert np.abs(forced.outputs["logits"] - plain.outputs["logits"]).max() > 0.1
    for trace, want in zip(forced.layers, other, strict=True):
        np.testing.assert_array_equal(trace.expert_ids, want.expert_ids)
    # The router still computes its own opinion of the first layer, whose input is unchanged.
    np.testing.assert_allclose(forced.layers[0].logits, plain.layers[0].logits, atol=1e-6)


def test_forced_drop_gives_no_output(tiny: Session, batch: Batch) -> None:
    plain = tiny.run_traced(batch)
    dropped = [dataclasses.replace(t, expert_ids=np.full_like(t.expert_ids, -1)) for t in plain.layers]
    for trace in tiny.run_traced(batch, force_routing=dropped).layers:
        np.testing.assert_array_equal(trace.output, np.zeros_like(trace.output))


def test_forcing_the_reference_hides_a_broken_router_only(tmp_path: Path, batch: Batch) -> None:
    real = batch["attention_mask"].astype(bool)
    want = TinyReference().run(batch)
    for broken, healed in (
        ("router_bias_dropped", True),
        ("no_renormalise", True),
        ("expert_swapped", False),
    ):
        with load(make_tiny_bundle(tmp_path / broken, broken=broken), threads=1) as session:
            forced = session.run_traced(batch, force_routing=want.layers).outputs["logits"]
        error = np.abs(forced - want.outputs["logits"])[real].max()
        assert error < 2e-5 if healed else error > 0.1, broken


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda layers: layers[:1], "has 1 layers; the bundle has 2"),
        (lambda layers: layers[::-1], "got the trace of layer 1"),
        (lambda layers: [dataclasses.replace(t, expert_ids=t.expert_ids[:, :1]) for t in layers], "shape"),
        (
            lambda layers: [dataclasses.replace(t, expert_ids=t.expert_ids + 4) for t in layers],
            "-1 .dropped. to 3",
        ),
        (
            lambda layers: [dataclasses.replace(t, weights=t.weights[:-1]) for t in layers],
            "weights has shape",
        ),
    ],
)
def test_wrong_routing_is_refused(tiny: Session, batch: Batch, change: object, text: str) -> None:
    layers = list(tiny.run_traced(batch).layers)
    with pytest.raises(InputError, match=text):
        tiny.run_traced(batch, force_routing=change(layers))  # type: ignore[operator]


def test_routing_of_another_batch_is_an_error_of_ours(tiny: Session, batch: Batch) -> None:
    layers = tiny.run_traced({"input_ids": batch["input_ids"][:, :5]}).layers
    with pytest.raises(MoeExportError):
        tiny.run_traced(batch, force_routing=layers)


@pytest.mark.parametrize("chunks", [[11], [1] * 11, [4, 1, 6], [10, 1]])
def test_chunks_through_the_cache_equal_one_run(tiny: Session, batch: Batch, chunks: list[int]) -> None:
    rows = batch["attention_mask"].astype(bool)
    want = tiny.run_traced(batch)
    got = tiny.chunked_logits(batch["input_ids"], batch["attention_mask"], chunks)
    np.testing.assert_allclose(got.outputs["logits"][rows], want.outputs["logits"][rows], atol=2e-5)
    for ours, theirs in zip(got.layers, want.layers, strict=True):
        np.testing.assert_array_equal(ours.expert_ids[rows.ravel()], theirs.expert_ids[rows.ravel()])
        np.testing.assert_allclose(ours.output[rows.ravel()], theirs.output[rows.ravel()], atol=2e-5)


def test_chunks_reveal_a_shifted_cache(tmp_path: Path, batch: Batch) -> None:
    with load(make_tiny_bundle(tmp_path / "b", broken="cache_shifted"), threads=1) as session:
        whole = session.run(batch)["logits"]
        chunked = session.chunked_logits(batch["input_ids"], batch["attention_mask"], [6, 5]).outputs[
            "logits"
        ]
    assert np.abs(chunked - whole)[:, 6:].max() > 0.05


@pytest.mark.parametrize("chunks", [[5, 5], [11, 0], [12, -1], [], [5.5, 5.5]])
def test_wrong_chunks_are_refused(tiny: Session, batch: Batch, chunks: list[int]) -> None:
    with pytest.raises(InputError, match="sum to the sequence length 11"):
        tiny.chunked_logits(batch["input_ids"], batch["attention_mask"], chunks)


def test_chunk_inputs_are_checked(tiny: Session) -> None:
    with pytest.raises(InputError, match=r"input_ids\[0, 1\] is 999"):
        tiny.chunked_logits([[1, 999]], [[1, 1]], [2])


def test_threads_give_the_same_as_one_after_another(tiny_path: Path) -> None:
    feeds = [{"input_ids": np.random.default_rng(i).integers(0, 256, (2, 5 + i))} for i in range(8)]
    prompts = [f"prompt {i}" for i in range(8)]

    def all_of(session: Session, i: int) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
        trace = session.run_traced(feeds[i]).layers[1].output
        ids = session.generate(prompts[i], max_new_tokens=20, temperature=0.9, seed=i).token_ids
        return session.run(feeds[i])["logits"], trace, ids

    with load(tiny_path, threads=1) as session:
        want = [all_of(session, i) for i in range(8)]
    with load(tiny_path, threads=1) as session:
        gate = threading.Barrier(8)

        def together(i: int) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
            gate.wait()
            return all_of(session, i)

        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(together, range(8)))
    for (logits, trace, ids), (logits2, trace2, ids2) in zip(want, got, strict=True):
        np.testing.assert_array_equal(logits, logits2)
        np.testing.assert_array_equal(trace, trace2)
        assert ids == ids2


def test_interleaved_streams_do_not_disturb_each_other(tiny: Session) -> None:
    want = [tiny.generate(p, max_new_tokens=15).token_ids[0] for p in ("one", "another one")]
    first, second = (tiny.stream(p, max_new_tokens=15) for p in ("one", "another one"))
    got = [[a.token_id, b.token_id] for a, b in zip(first, second, strict=True)]
    assert [list(ids) for ids in zip(*got, strict=True)] == want


def _use_in_child(session: Session, queue: multiprocessing.Queue[str]) -> None:
    try:
        session.run({"input_ids": [[1]]})
        queue.put("ran")
    except InputError as error:
        queue.put(str(error))


def test_a_forked_child_is_told_to_load_again(tiny: Session) -> None:
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no fork")
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[str] = context.Queue()
    child = context.Process(target=_use_in_child, args=(tiny, queue))
    child.start()
    assert "call load() in this process" in queue.get(timeout=60)
    child.join()


def test_closed_session_refuses_everything(tiny_path: Path, batch: Batch) -> None:
    with load(tiny_path, threads=1) as session:
        running = session.stream("abc", max_new_tokens=5)
        next(running)
    calls = [
        lambda: session.run(batch),
        lambda: session.run_traced(batch),
        lambda: session.generate("a"),
        lambda: session.stream("a"),
        lambda: session.chunked_logits([[1]], [[1]], [1]),
        lambda: session.tokenizer,
        lambda: next(running),
        lambda: session.__enter__(),
    ]
    for call in calls:
        with pytest.raises(InputError, match="session is closed"):
            call()
    session.close()


def test_load_reports_time_and_notes(tmp_path: Path) -> None:
    with load(make_tiny_bundle(tmp_path / "b", tokenizer=False), threads=1) as session:
        assert session.load_seconds > 0
        assert session.tokenizer is None
        assert session.notes == ("no tokenizer: prompts are token ids, and generated text is not shown",)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_wrong_threads(tiny_path: Path, threads: object) -> None:
    with pytest.raises(InputError, match="threads"):
        load(tiny_path, threads=threads)  # type: ignore[arg-type]


def test_other_targets_are_refused(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "b")
    _edit_manifest(bundle, target="another")
    with pytest.raises(BundleError, match="target 'another'"):
        load(bundle)


def test_a_model_that_onnxruntime_refuses_names_the_file(tmp_path: Path) -> None:
    import onnx

    bundle = make_tiny_bundle(tmp_path / "b")
    file = bundle / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    model.graph.node[3].op_type = "NoSuchOperator"
    file.write_bytes(model.SerializeToString())
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    for entry in files:
        if entry["path"] == "model.onnx":
            entry["size"] = file.stat().st_size
    _edit_manifest(bundle, files=files)
    with pytest.raises(
        BundleError, match=r"model\.onnx: ONNX Runtime cannot load it: .*NoSuchOperator"
    ) as caught:
        load(bundle, trust=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda io: io["inputs"].pop(1),
            "has the input 'attention_mask', which the manifest does not declare",
        ),
        (lambda io: io["outputs"][0].update(name="logit"), "'logits', which the manifest does not declare"),
        (
            lambda io: io["inputs"][0].update(dtype="int32"),
            "'input_ids' is tensor.int64., the manifest says int32",
        ),
        (lambda io: io["inputs"][0].update(shape=["batch"]), "'input_ids' has 2 axes, the manifest says 1"),
        (
            lambda io: io["inputs"].append(dict(io["inputs"][0], name="token_types")),
            "lacks the manifest's input 'token_types'",
        ),
    ],
)
def test_manifest_and_model_must_agree(tmp_path: Path, change: object, text: str) -> None:
    bundle = make_tiny_bundle(tmp_path / "b")
    io = json.loads((bundle / "manifest.json").read_text())["io"]
    change(io)  # type: ignore[operator]
    _edit_manifest(bundle, io=io)
    with pytest.raises(BundleError, match=text):
        load(bundle)


def test_a_value_name_that_is_not_in_the_graph(tmp_path: Path, batch: Batch) -> None:
    bundle = make_tiny_bundle(tmp_path / "b")
    layers = json.loads((bundle / "manifest.json").read_text())["moe_layers"]
    layers[1]["weights"] = "moe.1.weight"
    _edit_manifest(bundle, moe_layers=layers)
    with load(bundle, threads=1) as session, pytest.raises(BundleError, match="no value 'moe.1.weight'"):
        session.run_traced(batch)


def test_a_damaged_tokenizer_names_the_file(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "b")
    file = bundle / "tokenizer" / "tokenizer.json"
    file.write_text("{}".ljust(file.stat().st_size))
    with load(bundle, trust=True, threads=1) as session, pytest.raises(BundleError, match="tokenizer.json"):
        session.generate("text")


def test_other_tasks_do_not_generate(tmp_path: Path, batch: Batch) -> None:
    bundle = make_tiny_bundle(tmp_path / "b", tokenizer=False)
    _edit_manifest(bundle, task="module")
    with load(bundle, threads=1) as session:
        assert session.run(batch)["logits"].shape == (3, 11, tiny_model.VOCAB)
        with pytest.raises(InputError, match="task is module"):
            session.generate([1, 2])


def test_neither_torch_nor_transformers_is_imported(tiny_path: Path) -> None:
    code = (
        "import sys\n"
        "from moe_export.runtime.session import load\n"
        f"session = load({str(tiny_path)!r}, threads=1)\n"
        "session.generate('a', max_new_tokens=2)\n"
        "session.run_traced({'input_ids': [[1, 2]]})\n"
        "print([m for m in ('torch', 'transformers', 'click', 'matplotlib') if m in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr
    assert result.stderr == ""
