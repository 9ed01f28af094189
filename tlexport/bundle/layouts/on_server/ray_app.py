"""A Ray Serve application: one ONNX graph, batched, over the Open Inference Protocol v2 (HTTP, JSON and binary tensors)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

HEADER = "inference-header-content-length"
LARGEST = 256 << 20
TYPES = {
    "tensor(float)": ("FP32", np.float32), "tensor(double)": ("FP64", np.float64), "tensor(float16)": ("FP16", np.float16),
    "tensor(uint8)": ("UINT8", np.uint8), "tensor(int8)": ("INT8", np.int8), "tensor(int32)": ("INT32", np.int32),
    "tensor(int64)": ("INT64", np.int64), "tensor(bool)": ("BOOL", np.bool_),
}  # fmt: skip


class BadRequest(Exception):
    """What the client sent cannot be answered; the text says why."""


@serve.deployment
class Model:
    def __init__(self, args: dict[str, Any]) -> None:
        """Load the graph, after its SHA-256 was found to be the one in serve.yaml."""
        import onnxruntime

        graph = Path(args["model"]).read_bytes()
        if hashlib.sha256(graph).hexdigest() != args["sha256"]:
            raise RuntimeError("the graph is not the file that was deployed (SHA-256)")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args["threads"]
        provider = "CUDAExecutionProvider" if args["cuda"] else "CPUExecutionProvider"
        self.session = onnxruntime.InferenceSession(graph, options, providers=[provider])
        if self.session.get_providers()[0] != provider:
            raise RuntimeError(f"{provider} does not work here")
        self.name, self.version = args["name"], str(args["version"])
        self.max_samples = args["max_samples"]
        self.inputs = {one.name: (*TYPES[one.type], one.shape) for one in self.session.get_inputs()}
        self.outputs = {one.name: (*TYPES[one.type], one.shape) for one in self.session.get_outputs()}
        self.infer.set_max_batch_size(args["max_batch"])

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=0.0)
    async def infer(self, requests: list[dict[str, np.ndarray]]) -> list[Any]:
        """Whole requests in one run; each gets its own rows. A run that fails is repeated one by one, so that one bad request
        fails alone.
        """
        try:
            return self._run(requests)
        except Exception as error:  # noqa: BLE001 (the failure is the answer to whoever caused it)
            if len(requests) == 1:
                return [error]
            return [answer for one in requests for answer in await self._alone(one)]

    async def _alone(self, request: dict[str, np.ndarray]) -> list[Any]:
        try:
            return self._run([request])
        except Exception as error:  # noqa: BLE001
            return [error]

    def _run(self, requests: list[dict[str, np.ndarray]]) -> list[Any]:
        merged = {name: np.concatenate([own[name] for own in requests]) for name in self.inputs}
        outputs = self.session.run(list(self.outputs), merged)
        ends = np.cumsum([len(next(iter(own.values()))) for own in requests])
        starts = [0, *ends[:-1]]
        return [
            dict(zip(self.outputs, (o[a:b] for o in outputs), strict=True))
            for a, b in zip(starts, ends, strict=True)
        ]

    async def __call__(self, request: Request) -> Response:
        try:
            return await self._routed(request)
        except BadRequest as error:
            return JSONResponse({"error": str(error)}, 400)

    async def _routed(self, request: Request) -> Response:
        path = request.url.path.rstrip("/")
        models = {f"/v2/models/{self.name}", f"/v2/models/{self.name}/versions/{self.version}"}
        if path in ("/v2/health/live", "/v2/health/ready") or path in {f"{one}/ready" for one in models}:
            return Response(status_code=200)
        if path == "/v2":
            return JSONResponse(
                {"name": "tlexport on Ray Serve", "version": "1", "extensions": ["binary_tensor_data"]}
            )
        if path in models:
            return JSONResponse(self._metadata())
        if path in {f"{one}/infer" for one in models}:
            if request.method != "POST":
                return JSONResponse({"error": "infer is asked by POST"}, 405)
            return await self._inferred(request)
        return JSONResponse(
            {"error": f"there is no {path} (model: {self.name}, version {self.version})"}, 404
        )

    def _metadata(self) -> dict[str, Any]:
        def told(specs: dict[str, Any]) -> list[dict[str, Any]]:
            return [
                {"name": name, "datatype": dtype, "shape": [-1 if isinstance(d, str) else d for d in shape]}
                for name, (dtype, _, shape) in specs.items()
            ]

        return {
            "name": self.name,
            "versions": [self.version],
            "platform": "onnxruntime_onnx",
            "inputs": told(self.inputs),
            "outputs": told(self.outputs),
        }

    async def _inferred(self, request: Request) -> Response:
        body = await _body(request)
        length = int(request.headers.get(HEADER, len(body)))
        document, arrays = self._decoded(body, length)
        answer = await self.infer(arrays)
        if isinstance(answer, Exception):
            return JSONResponse({"error": f"{type(answer).__name__}: {answer}"}, 500)
        return self._encoded(document, answer)

    def _decoded(self, body: bytes, length: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        try:
            document = json.loads(body[:length])
            sent = {one["name"]: one for one in document["inputs"]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadRequest(f"no inference request of protocol v2: {error!r}") from error
        if sent.keys() != self.inputs.keys() or len(sent) != len(document["inputs"]):
            raise BadRequest(f"inputs must be {', '.join(self.inputs)}, once each")
        at, arrays = length, {}
        for name, one in sent.items():
            dtype, numpy_dtype, _ = self.inputs[name]
            arrays[name], at = _tensor(one, dtype, numpy_dtype, body, at)
        for name, array in arrays.items():
            self._fits(name, array)
        if at != len(body):
            raise BadRequest(f"{len(body) - at} bytes belong to no input")
        if len({len(array) for array in arrays.values()}) != 1:
            raise BadRequest("inputs differ in their number of samples")
        return document, arrays

    def _fits(self, name: str, array: np.ndarray) -> None:
        shape = self.inputs[name][2]
        fits = array.ndim == len(shape) and all(
            isinstance(d, str) or d == n for d, n in zip(shape, array.shape, strict=True)
        )
        if not fits or not 1 <= len(array) <= self.max_samples:
            raise BadRequest(
                f"{name} has shape {list(array.shape)}; the graph takes {shape}, 1 to {self.max_samples} samples"
            )

    def _encoded(self, document: dict[str, Any], answer: dict[str, np.ndarray]) -> Response:
        asked = {one["name"]: one.get("parameters", {}) for one in document.get("outputs", [])}
        if unknown := asked.keys() - answer.keys():
            raise BadRequest(
                f"there is no output {', '.join(sorted(unknown))} (there are: {', '.join(answer)})"
            )
        every = document.get("parameters", {}).get("binary_data_output", False)
        outputs, blobs = [], []
        for name in asked or answer:
            array = np.ascontiguousarray(answer[name])
            told: dict[str, Any] = {
                "name": name,
                "datatype": self.outputs[name][0],
                "shape": list(array.shape),
            }
            if asked.get(name, {}).get("binary_data", every):
                blobs.append(array.tobytes())
                told["parameters"] = {"binary_data_size": len(blobs[-1])}
            else:
                told["data"] = array.reshape(-1).tolist()
            outputs.append(told)
        own = {"id": document["id"]} if "id" in document else {}
        head = json.dumps(
            {**own, "model_name": self.name, "model_version": self.version, "outputs": outputs}
        ).encode()
        if not blobs:
            return Response(head, media_type="application/json")
        return Response(
            b"".join([head, *blobs]), media_type="application/octet-stream", headers={HEADER: str(len(head))}
        )


async def _body(request: Request) -> bytes:
    """Bounded while it arrives."""
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > LARGEST:
            raise BadRequest(f"more than {LARGEST >> 20} MiB")
        chunks.append(chunk)
    return b"".join(chunks)


def _tensor(
    one: dict[str, Any], dtype: str, numpy_dtype: Any, body: bytes, at: int
) -> tuple[np.ndarray, int]:
    if one.get("datatype") != dtype:
        raise BadRequest(f"{one['name']} is {one.get('datatype')}; the graph takes {dtype}")
    try:
        size = one.get("parameters", {}).get("binary_data_size")
        if size is None:
            return np.asarray(one["data"], numpy_dtype).reshape(one["shape"]), at
        flat = np.frombuffer(body[at : at + size], numpy_dtype)
        return flat.reshape(one["shape"]), at + size
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise BadRequest(f"{one['name']} cannot be read: {error}") from error


def application(args: dict[str, Any]) -> Any:
    """What serve.yaml's import_path names."""
    return Model.bind(args)
