"""The smallest server that KServe's package gives for an ONNX graph. Runs in an environment of its own: no tlexport in it.

kserve_server.py GRAPH NAME HTTP_PORT GRPC_PORT THREADS. It listens on every address; keep it behind a firewall.
"""

import sys

import numpy as np
import onnxruntime as ort
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer
from kserve.utils.utils import generate_uuid

DATATYPES = {"float32": "FP32", "float64": "FP64", "int64": "INT64"}


class Graph(Model):
    def __init__(self, name: str, path: str, threads: int) -> None:
        super().__init__(name)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.ready = True

    async def get_input_types(self) -> list[dict]:
        return [_stated(of) for of in self.session.get_inputs()]

    async def get_output_types(self) -> list[dict]:
        return [_stated(of) for of in self.session.get_outputs()]

    def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        made = self.session.run(None, {of.name: of.as_numpy() for of in payload.inputs})
        outputs = []
        for of, array in zip(self.session.get_outputs(), made, strict=True):
            output = InferOutput(of.name, list(array.shape), DATATYPES[array.dtype.name])
            output.set_data_from_numpy(np.ascontiguousarray(array), binary_data=True)
            outputs.append(output)
        return InferResponse(payload.id or generate_uuid(), self.name, outputs)


def _stated(of) -> dict:
    words = {
        "tensor(float)": "FP32",
        "tensor(uint8)": "UINT8",
        "tensor(int64)": "INT64",
        "tensor(int32)": "INT32",
    }
    shape = [side if isinstance(side, int) else -1 for side in of.shape]
    return {"name": of.name, "datatype": words[of.type], "shape": shape}


if __name__ == "__main__":
    graph, name, http, grpc, threads = sys.argv[1:]
    ModelServer(http_port=int(http), grpc_port=int(grpc), workers=1).start([Graph(name, graph, int(threads))])
