"""Runs in Triton's environment: golden samples over HTTP and gRPC, held against a session of the same ONNX Runtime there.

triton_client.py HTTP_PORT GRPC_PORT MODEL GRAPH GOLDEN.npy    one JSON object of what was equal
triton_client.py raw HTTP_PORT MODEL IN.npy FILES...           outputs of an ensemble for encoded files, as lists
triton_client.py parse CONFIG...                               what protobuf's own reader makes of each config.pbtxt
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def compared(http_port: str, grpc_port: str, name: str, graph: str, golden: str) -> dict[str, object]:
    import onnxruntime
    import tritonclient.grpc
    import tritonclient.http

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    (entry,), (out,) = session.get_inputs(), session.get_outputs()
    samples = np.load(golden)[:16]
    found: dict[str, object] = {"versions": []}
    for kind, module, port in (
        ("http", tritonclient.http, http_port),
        ("grpc", tritonclient.grpc, grpc_port),
    ):
        client = module.InferenceServerClient(f"127.0.0.1:{port}")
        equal = []
        for batch in (samples[:1], samples[1:2], samples[:3], samples[:4]):
            tensor = module.InferInput(entry.name, list(batch.shape), _datatype(batch.dtype))
            tensor.set_data_from_numpy(batch)
            answer = client.infer(name, [tensor])
            expected = session.run([out.name], {entry.name: batch})[0]
            equal.append(answer.as_numpy(out.name).tobytes() == expected.tobytes())
            version = (
                answer.get_response()["model_version"]
                if kind == "http"
                else answer.get_response().model_version
            )
            found["versions"].append(version)
        found[kind] = equal
        client.close()
    found["merged"] = _merged(http_port, name, entry.name, out.name, samples, session)
    return found


def _merged(port: str, name: str, entry: str, out: str, samples: np.ndarray, session: object) -> float:
    """Many clients at once, so that requests are batched: the largest difference from the local session."""
    import tritonclient.http as module

    def ask(index: int) -> float:
        batch = samples[index % len(samples)][None]
        with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
            tensor = module.InferInput(entry, list(batch.shape), _datatype(batch.dtype))
            tensor.set_data_from_numpy(batch)
            answer = client.infer(name, [tensor]).as_numpy(out)
        return float(np.abs(answer - session.run([out], {entry: batch})[0]).max())

    with ThreadPoolExecutor(8) as pool:
        return max(pool.map(ask, range(64)))


def raw(port: str, name: str, *files: str) -> dict[str, object]:
    import tritonclient.http as module

    with module.InferenceServerClient(f"127.0.0.1:{port}") as client:
        config = client.get_model_config(name)
        (out,) = (own["name"] for own in config["output"])
        answers = []
        for file in files:
            content = np.array([[Path(file).read_bytes()]], object)
            tensor = module.InferInput(config["input"][0]["name"], [1, 1], "BYTES")
            tensor.set_data_from_numpy(content)
            try:
                answers.append(client.infer(name, [tensor]).as_numpy(out)[0].astype(float).tolist())
            except Exception as error:  # noqa: BLE001 (what the server says is what is looked at)
                answers.append(str(error))
    return {"answers": answers}


def parse(*files: str) -> dict[str, object]:
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    found = {}
    for file in files:
        message = text_format.Parse(Path(file).read_text(), model_config_pb2.ModelConfig())
        found[file] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return found


def _datatype(dtype: np.dtype) -> str:
    from tritonclient.utils import np_to_triton_dtype

    return np_to_triton_dtype(dtype)


if __name__ == "__main__":
    call = {"raw": raw, "parse": parse}.get(sys.argv[1])
    sys.stdout.write(json.dumps(call(*sys.argv[2:]) if call else compared(*sys.argv[1:])))
