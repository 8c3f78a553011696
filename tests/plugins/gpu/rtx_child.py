"""Builds an ONNX model with the real TensorRT-RTX in a process of its own; prints one line of JSON.

TensorRT ends its process on some errors, so nothing of it runs in the test's process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from moe_export.backends.trt.library import make_link_folder


def build(model: Path, sms: list[int], profile: dict[str, Any], *, plugin: bool = True) -> dict[str, Any]:
    """What the builder said of ``model``. ``profile``: input → smallest, usual and largest shape."""
    with tempfile.TemporaryDirectory() as name:
        environment = make_link_folder("tensorrt_rtx", Path(name))
        request = json.dumps({"model": str(model), "sms": sms, "profile": profile, "plugin": plugin})
        done = subprocess.run(
            [sys.executable, "-P", __file__], input=request, env=environment, text=True, capture_output=True
        )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    import tensorrt_rtx as trt
    from moe_export_plugins.gpu import ipluginv3

    request = json.load(sys.stdin)
    said: list[str] = []
    memory: list[int] = []

    class Logger(trt.ILogger):  # type: ignore[misc]  # untyped base
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.WARNING:
                said.append(message)
            if "Total Activation Memory:" in message:
                memory.append(int(message.split("Total Activation Memory:")[1].split()[0]))

    calls: dict[str, list[Any]] = {"tactics": [], "workspace": []}
    if request["plugin"]:
        creator = ipluginv3.register(trt)
        made = creator.create_plugin

        def watched(*given: Any) -> Any:
            plugin = made(*given)
            cls = type(plugin)
            for kind, method in (("tactics", "get_valid_tactics"), ("workspace", "get_workspace_size")):
                plain = getattr(cls, method)
                if not hasattr(plain, "plain"):

                    def recorded(self: Any, *a: Any, _plain: Any = plain, _kind: str = kind) -> Any:
                        result = _plain(self, *a)
                        calls[_kind].append(result)
                        return result

                    recorded.plain = plain  # type: ignore[attr-defined]  # marks what is watched
                    setattr(cls, method, recorded)
            return plugin

        type(creator).create_plugin = lambda self, *given: watched(*given)
    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(request["model"])
    result: dict[str, Any] = {
        "parsed": parsed,
        "errors": [parser.get_error(i).desc() for i in range(parser.num_errors)],
        "layers": [network.get_layer(i).type.name for i in range(network.num_layers)],
        "plans": {},
    }
    for sm in request["sms"] if parsed else ():
        config = builder.create_builder_config()
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
        profile = builder.create_optimization_profile()
        for name, shapes in request["profile"].items():
            profile.set_shape(name, *shapes)
        config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        held = bytes(plan) if plan is not None else b""
        result["plans"][str(sm)] = {
            "bytes": len(held),
            "names": sorted(
                n for n in ("ExpertMLP", "clamped_swiglu", "model.layers.0") if n.encode() in held
            ),
        }
    problems = list(ipluginv3.problems())
    print(json.dumps({**result, "said": said, "problems": problems, "memory": memory, **calls}))


if __name__ == "__main__":
    main()
