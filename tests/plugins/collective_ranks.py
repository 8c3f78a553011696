"""One rank of the tests of collectives: python collective_ranks.py FOLDER, under mpiexec.

``FOLDER/plan.json``: ``timeout``, ``connect`` (bool), ``sleep`` ({rank: seconds before the second step}) and
``steps``, each with ``model`` (a file, or one per rank) and ``bfloat16`` (bool). Step i's inputs are
``<i>.<rank>.npz``; what a rank computes is ``<i>.<rank>.out.npz``, its error ``<rank>.error.json``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from mpi4py import MPI

from moe_export.backends.onnxruntime.exchange import connect_exchange, disconnect_exchange, exchange_use
from moe_export.backends.onnxruntime.plugin import register_cpu_plugin
from moe_export.backends.onnxruntime.runner import one_line, ort_error_types

BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


def session(file: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    assert register_cpu_plugin(options)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def run(folder: Path, plan: dict[str, Any], rank: int) -> None:
    steps = plan["steps"]
    sessions = {}
    for index, step in enumerate(steps):
        name = step["model"] if isinstance(step["model"], str) else step["model"][rank]
        if name not in sessions:
            sessions[name] = session(folder / name)
        given = np.load(folder / f"{index}.{rank}.npz")
        make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
        feeds = {
            key: make(array, BFLOAT16)
            if array.dtype == np.uint16
            else onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for key, array in ((key, np.ascontiguousarray(given[key])) for key in given.files)
        }
        if index == 1:
            time.sleep(plan.get("sleep", {}).get(str(rank), 0))
        names = [output.name for output in sessions[name].get_outputs()]
        values = sessions[name].run_with_ort_values(names, feeds)
        outputs = {key: value.numpy() for key, value in zip(names, values, strict=True)}
        np.savez(folder / f"{index}.{rank}.out.npz", **outputs)


def main() -> None:
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    rank, ranks = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    if plan["connect"]:
        connect_exchange(MPI.COMM_WORLD, plan["timeout"])
    began, text, error_file = time.monotonic(), "", f"{rank}.error.json"
    try:
        run(folder, plan, rank)
    except ort_error_types() as error:
        text = one_line(error)
    said = {"error": text, "seconds": time.monotonic() - began, "use": exchange_use()}
    (folder / f"{error_file}.part").write_text(json.dumps(said), encoding="utf-8")
    (folder / f"{error_file}.part").rename(folder / error_file)
    if not plan["fails"]:
        disconnect_exchange()
        return
    # All ranks have said how it ended before one ends them all.
    end = time.monotonic() + 20
    while not all((folder / f"{r}.error.json").exists() for r in range(ranks)) and time.monotonic() < end:
        time.sleep(0.05)
    MPI.COMM_WORLD.Abort(3)


if __name__ == "__main__":
    main()
