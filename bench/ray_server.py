"""The smallest application for Ray Serve that answers the Open Inference Protocol for an ONNX graph, one replica.

ray_server.py BUNDLE PORT THREADS: serves the bundle's graph for the CPU until it is terminated.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from tlexport.bundle import manifest, preflight
from tlexport.serving import datatypes, protocol
from tlexport.serving.datatypes import ProtocolError


@serve.deployment(max_ongoing_requests=256)
class Graph:
    def __init__(self, bundle: str, threads: int) -> None:
        document = preflight.check(Path(bundle))
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        path = Path(bundle) / document.targets["cpu"].file
        self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.document = document
        self.interface = protocol.Interface(document.inputs, document.outputs, document.batch.max)

    async def __call__(self, request: Request) -> Response:
        path = request.url.path
        if path == "/v2":
            return _json({"name": "ray", "version": ray.__version__, "extensions": ["binary_tensor_data"]})
        if path.startswith("/v2/health") or path.endswith("/ready"):
            return _json({})
        if path == f"/v2/models/{self.document.name}":
            return _json(_metadata(self.document))
        length = request.headers.get(protocol.HEADER_LENGTH)
        try:
            asked = protocol.decode_request(
                await request.body(), int(length) if length else None, self.interface
            )
        except ProtocolError as error:
            return Response(protocol.error_body(str(error)), error.status)
        made = self.session.run(None, dict(asked.inputs))
        outputs = dict(zip((of.name for of in self.document.outputs), made, strict=True))
        body, size = protocol.encode_response(self.document.name, "1", asked, outputs)
        headers = {} if size is None else {protocol.HEADER_LENGTH: str(size)}
        return Response(body, headers=headers, media_type="application/octet-stream")


def _json(document: dict[str, Any]) -> Response:
    return Response(json.dumps(document), media_type="application/json")


def _metadata(document: manifest.Manifest) -> dict[str, Any]:
    def told(specs: Any) -> list[dict[str, Any]]:
        return [
            {
                "name": of.name,
                "datatype": datatypes.DATATYPE[of.dtype],
                "shape": [-1 if isinstance(side, str) else side for side in of.shape],
            }
            for of in specs
        ]

    return {
        "name": document.name,
        "versions": ["1"],
        "platform": "onnx_onnxv1",
        "inputs": told(document.inputs),
        "outputs": told(document.outputs),
    }


def main(bundle: str, port: int, threads: int) -> None:
    ray.init(include_dashboard=False, configure_logging=False, num_cpus=4)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
    serve.run(Graph.bind(bundle, threads))
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
