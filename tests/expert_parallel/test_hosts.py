"""Two hosts on one machine: network namespaces with a cable between them, each with its rank's files only.

As on real hosts, MPI's bytes go through TCP; the launcher's ``ssh`` is a script that enters the other
namespace.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_export.backends.onnxruntime.plugin import cpu_plugin_problem
from moe_export.runtime.ranks import IDLE
from tests.expert_parallel.mpi import COMMAND, MPIEXEC, Done, environment, finish, needs_mpi, script
from tests.helpers.rank_bundle import make_rank_bundle

pytestmark = [pytest.mark.slow, needs_mpi]

ADDRESSES = ("10.213.77.1", "10.213.77.2")
LIMIT = 4.0
UNREACHABLE = "no active messages transport to"
"""What MPI said once, on a busy machine, when it started: that there is no way to the other rank, though the
cable was there. No code of ours has run then, so it is started again, with a warning."""


@dataclass(frozen=True)
class Hosts:
    """``bundle`` is another folder on each host; ``cable``: its end on the second one."""

    names: tuple[str, str]
    bundle: Path
    folder: Path
    cable: str

    def start(self, words: Sequence[str | Path]) -> subprocess.Popen[str]:
        """``words`` on both hosts, one rank each; mpiexec runs on the first."""
        passed = ("MOE_EXPORT_EP_TIMEOUT", "OMP_NUM_THREADS", "PATH", "PYTHONPATH", "UCX_TLS")
        mpi = [
            MPIEXEC, "-n", "2", "-ppn", "1", "-hosts", ",".join(ADDRESSES), "-launcher", "ssh",
            "-launcher-exec", self.folder / "ssh", "-genvlist", ",".join(passed), *words,
        ]  # fmt: skip
        return subprocess.Popen(
            [self.folder / "on", "0", " ".join(map(str, mpi))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(MOE_EXPORT_EP_TIMEOUT=str(LIMIT), UCX_TLS="tcp,self"),
        )

    def run(self, *words: str | Path) -> Done:
        done = finish(self.start(words), 90)
        return finish(self.start(words), 90) if mpi_found_no_way(done) else done

    def sent(self) -> int:
        """Bytes that the second host sent so far."""
        done = subprocess.run(
            ["ip", "-n", self.names[1], "-s", "link", "show", self.cable],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return int(done.stdout.split("TX:")[1].split()[6])


def mpi_found_no_way(done: Done) -> bool:
    """Whether a run did not start for that reason."""
    found = UNREACHABLE in done.err
    if found:
        warnings.warn(f"MPI is started again: {done.err}", stacklevel=2)
    return found


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if cpu_plugin_problem() or os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs the CPU plugin, root, ip and unshare")
    names = (f"me{os.getpid()}a", f"me{os.getpid()}b")
    cables = (f"va{os.getpid()}", f"vb{os.getpid()}")
    made = [subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode for name in names]
    try:
        if any(made):
            pytest.skip("this machine allows no network namespaces")
        link = ["ip", "link", "add", cables[0], "netns", names[0], "type", "veth"]
        subprocess.run([*link, "peer", "name", cables[1], "netns", names[1]], check=True)
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            inside = ["ip", "-n", name]
            subprocess.run([*inside, "addr", "add", f"{address}/24", "dev", cable], check=True)
            subprocess.run([*inside, "link", "set", cable, "up"], check=True)
            subprocess.run([*inside, "link", "set", "lo", "up"], check=True)
        yield _disks(tmp_path, names, cables[1])
    finally:
        for name, code in zip(names, made, strict=True):
            if not code:
                subprocess.run(["ip", "netns", "delete", name], check=True)


def _disks(folder: Path, names: tuple[str, str], cable: str) -> Hosts:
    """Bundles, and the scripts ``on HOST COMMAND`` and ``ssh ADDRESS COMMAND...``."""
    bundle = folder / "bundle"
    make_rank_bundle(folder / "disk0", 2, "allreduce", exchange=True)
    shutil.copytree(folder / "disk0", folder / "disk1")
    for host in range(2):
        shutil.rmtree(folder / f"disk{host}" / f"rank{1 - host}")
    bundle.mkdir()
    on = (
        "#!/bin/sh\nnames=" + ",".join(names) + '\nname=$(echo "$names" | cut -d, -f$(($1 + 1)))\n'
        'exec ip netns exec "$name" unshare --uts --mount sh -c '
        f'"hostname host$1; mount --bind {folder}/disk$1 {bundle}; exec $2"\n'
    )
    ssh = (
        '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\naddress=$1; shift\n'
        f'case $address in {ADDRESSES[0]}) host=0;; {ADDRESSES[1]}) host=1;; esac\n'
        f'exec {folder}/on $host "$*"\n'
    )
    for name, text in (("on", on), ("ssh", ssh)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return Hosts(names, bundle, folder, cable)


def test_two_hosts_with_their_own_files(hosts: Hosts) -> None:
    before = hosts.sent()
    done = hosts.run(COMMAND, "run", hosts.bundle, "--prompt", "hello", "--max-new-tokens", "30")
    assert done.code == 0, done.err
    assert "2 ranks on 2 host(s), exchange allreduce" in done.err
    assert done.out.strip()
    # 31 steps of two layers, 32 float32 per token: more than that must have gone through the cable.
    assert hosts.sent() - before > 31 * 2 * 32 * 4


def test_another_bundle_on_the_other_host(hosts: Hosts) -> None:
    manifest = hosts.folder / "disk1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"max_batch": 8', '"max_batch": 9'))
    done = hosts.run(COMMAND, "run", hosts.bundle, "--prompt", "hello")
    assert done.code == 2
    assert len(done.errors) == 1
    assert re.search(r"rank 1 \(host1\) has another bundle than rank 0 \(host0\)", done.errors[0])


def test_a_cable_that_is_pulled_out(hosts: Hosts, tmp_path: Path) -> None:
    text = (
        "import sys, time\nfrom pathlib import Path\n"
        "from moe_export.runtime import launched, load, serve_rank\n"
        "if launched().rank:\n    serve_rank(sys.argv[1], threads=1)\n    sys.exit()\n"
        "with load(sys.argv[1], threads=1) as session:\n    ended = time.monotonic() + 60\n"
        "    while time.monotonic() < ended:\n        session.generate('hello', max_new_tokens=20)\n"
        "        Path(sys.argv[2]).touch()\nprint('numbers')\n"
    )
    words = [*script(tmp_path, "loop", text), hosts.bundle, tmp_path / "running"]
    process = hosts.start(words)
    until = time.monotonic() + 60
    while not (tmp_path / "running").exists():
        assert time.monotonic() < until
        if process.poll() is not None:
            ended = finish(process)
            assert mpi_found_no_way(ended), ended.err
            process = hosts.start(words)
        time.sleep(0.05)
    subprocess.run(["ip", "-n", hosts.names[1], "link", "set", hosts.cable, "down"], check=True)
    began = time.monotonic()
    done = finish(process, 60)
    assert done.code != 0 and "numbers" not in done.out
    assert "rank 0 of 2 (host0)" in done.errors[0] and "longer than the timeout of 4 s" in done.errors[0]
    assert time.monotonic() - began < LIMIT + 12
    # The other host's rank hears of nothing; it loses patience by itself, at the latest as one without work.
    until = time.monotonic() + IDLE * LIMIT + 5 + 12
    while _others(str(tmp_path / "loop.py")):
        assert time.monotonic() < until, "rank 1 is still there"
        time.sleep(0.2)


def _others(word: str) -> list[str]:
    """Processes with ``word`` in their command line."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        if word in (process.info["cmdline"] or ()):
            found.append(str(process.pid))
    return found
