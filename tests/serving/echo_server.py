"""A server of an ONNX graph that answers with its input, for tests: python echo_server.py SETTINGS.json.

Its folder holds `version`, a text that names the version to serve; `refuse` in it makes the version one that may not be
served, `slow` one that takes `slow` seconds to load, `wide-N` one whose x has N columns. `delay` seconds are slept in each run.
A sample whose first value is -1 fails the run it is in; of one whose first value is -2, the answer lacks an output.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from tlexport.errors import BundleError
from tlexport.serving import connection, server
from tlexport.serving.batcher import Limits
from tlexport.serving.place import Bound, Place
from tlexport.serving.protocol import Interface
from tlexport.serving.service import Settings
from tlexport.serving.slot import Model
from tlexport.tensors import TensorSpec

NAME, WIDTH, LARGEST = "echo", 4, 16


def interface(width: int) -> Interface:
    return Interface(
        inputs=(
            TensorSpec(name="x", dtype="float32", shape=("batch", width)),
            TensorSpec(name="mark", dtype="int64", shape=("batch",)),
        ),
        outputs=(
            TensorSpec(name="y", dtype="float32", shape=("batch", width)),
            TensorSpec(name="stamp", dtype="int64", shape=("batch",)),
        ),
        largest=LARGEST,
    )


def graph(width: int) -> bytes:
    pairs = [("x", "y", TensorProto.FLOAT, ["batch", width]), ("mark", "stamp", TensorProto.INT64, ["batch"])]
    made = helper.make_graph(
        [helper.make_node("Identity", [x], [y]) for x, y, _, _ in pairs],
        "echo",
        [helper.make_tensor_value_info(x, kind, shape) for x, _, kind, shape in pairs],
        [helper.make_tensor_value_info(y, kind, shape) for _, y, kind, shape in pairs],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


class Echo(server.Source):
    def __init__(self, folder: Path, settings: dict) -> None:
        self.folder, self.settings = folder, settings

    def state(self) -> str | None:
        return (self.folder / "version").read_text()

    def load(self) -> Model:
        version = (self.folder / "version").read_text()
        if "refuse" in version:
            raise BundleError(f"{version} was planted")
        width = int(version.removeprefix("wide-")) if version.startswith("wide-") else WIDTH
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(graph(width), options, providers=["CPUExecutionProvider"])
        end = time.monotonic() + self.settings.get("slow", 0.0) * ("slow" in version)
        while time.monotonic() < end:
            onnxruntime.InferenceSession(graph(width), options, providers=["CPUExecutionProvider"])

        def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if self.settings["delay"]:
                time.sleep(self.settings["delay"])
            if (inputs["x"][:, 0] == -1).any():
                raise RuntimeError("poison")
            y, stamp = session.run(["y", "stamp"], inputs)
            return {"y": y} if (y[:, 0] == -2).any() else {"y": y, "stamp": stamp}

        limits = Limits(self.settings["batch"], self.settings["queue"], inline=self.settings["inline"])
        runs = (run,) * self.settings["workers"]
        return Model(NAME, version, "onnx_onnxv1", interface(width), runs, limits, lambda: None)


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    place = {name: Path(v) if name in ("certificate", "key") else v for name, v in settings["place"].items()}
    token = settings["token"]
    connection.PATIENCE.update(settings["patience"])

    def ready(bound: Bound) -> None:
        print(json.dumps({**bound.__dict__, "process": os.getpid()}), flush=True)

    ended = server.run(
        Echo(Path(sys.argv[1]).parent, settings),
        Settings(timeout=settings["timeout"], token=token.encode() if token else None, access_log=True),
        Place(**{"port": 0, "grpc_port": 0, **place}),
        sys.stderr,
        ready,
    )
    if not ended:
        os._exit(0)


if __name__ == "__main__":
    main()
