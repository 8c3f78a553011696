"""Ranks that do not fit together, bundles that are damaged, and wrong use: one clear error for all ranks."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from moe_export.bundle.manifest import read_manifest
from tests.expert_parallel.mpi import COMMAND, Done, environment, mpiexec, needs_mpi, script
from tests.expert_parallel.rank_runs import LIMIT, check, run
from tests.helpers.rank_bundle import make_rank_bundle
from tests.helpers.tiny_bundle import make_tiny_bundle, write_manifest

pytestmark = needs_mpi


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_rank_bundle(tmp_path / "bundle", 3, "alltoall")


def alone(bundle: Path, **values: str) -> Done:
    """One process, which no mpiexec started."""
    began = time.monotonic()
    command = [COMMAND, "run", bundle, "--prompt", "hello"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**values), check=False)
    return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def test_another_bundle_on_one_rank(tmp_path: Path, bundle: Path) -> None:
    other = make_rank_bundle(tmp_path / "other", 3, "alltoall", seed=1)
    text = (
        "import sys\nfrom moe_export.cli.main import run\nfrom moe_export.runtime import launched\n"
        "sys.argv = ['moe-export', 'run', sys.argv[1 + (launched().rank == 2)], '--prompt', 'x']\nrun()\n"
    )
    done = mpiexec(3, *script(tmp_path, "two", text), bundle, other, MOE_EXPORT_EP_TIMEOUT=str(LIMIT))
    check(done, r"rank 2 \(.*\) has another bundle than rank 0 \(.*\): SHA-256 of manifest.json is")


def test_another_version_on_one_rank(tmp_path: Path, bundle: Path) -> None:
    text = (
        "import sys\nimport moe_export\nfrom moe_export.cli.main import run\n"
        "from moe_export.runtime import launched\n"
        "moe_export.__version__ = '9.9' if launched().rank == 1 else '1.0'\n"
        "sys.argv = ['moe-export', 'run', sys.argv[1], '--prompt', 'x']\nrun()\n"
    )
    done = mpiexec(3, *script(tmp_path, "version", text), bundle, MOE_EXPORT_EP_TIMEOUT=str(LIMIT))
    check(done, r"rank 1 \(.*\) has moe-export 9.9, rank 0 \(.*\) has 1.0; install the same")


@pytest.mark.parametrize("ranks", [2, 4])
def test_another_number_of_ranks(bundle: Path, ranks: int) -> None:
    done = run(bundle, ranks)
    check(
        done,
        f"has 3 ranks, but mpiexec started {ranks} processes; run: mpiexec -n 3 moe-export run .* --prompt",
    )


def test_no_mpiexec(bundle: Path) -> None:
    check(alone(bundle), "has 3 ranks, but this process was started alone; run: mpiexec -n 3 moe-export run")


def test_a_bundle_of_one_rank(tmp_path: Path) -> None:
    done = run(make_tiny_bundle(tmp_path / "one"), 2)
    check(done, "has one rank, but mpiexec started 2 processes; run it without mpiexec, or build")


def test_no_bundle_at_all(tmp_path: Path) -> None:
    check(run(tmp_path / "nothing", 2), "^error: .*nothing does not exist; a bundle is a folder")


def test_other_commands(tmp_path: Path) -> None:
    done = mpiexec(2, COMMAND, "build", "model", "-o", tmp_path / "x")
    check(done, "`moe-export build` runs in one process, and mpiexec started 2 of them")


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (("--prompt", "x", "--inputs", "nothing.npz"), "belong together"),
        (("--inputs", "nothing.npz", "--outputs", "x.npz"), "nothing.npz: No such file"),
        (("--prompt-ids", "1000"), "the vocabulary is 0 to 258"),
        (("--temperature", "x"), "not a valid float"),
        (("--prompt", "x", "--threads", "0"), "0 is not in the range"),
    ],
)
def test_wrong_use_is_said_once_and_at_once(bundle: Path, words: tuple[str, ...], pattern: str) -> None:
    done = run(bundle, 3, *words)
    check(done, pattern)
    assert "all ranks are ended" not in done.err


def test_a_missing_file_of_one_rank(bundle: Path) -> None:
    (bundle / "rank1" / "model.onnx.data").unlink()
    check(run(bundle), r"rank 1 \(.*\): bundle .* is damaged: rank1/model.onnx.data is missing.*its own")


def test_a_damaged_file_of_one_rank(bundle: Path) -> None:
    with open(bundle / "rank2" / "model.onnx.data", "r+b") as file:
        file.write(b"\0\1\2\3")
    check(run(bundle), r"rank 2 \(.*\): bundle .* is damaged: rank2/model.onnx.data .* has SHA-256")


def test_a_rank_needs_no_files_of_others(tmp_path: Path, bundle: Path) -> None:
    """As on several hosts, each with its own rank's files."""
    for rank in range(3):
        shutil.copytree(bundle, tmp_path / f"host{rank}")
        for other in {0, 1, 2} - {rank}:
            shutil.rmtree(tmp_path / f"host{rank}" / f"rank{other}")
    text = (
        "import sys\nfrom moe_export.cli.main import run\nfrom moe_export.runtime import launched\n"
        "sys.argv = ['moe-export', 'run', f'{sys.argv[1]}/host{launched().rank}', '--prompt', 'x', '-q',\n"
        "            '--max-new-tokens', '2']\nrun()\n"
    )
    done = mpiexec(3, *script(tmp_path, "hosts", text), tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out


def test_a_model_of_one_rank_that_does_not_load(bundle: Path) -> None:
    (bundle / "rank1" / "model.onnx").write_bytes(b"no model")
    write_manifest(bundle, read_manifest(bundle))
    check(run(bundle), r"rank 1 \(.*\): .*rank1")


def test_a_simulation_is_for_one_process(bundle: Path) -> None:
    done = mpiexec(3, COMMAND, "verify", bundle, "--simulate")
    check(done, "--simulate runs in one process; start it without mpiexec")


def test_the_launcher_of_another_mpi(bundle: Path) -> None:
    """Its variables say that there are others, and MPI itself knows of none."""
    done = alone(bundle, OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="3")
    check(done, r"mpiexec started 3 processes, and MPI \(\w+\) knows of 1: mpiexec is not that of", 3)


def test_load_on_every_rank(tmp_path: Path, bundle: Path) -> None:
    text = (
        "import sys\nfrom moe_export.cli.main import run_guarded\nfrom moe_export.runtime import load\n"
        "sys.exit(run_guarded(lambda: load(sys.argv[1])))\n"
    )
    done = mpiexec(3, *script(tmp_path, "load", text), bundle, MOE_EXPORT_EP_TIMEOUT=str(LIMIT))
    check(done, r"rank 1 \(.*\) called load\(\); rank 0 calls moe_export.runtime.load\(\), every other rank")


def test_the_check_rejects_what_it_should() -> None:
    for done in (
        Done(0, "", "error: x", 1),
        Done(2, "", "error: x\nerror: x", 1),
        Done(2, "12", "error: x", 1),
        Done(2, "", "error: y", 1),
        Done(2, "", "error: x", np.inf),
    ):
        with pytest.raises(AssertionError):
            check(done, "x")
    check(Done(2, "", "error: x", 1), "x")
