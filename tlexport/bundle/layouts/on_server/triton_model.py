"""Triton's python backend: one ONNX graph in ONNX Runtime. Needs numpy and onnxruntime in the server's Python, nothing else."""

from __future__ import annotations

import ctypes
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph, after its SHA-256 was found to be the one in config.pbtxt."""
        import onnxruntime

        _require_true_arrays()
        config = json.loads(args["model_config"])
        told = {key: own["string_value"] for key, own in config["parameters"].items()}
        graph = (Path(args["model_repository"]) / args["model_version"] / told["file"]).read_bytes()
        if hashlib.sha256(graph).hexdigest() != told["sha256"]:
            raise pb_utils.TritonModelException(f"{told['file']} is not the file that was deployed (SHA-256)")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(told["threads"])
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(graph, options, providers=_providers(args))
        self.inputs = [own["name"] for own in config["input"]]
        self.outputs = [own["name"] for own in config["output"]]
        pb_utils.Logger.log_info(
            f"{args['model_name']} {args['model_version']}: {self.session.get_providers()[0]}"
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """All requests of a batch in one run; each gets its own rows of the answer."""
        try:
            answers = self._run(
                [
                    {n: pb_utils.get_input_tensor_by_name(r, n).as_numpy() for n in self.inputs}
                    for r in requests
                ]
            )
        except Exception as error:  # noqa: BLE001 (any failure is the answer to these requests, not the end of the server)
            failed = pb_utils.TritonError(f"{type(error).__name__}: {error}")
            return [pb_utils.InferenceResponse(error=failed) for _ in requests]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(n, own[n]) for n in self.outputs if n in r.requested_output_names()]
            )
            for r, own in zip(requests, answers)  # noqa: B905 (Triton's Python may be older than strict=)
        ]

    def _run(self, arrays: list[dict[str, Any]]) -> list[dict[str, Any]]:
        merged = {
            n: np.concatenate([own[n] for own in arrays]) if len(arrays) > 1 else arrays[0][n]
            for n in self.inputs
        }
        outputs = dict(zip(self.outputs, self.session.run(self.outputs, merged)))  # noqa: B905
        ends = np.cumsum([len(own[self.inputs[0]]) for own in arrays])
        starts = [0, *ends[:-1]]
        return [{n: outputs[n][a:b] for n in self.outputs} for a, b in zip(starts, ends)]  # noqa: B905

    def finalize(self) -> None:
        self.session = None


def _require_true_arrays() -> None:
    """Raises TritonModelException where arrays come out of the backend otherwise than they were lent to it.

    One that is built for numpy 1 (Triton up to 2.51) hands out wrong values under numpy 2, without an error.
    """
    if int(np.__version__.partition(".")[0]) < 2:
        return
    sent = np.arange(1, 7, dtype=np.float32)
    capsule = sent.__dlpack__()
    # Kept for good: the backend gives it another name than DLPack's, over which numpy's destructor would stumble.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(capsule))

    class Lent:
        def __dlpack__(self, stream: Any = None) -> Any:
            return capsule

        def __dlpack_device__(self) -> tuple[int, int]:
            return 1, 0  # a CPU's memory

    if not np.array_equal(pb_utils.Tensor.from_dlpack("lent", Lent()).as_numpy(), sent):
        raise pb_utils.TritonModelException(
            f"this Triton's python backend is built for numpy 1 and gives wrong values under numpy {np.__version__}: "
            "install numpy<2 in its Python"
        )


def _providers(args: dict[str, str]) -> list[Any]:
    if args["model_instance_kind"] == "GPU":
        return [("CUDAExecutionProvider", {"device_id": args["model_instance_device_id"]})]
    return ["CPUExecutionProvider"]
