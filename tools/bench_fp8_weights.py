"""What float8 weights with scales of blocks cost in ONNX Runtime on this machine's CPU, beside float weights.

    python tools/bench_fp8_weights.py [--rows N ...]

One matrix of DeepSeek-V3's experts, 2048 x 7168, times 1, 16 and 128 rows: as float32, as bfloat16 cast where
it is used, and as float8 with a scale per block of 128 x 128, as exports by reference keep them. One thread;
the contestants take turns, and the least of the times counts.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

OUTPUTS, INPUTS, BLOCK = 2048, 7168, 128
ROUNDS = 7
OPSET = 21


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    options = parser.parse_args(arguments)
    print("| rows | float32 | bfloat16 | float8 |\n|---|---|---|---|")
    for rows, times in measure(options.rows).items():
        first = times["float32"]
        texts = [f"{seconds * 1e3:.1f} ms, {seconds / first:.1f} times" for seconds in times.values()]
        print(f"| {rows} | {' | '.join(texts)} |")
    return 0


def measure(
    row_counts: list[int], outputs: int = OUTPUTS, inputs: int = INPUTS
) -> dict[int, dict[str, float]]:
    """Seconds by number of rows and kind of weights.

    Raises:
        SystemExit: a contestant's answer is not that of its own weights as float32.
    """
    import numpy as np

    random = np.random.default_rng(0)
    sessions = {kind: _session(kind, outputs, inputs) for kind in ("float32", "bfloat16", "float8")}
    result = {}
    for rows in row_counts:
        given = random.standard_normal((rows, inputs)).astype(np.float32)
        feeds = {"rows": given, "offsets": np.array([0, rows], np.int64)}
        times: dict[str, list[float]] = {kind: [] for kind in sessions}
        for kind, (session, weights) in sessions.items():
            wanted = given @ weights.T
            error = np.abs(session.run(None, feeds)[0] - wanted).max() / np.abs(wanted).max()
            if error > 1e-4:
                raise SystemExit(f"{kind}: wrong answer, relative error {error:.2g}")
        for _ in range(ROUNDS):
            for kind, (session, _) in sessions.items():
                begin = time.perf_counter()
                session.run(None, feeds)
                times[kind].append(time.perf_counter() - begin)
        result[rows] = {kind: min(taken) for kind, taken in times.items()}
    return result


def _session(kind: str, outputs: int, inputs: int) -> tuple[Any, Any]:
    """A session of the op that an export has for such weights, and the weights as float32."""
    import ml_dtypes
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    from moe_export.ops import DOMAIN, VERSION, get_op

    random = np.random.default_rng(1)
    values = random.standard_normal((outputs, inputs)).astype(np.float32)
    given, attributes, name, initializers = ["rows", "offsets"], {"num_experts": 1}, "ExpertMatMul", []
    stored: Any = values
    if kind == "bfloat16":
        stored = values.astype(ml_dtypes.bfloat16)
        values = stored.astype(np.float32)
    elif kind == "float8":
        name, given = "ScaledExpertMatMul", [*given, "scale"]
        attributes |= {"block_rows": BLOCK, "block_columns": BLOCK}
        shape = (-(-outputs // BLOCK), -(-inputs // BLOCK))
        scale = random.uniform(0.01, 0.02, shape).astype(np.float32)
        stored = (values * 60).astype(ml_dtypes.float8_e4m3fn)
        values = stored.astype(np.float32) * np.kron(scale, np.ones((BLOCK, BLOCK)))[:outputs, :inputs]
        initializers.append(numpy_helper.from_array(scale[None], "scale"))
    initializers.append(numpy_helper.from_array(stored, "weight"))
    op = get_op(name)
    node = helper.make_node(name, [*given, "weight"], ["out"], domain=DOMAIN, **op.complete(attributes))
    graph = helper.make_graph(
        [node],
        kind,
        [
            helper.make_tensor_value_info("rows", onnx.TensorProto.FLOAT, ["M", inputs]),
            helper.make_tensor_value_info("offsets", onnx.TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["M", outputs])],
        initializers,
    )
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(
        graph, opset_imports=imports, functions=[op.function(attributes, OPSET)], ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session, values.astype(np.float32)


if __name__ == "__main__":
    raise SystemExit(main())
