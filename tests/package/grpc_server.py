"""The part of Triton's gRPC protocol that a client of one model uses, answered by ONNX Runtime.

It stands where the server would: what reaches the model has passed Triton's own client and its wire format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

TYPES = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32, "BOOL": np.bool_}
Run = Callable[[dict[str, Any]], dict[str, Any]]


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]  # generated, untyped
    """Runs ``run`` for requests to ``model``."""

    def __init__(self, model: str, run: Run) -> None:
        self.model = model
        self.run = run

    def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802  # the protocol's name
        if request.model_name != self.model:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no model {request.model_name}")
        feeds = {
            tensor.name: np.frombuffer(raw, TYPES[tensor.datatype]).reshape(list(tensor.shape))
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        results = self.run(feeds)
        answer = service_pb2.ModelInferResponse(model_name=self.model, model_version="1")
        names = {np.dtype(kind): name for name, kind in TYPES.items()}
        for wanted in request.outputs:
            array = np.ascontiguousarray(results[wanted.name])
            answer.outputs.add(name=wanted.name, datatype=names[array.dtype], shape=array.shape)
            answer.raw_output_contents.append(array.tobytes())
        return answer


@contextmanager
def serving(model: str, run: Run) -> Iterator[str]:
    """The address of a server for ``model``."""
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Server(model, run), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
