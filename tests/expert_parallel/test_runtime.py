"""Sessions over several ranks: whatever a session does on one rank it does on several, with the same numbers.
Each rank's graph is the whole tiny model: what is tested is the runtime.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_export.backends.onnxruntime.plugin import cpu_plugin_problem
from moe_export.bundle.manifest import read_manifest
from moe_export.errors import BundleError
from moe_export.runtime.launch import launched, mpiexec_command, timeout_seconds, without_launcher
from moe_export.runtime.rows import Deal, check_rows_lead, joined
from moe_export.runtime.session import load
from moe_export.schema import ModelIO, TensorSpec
from tests.expert_parallel.mpi import COMMAND, mpiexec, needs_mpi, script
from tests.helpers.rank_bundle import make_rank_bundle
from tests.helpers.tiny_bundle import make_tiny_bundle, write_manifest

USES = '''
import sys
import numpy as np
from moe_export.errors import InputError
from moe_export.runtime import launched, load, serve_rank

bundle, output = sys.argv[1:]
if launched().rank:
    serve_rank(bundle, threads=1)
    sys.exit()

arrays = {}

def keep(name, run):
    arrays.update({f"{name}.{key}": value for key, value in run.outputs.items()})
    for layer in run.layers:
        for field in ("expert_ids", "weights", "hidden", "output", "logits"):
            arrays[f"{name}.{layer.index}.{field}"] = getattr(layer, field)

with load(bundle, threads=1) as session:
    rng = np.random.default_rng(1)
    for batch in (1, 2, 3, 5):
        ids = rng.integers(0, 256, (batch, 7))
        mask = np.ones_like(ids)
        mask[-1, :2] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        outputs = session.run(inputs)
        arrays.update({f"run{batch}.{key}": value for key, value in outputs.items()})
        keep(f"traced{batch}", session.run_traced(inputs))
        keep(f"chunked{batch}", session.chunked_logits(ids, mask, (3, 1, 3)))
        shown = session.run_traced(inputs)
        import dataclasses
        other = [dataclasses.replace(l, expert_ids=l.expert_ids[:, ::-1].copy()) for l in shown.layers]
        keep(f"forced{batch}", session.run_traced(inputs, force_routing=other))
        stepper = session.stepper(batch)
        arrays[f"step{batch}.0"] = stepper.feed(ids, mask)["logits"].copy()
        pairs = [(l.expert_ids, l.weights) for l in other]
        outputs = session.run_forced(inputs, pairs)
        arrays.update({f"bare{batch}.{key}": value for key, value in outputs.items()})
        arrays[f"step{batch}.1"] = stepper.feed(ids[:, :1], mask[:, -1:])["logits"].copy()
    for refused in (
        lambda: session.run({"input_ids": [[999]]}),
        lambda: session.stepper(2).feed(np.zeros((3, 1), np.int64), np.ones((3, 1), np.int64)),
        lambda: session.chunked_logits(ids, mask, (1, 1)),
        lambda: session.run_traced(inputs, force_routing=shown.layers[:1]),
        lambda: session.run_forced(inputs, pairs[:1]),
    ):
        try:
            refused()
        except InputError as error:
            print("refused:", error)
    generation = session.generate(["hello", "a longer prompt", "x"], max_new_tokens=9)
    arrays["generated"] = np.array(generation.token_ids)
    arrays["streamed"] = np.array([e.token_id for e in session.stream("hello", max_new_tokens=5)])
    if session.rank_use is not None:
        for use in session.rank_use():
            print("used:", use.rank, use.runs > 10, use.seconds > 0, use.pid > 0, use.peak_rss > 0,
                  use.exchange.get("all_reduce_calls", 0) > 50)
    print("notes:", session.notes)
try:
    session.run(inputs)
except InputError as error:
    print("closed:", error)
np.savez(output, **arrays)
'''


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What one rank computes."""
    folder = tmp_path_factory.mktemp("one")
    bundle = make_tiny_bundle(folder / "bundle")
    command = [*map(str, script(folder, "uses", USES)), str(bundle), str(folder / "out.npz")]
    subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[2], capture_output=True)
    with np.load(folder / "out.npz") as file:
        return dict(file)


@needs_mpi
@pytest.mark.parametrize(
    ("mode", "ranks", "exchange"),
    [
        pytest.param("allreduce", 2, False, marks=pytest.mark.slow),
        ("allreduce", 3, True),
        pytest.param("alltoall", 3, False, marks=pytest.mark.slow),
        ("alltoall", 2, True),
    ],
)
def test_all_ways_to_run_give_what_one_rank_gives(
    tmp_path: Path, expected: dict[str, np.ndarray], mode: str, ranks: int, exchange: bool
) -> None:
    if exchange and cpu_plugin_problem():
        pytest.skip("needs the CPU plugin")
    bundle = make_rank_bundle(tmp_path / "bundle", ranks, mode, exchange=exchange)
    done = mpiexec(ranks, *script(tmp_path, "uses", USES), bundle, tmp_path / "out.npz")
    assert done.code == 0, done.err
    assert done.errors == []
    with np.load(tmp_path / "out.npz") as file:
        got = dict(file)
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert got[name].shape == array.shape, name
        np.testing.assert_allclose(got[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    assert done.out.count("refused:") == 5
    for rank in range(ranks):
        assert f"used: {rank} True True True True {exchange}" in done.out
    assert f"{ranks} ranks on 1 host(s), exchange {mode}" in done.out
    assert "closed: this session is closed" in done.out


@needs_mpi
@pytest.mark.parametrize("mode", ["allreduce", pytest.param("alltoall", marks=pytest.mark.slow)])
def test_the_command_line_prints_once(tmp_path: Path, mode: str) -> None:
    bundle = make_rank_bundle(tmp_path / "bundle", 2, mode)
    done = mpiexec(2, COMMAND, "run", bundle, "--prompt", "hello", "--max-new-tokens", "4", "--json")
    assert done.code == 0, done.err
    with load(make_tiny_bundle(tmp_path / "one"), threads=1) as session:
        want = session.generate("hello", max_new_tokens=4)
    answer = json.loads(done.out)
    assert answer["token_ids"] == want.token_ids
    assert done.err.count("note: 2 ranks on 1 host(s)") == 1


@needs_mpi
@pytest.mark.parametrize("mode", [pytest.param("allreduce", marks=pytest.mark.slow), "alltoall"])
def test_verification_on_ranks(tmp_path: Path, mode: str) -> None:
    """Right graphs pass, and one wrong rank is found."""
    text = (
        "import sys\nfrom moe_export.runtime import launched, serve_rank\nfrom moe_export.verify import "
        "verify_bundle\nfrom tests.helpers.tiny_bundle import TinyReference, TinyWeights\n"
        "if launched().rank:\n    serve_rank(sys.argv[1])\n    sys.exit()\n"
        "reference = TinyReference(TinyWeights.make(0))\n"
        "report = verify_bundle(sys.argv[1], against=reference, force_routing=True)\n"
        "print(report.passed, len(report.cases), report.notes[0], sep='\\n')\n"
    )
    bundle = make_rank_bundle(tmp_path / "bundle", 2, mode)
    done = mpiexec(2, *script(tmp_path, "verify", text), bundle)
    assert done.code == 0, done.err
    passed, cases, note = done.out.splitlines()
    assert note.startswith(f"2 ranks on 1 host(s), exchange {mode}")
    assert passed == "True" and int(cases) > 5
    if mode == "alltoall":
        wrong = make_tiny_bundle(tmp_path / "wrong", broken="expert_swapped")
        for name in ("model.onnx", "model.onnx.data"):
            (bundle / "rank1" / name).write_bytes((wrong / name).read_bytes())
        write_manifest(bundle, read_manifest(bundle))
        done = mpiexec(2, *script(tmp_path, "verify", text), bundle)
        assert (done.code, done.out.split()[0]) == (0, "False"), done.err


@needs_mpi
def test_requests_of_several_threads(tmp_path: Path) -> None:
    """Their steps mix, and each gets its own answer."""
    if cpu_plugin_problem():
        pytest.skip("needs the CPU plugin")
    bundle = make_rank_bundle(tmp_path / "bundle", 2, "alltoall", exchange=True)
    text = (
        "import sys\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from moe_export.runtime import launched, load, serve_rank\n"
        "if launched().rank:\n    serve_rank(sys.argv[1])\n    sys.exit()\n"
        "prompts = ['a', 'second prompt', ['two', 'of them'], 'x y z'] * 2\n"
        "def answer(prompt):\n    return session.generate(prompt, max_new_tokens=12).token_ids\n"
        "with load(sys.argv[1]) as session:\n    alone = [answer(prompt) for prompt in prompts]\n"
        "    with ThreadPoolExecutor(4) as pool:\n        print(list(pool.map(answer, prompts)) == alone)\n"
    )
    done = mpiexec(2, *script(tmp_path, "threads", text), bundle)
    assert (done.code, done.out, done.err) == (0, "True\n", "")


@needs_mpi
def test_what_fails_on_all_ranks_alike_ends_none(tmp_path: Path) -> None:
    if cpu_plugin_problem():
        pytest.skip("needs the CPU plugin")
    bundle = make_rank_bundle(tmp_path / "bundle", 2, "alltoall", exchange=True, capacity=8)
    text = (
        "import sys\nfrom moe_export.errors import BundleError\n"
        "from moe_export.runtime import launched, load, serve_rank\n"
        "if launched().rank:\n    serve_rank(sys.argv[1])\n    sys.exit()\n"
        "with load(sys.argv[1]) as session:\n"
        "    for tokens in (8, 9, 5):\n        ids = [[1] * tokens] * 2\n"
        "        for run in (session.run, session.run_traced):\n"
        "            try:\n                run({'input_ids': ids})\n                print(tokens, 'ran')\n"
        "            except BundleError as error:\n                print(tokens, error)\n"
    )
    done = mpiexec(2, *script(tmp_path, "fails", text), bundle)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert [line for line in lines if "ran" in line[:6]] == ["8 ran", "8 ran", "5 ran", "5 ran"]
    assert len(lines) == 6
    for line in lines[2:4]:
        assert "all ranks: layer 'layers.0.moe': 9 tokens for one rank, but a block has room for 8" in line


@needs_mpi
def test_traces_on_ranks(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the same text for one rank and for two")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    bundle = make_rank_bundle(tmp_path / "bundle", 2, "alltoall")
    words = ("--data", tmp_path / "text", "--window", "16", "-q", "--json")
    done = mpiexec(2, COMMAND, "trace", bundle, *words, two)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("tokens; p50") == 1
    single = make_tiny_bundle(tmp_path / "single")
    subprocess.run([COMMAND, "trace", single, *words, one], check=True, capture_output=True)
    want, got = json.loads(one.read_text()), json.loads(two.read_text())
    assert [layer["counts"] for layer in got["layers"]] == [layer["counts"] for layer in want["layers"]]


@needs_mpi
def test_benchmarks_on_ranks(tmp_path: Path) -> None:
    bundle = make_rank_bundle(tmp_path / "bundle", 2, "alltoall")
    done = mpiexec(
        2, COMMAND, "bench", bundle, "--baselines", "none", "--sequence", "8", "--decode-tokens", "2",
        "--rounds", "1", "--routing", "real,uniform", "--batch", "1,3", "--json", "-q",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    report = json.loads(done.out)
    assert {(row["phase"], row["batch"], row["routing"]) for row in report["rows"]} >= {
        ("prefill", 1, "real"), ("decode", 3, "real"), ("prefill", 3, "uniform"),
    }  # fmt: skip
    notes = " ".join(report["notes"])
    assert re.search(r"rank 0 \(.*\): \d+ runs, .* s in its graphs", notes)
    assert re.search(r"rank 1 \(.*\): \d+ runs, .* s in its graphs", notes)
    assert "engine: 2 ranks on 1 host(s), exchange alltoall" in notes
    assert (report["settings"]["ranks"], report["settings"]["ep_mode"]) == (2, "alltoall")
    assert report["contestants"][0]["peak_rss"] > 1 << 24


@needs_mpi
def test_a_driver_that_forgets_to_close_ends_its_workers(tmp_path: Path) -> None:
    bundle = make_rank_bundle(tmp_path / "bundle", 2, "allreduce")
    text = (
        "import sys\nfrom moe_export.runtime import launched, load, serve_rank\n"
        "if launched().rank:\n    serve_rank(sys.argv[1])\n"
        "else:\n    session = load(sys.argv[1])\n    print(len(session.run({'input_ids': [[1, 2]]})))\n"
    )
    done = mpiexec(2, *script(tmp_path, "forgets", text), bundle)
    assert (done.code, done.out) == (0, "5\n"), done.err


@needs_mpi
def test_two_sessions_one_after_the_other(tmp_path: Path) -> None:
    bundle = make_rank_bundle(tmp_path / "bundle", 2, "alltoall")
    text = (
        "import sys\nfrom moe_export.runtime import launched, load, serve_rank\n"
        "for _ in range(2):\n    if launched().rank:\n        serve_rank(sys.argv[1])\n"
        "    else:\n        with load(sys.argv[1]) as session:\n"
        "            print(session.run({'input_ids': [[1, 2]]})['logits'].shape)\n"
    )
    done = mpiexec(2, *script(tmp_path, "twice", text), bundle)
    assert done.code == 0, done.err
    assert done.out.splitlines() == ["(1, 2, 259)"] * 2


@needs_mpi
def test_the_service_of_the_documentation(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "expert-parallel.md").read_text(encoding="utf-8")
    section = page.split("## Embed in a service\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    bundle = make_rank_bundle(tmp_path / "bundle", 2, "allreduce")
    done = mpiexec(2, *script(tmp_path, "serve", code), bundle)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].startswith("[[") and [line[:2] for line in lines[1:]] == ["0 ", "1 "]


def test_dealing_and_joining_are_inverse() -> None:
    rng = np.random.default_rng(0)
    for batch in range(1, 8):
        for ranks in range(1, 6):
            deal = Deal(batch, ranks)
            whole = {"a": rng.random((batch, 3)), "tokens": rng.random((batch * 4, 2))}
            parts = [deal.parts(whole, rank) for rank in range(ranks)]
            assert {len(part["a"]) for part in parts} == {deal.rows}
            assert {len(part["tokens"]) for part in parts} == {deal.rows * 4}
            own = [
                deal.without_repetitions(part, rank) for rank, part in enumerate(parts) if deal.own(rank)
            ]
            for name, array in joined(own).items():
                np.testing.assert_array_equal(array, whole[name])
            assert sum(deal.own(rank) for rank in range(ranks)) == batch


def test_repetitions_are_the_last_row() -> None:
    deal = Deal(3, 2)
    np.testing.assert_array_equal(deal.part(np.arange(3), 1), [2, 2])
    np.testing.assert_array_equal(Deal(1, 3).part(np.array([[7]]), 2), [[7]])
    assert [Deal(1, 3).own(rank) for rank in range(3)] == [1, 0, 0]


def test_engines_whose_batch_is_not_first_cannot_be_divided() -> None:
    def spec(*shape: int | str) -> TensorSpec:
        return TensorSpec("x", "float32", shape)

    check_rows_lead(ModelIO((spec("batch", 3),), (spec("batch"),)), "engine")
    for shape in ((3, "batch"), ("tokens", 4), ()):
        with pytest.raises(BundleError, match="must begin with the batch; build it with --ep-mode allreduce"):
            check_rows_lead(ModelIO((spec("batch"),), (spec(*shape),)), "engine")


def test_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert dataclasses.astuple(launched()) == (0, 1, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    assert dataclasses.astuple(launched()) == (2, 3, 3)
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("MPI_LOCALNRANKS", "2")
    assert dataclasses.astuple(launched()) == (1, 4, 2)
    given = {"PMI_RANK": "1", "PMI_FD": "9", "MPI_LOCALNRANKS": "2", "HOME": "h", "PATH": "p"}
    kept = without_launcher(given)
    assert kept == {"HOME": "h", "PATH": "p"}


def test_time_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_export.errors import UsageError

    monkeypatch.delenv("MOE_EXPORT_EP_TIMEOUT", raising=False)
    assert timeout_seconds(None) == 60
    assert timeout_seconds(3) == 3
    monkeypatch.setenv("MOE_EXPORT_EP_TIMEOUT", "7.5")
    assert timeout_seconds(None) == 7.5
    assert timeout_seconds(2.0) == 2
    bad: Any
    for bad in (0, -1, float("nan"), "5"):
        with pytest.raises(UsageError, match="ep_timeout is .*expected seconds above 0"):
            timeout_seconds(bad)
    monkeypatch.setenv("MOE_EXPORT_EP_TIMEOUT", "soon")
    with pytest.raises(UsageError, match="MOE_EXPORT_EP_TIMEOUT is 'soon'; expected seconds above 0"):
        timeout_seconds(None)


def test_the_command_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/moe-export", "run", "my bundle", "--prompt", "a b"])
    assert mpiexec_command(4, "x") == "mpiexec -n 4 moe-export run 'my bundle' --prompt 'a b'"
    monkeypatch.setattr("sys.argv", ["serve.py", "x"])
    assert mpiexec_command(2, "x") == "mpiexec -n 2 python serve.py x"
    monkeypatch.setattr("sys.argv", [""])
    assert mpiexec_command(2, "bundle") == "mpiexec -n 2 moe-export run bundle"
