"""Bundles of small networks with a mistake planted in the graph that is served, and the embedded server with a fault behind it.

As a program it serves a graph until it is terminated: planted.py GRAPH NAME LARGEST PORTS_FILE FAULT
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tlexport.bundle import manifest
from tlexport.graph import inspect, trace
from tlexport.results import Variant
from tlexport.run import write_json
from tlexport.serving.place import Bound, Place
from tlexport.tensors import Profile, named

LARGEST = 8


def outputs(graph: onnx.ModelProto, samples: np.ndarray) -> np.ndarray:
    import onnxruntime as ort

    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, named(samples, [of.name for of in session.get_inputs()]))[0]


def bundle(
    folder: Path, graph: onnx.ModelProto, samples: np.ndarray, modality: str, preprocessing: dict[str, Any] | None = None,
    *, task: str = "multiclass", precision: str = "fp32",
) -> Path:  # fmt: skip
    """A bundle whose variant is the graph itself and whose golden answers are its own."""
    inputs, made = inspect.io(graph)
    expected = outputs(graph, samples)
    beside = folder.parent / f"{folder.name}-files"
    beside.mkdir()
    np.save(beside / "inputs.npy", samples)
    np.save(beside / "outputs.npy", expected)
    variant = Variant(
        name=f"cpu-onnxruntime-{precision}", backend="onnxruntime", target="cpu", precision=precision, threads=1,
        max_abs_error=0.0, verdict="pass",
    )  # fmt: skip
    document = manifest.Manifest(
        name="planted",
        modality=modality,
        backbone="test",
        task=task,
        classes=tuple(f"class {k}" for k in range(expected.shape[1])),
        preprocessing=preprocessing or {},
        inputs=tuple(inputs),
        outputs=tuple(made),
        batch=Profile(min=1, opt=1, max=LARGEST),
        metric="accuracy",
        reference=1.0,
        gates={},
        targets={
            "cpu": manifest.Entry(
                variant=variant, file="models/cpu/model.onnx", receipt="models/cpu/receipt.json", reason=""
            )
        },
        provenance={},
    )
    weights = graph.SerializeToString()
    sources: dict[str, Path | bytes] = {
        "graphs/fp32.onnx": weights,
        "models/cpu/model.onnx": weights,
        "models/cpu/receipt.json": b"{}",
        "golden/inputs.npy": beside / "inputs.npy",
        "golden/outputs.npy": beside / "outputs.npy",
    }
    manifest.write(document, sources, folder)
    return folder


@dataclass(frozen=True)
class Plant:
    """Nodes between a graph's input and what reads it, or between what makes its output and the output."""

    nodes: Callable[[str, str], list[onnx.NodeProto]]  # (from, to)
    constants: Mapping[str, np.ndarray]
    behind: bool = False


def _image(make: Callable[[str, str], list[onnx.NodeProto]], **constants: np.ndarray) -> Plant:
    return Plant(make, constants)


def _gather(order: list[int], axis: int, *, behind: bool = False) -> Plant:
    return Plant(
        lambda given, made: [helper.make_node("Gather", [given, "order"], [made], axis=axis)],
        {"order": np.array(order)},
        behind,
    )


def _floats(body: Callable[[str, str], list[onnx.NodeProto]]) -> Callable[[str, str], list[onnx.NodeProto]]:
    """From bytes to bytes by way of float32, rounded."""

    def nodes(given: str, made: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Cast", [given], ["as_float"], to=TensorProto.FLOAT),
            *body("as_float", "changed"),
            helper.make_node("Round", ["changed"], ["rounded"]),
            helper.make_node("Cast", ["rounded"], [made], to=TensorProto.UINT8),
        ]

    return nodes


def images(size: int) -> dict[str, Plant]:
    """Mistake, by the first words of its name -> how it is made, for [n, 3, size, size] bytes."""
    larger = round(size * 256 / 224)
    start = (larger - size) // 2
    half = size // 2

    def scaled(by: str, **settings: Any) -> Callable[[str, str], list[onnx.NodeProto]]:
        return lambda given, made: [
            helper.make_node("Cast", [given], ["as_float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["as_float", by], [made], **settings),
        ]

    def zoom(given: str, made: str) -> list[onnx.NodeProto]:
        resize = helper.make_node("Resize", [given, "", "", "sizes"], ["large"], mode="linear", axes=[2, 3])
        return [resize, helper.make_node("Slice", ["large", "begin", "end", "axes"], [made])]

    def nearest(given: str, made: str) -> list[onnx.NodeProto]:
        down = {"mode": "nearest", "axes": [2, 3], "nearest_mode": "round_prefer_ceil"}
        return [
            helper.make_node("Resize", [given, "", "", "half"], ["small"], **down),
            helper.make_node("Resize", ["small", "", "", "full"], [made], **down),
        ]

    return {
        "BGR for RGB": _gather([2, 1, 0], 1),
        "inverted grey levels": _image(
            lambda given, made: [helper.make_node("Sub", ["white", given], [made])],
            white=np.array(255, np.uint8),
        ),
        "0-1 for 0-255: the pixels": _image(scaled("share"), share=np.array(1 / 255, np.float32)),
        "-1..1 for 0-255": _image(
            lambda given, made: [
                *scaled("share")(given, "scaled"),
                helper.make_node("Sub", ["scaled", "one"], [made]),
            ],
            share=np.array(1 / 127.5, np.float32),
            one=np.array(1, np.float32),
        ),
        "NHWC for NCHW": _image(
            lambda given, made: [
                helper.make_node("Transpose", [given], ["turned"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", ["turned", "shape"], [made]),
            ],
            shape=np.array([-1, 3, size, size]),
        ),
        "upside down": _gather(list(range(size))[::-1], 2),
        "wrong resize: scaled to 256/224": _image(
            _floats(zoom),
            sizes=np.array([larger, larger]),
            begin=np.array([start, start]),
            end=np.array([start + size, start + size]),
            axes=np.array([2, 3]),
        ),
        "wrong resize: nearest": _image(
            _floats(nearest), half=np.array([half, half]), full=np.array([size, size])
        ),
    }


def _filled(given: str, made: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("IsNaN", [given], ["missing"]),
        helper.make_node("Where", ["missing", "zero", given], [made]),
    ]


def tables(columns: int) -> dict[str, Plant]:
    swapped = list(range(columns))
    swapped[0], swapped[2] = 2, 0
    return {
        "missing values as zeros": Plant(_filled, {"zero": np.array(0, np.float32)}),
        "columns swapped: a and c": _gather(swapped, 1),
        "columns in reverse order": _gather(list(range(columns))[::-1], 1),
    }


def windows(days: int) -> dict[str, Plant]:
    def returns(given: str, made: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Slice", [given, "one", "many", "axis"], ["later"]),
            helper.make_node("Slice", [given, "zero", "last", "axis"], ["earlier"]),
            helper.make_node("Div", ["later", "earlier"], ["growth"]),
            helper.make_node("Sub", ["growth", "unit"], ["returns"]),
            helper.make_node("Pad", ["returns", "padding"], [made]),
        ]

    whole = {
        "zero": [0],
        "one": [1],
        "many": [days],
        "last": [-1],
        "axis": [1],
        "padding": [0, 1, 0, 0, 0, 0],
    }
    return {
        "reversed time": _gather(list(range(days))[::-1], 1),
        "returns for prices": Plant(
            returns,
            {**{name: np.array(of) for name, of in whole.items()}, "unit": np.array(1, np.float32)},
        ),
    }


def answers(classes: int) -> dict[str, Plant]:
    """Behind the model."""
    return {
        "permuted classes": _gather([1, 0, *range(2, classes)], 1, behind=True),
        "softmax applied twice": Plant(
            lambda given, made: [helper.make_node("Softmax", [given], [made], axis=1)], {}, behind=True
        ),
        "logits for probabilities": Plant(
            lambda given, made: [
                helper.make_node("Log", [given], ["logarithms"]),
                helper.make_node("Add", ["logarithms", "any"], [made]),
            ],
            {"any": np.array(0.7, np.float32)},
            behind=True,
        ),
    }


def drifted(by: float) -> Plant:
    return Plant(
        lambda given, made: [helper.make_node("Add", [given, "drift"], [made])],
        {"drift": np.array(by, np.float32)},
        behind=True,
    )


def batch_in_the_bits() -> Plant:
    """Another rounding at each batch size, as kernels have that add in another order: 1e-7 a sample is added."""
    return Plant(
        lambda given, made: [
            helper.make_node("Shape", [given], ["size"], end=1),
            helper.make_node("Cast", ["size"], ["samples"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["samples", "share"], ["rounding"]),
            helper.make_node("Add", [given, "rounding"], [made]),
        ],
        {"share": np.array(1e-7, np.float32)},
        behind=True,
    )


def planted(graph: onnx.ModelProto, plant: Plant) -> onnx.ModelProto:
    """A copy of a graph of one input and one output with the nodes in it."""
    made = onnx.ModelProto()
    made.CopyFrom(graph)
    end = made.graph.output[0].name if plant.behind else made.graph.input[0].name
    for node in made.graph.node:
        names = node.output if plant.behind else node.input
        for index, name in enumerate(names):
            if name == end:
                names[index] = f"{end}_right"
    nodes = plant.nodes(f"{end}_right", end) if plant.behind else plant.nodes(end, f"{end}_right")
    for name, value in plant.constants.items():
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"planted_{name}"))
    for node in nodes:
        for index, name in enumerate(node.input):
            if name in plant.constants:
                node.input[index] = f"planted_{name}"
    if plant.behind:
        made.graph.node.extend(nodes)
    else:
        for place, node in enumerate(nodes):
            made.graph.node.insert(place, node)
    onnx.checker.check_model(made)
    return made


@contextlib.contextmanager
def served(graph: onnx.ModelProto, folder: Path, fault: str = "") -> Iterator[Bound]:
    """The embedded server with this graph behind it, in a process of its own on ports of its own."""
    for name in ("grpc", "httptools", "prometheus_client", "uvloop"):
        pytest.importorskip(name)
    folder.mkdir(parents=True, exist_ok=True)
    path, ports = folder / "served.onnx", folder / "ports.json"
    trace.save(graph, path)
    command = [sys.executable, __file__, str(path), "planted", str(LARGEST), str(ports), fault]
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(command, stderr=log)
        try:
            until = time.monotonic() + 120
            while not ports.is_file():
                assert child.poll() is None and time.monotonic() < until, (folder / "log").read_text()
                time.sleep(0.02)
            yield Bound(**json.loads(ports.read_text()))
        finally:
            child.terminate()
            child.wait(60)


def main(graph: Path, name: str, largest: int, ports: Path, fault: str) -> None:
    import onnxruntime as ort

    from tlexport.serving import server
    from tlexport.serving.batcher import Limits
    from tlexport.serving.protocol import Interface
    from tlexport.serving.service import Settings
    from tlexport.serving.slot import Model

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    inputs, made = inspect.io(trace.load(graph))
    calls = [0]

    def samples(tensors: dict[str, np.ndarray]) -> int:
        return len(next(iter(tensors.values())))

    def run(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        calls[0] += 1
        if fault == "split":
            each = [{key: of[[row]] for key, of in tensors.items()} for row in range(samples(tensors))]
            found = np.concatenate([session.run(None, one)[0] for one in each])
        elif fault == "padded":
            whole = {key: np.resize(of, (largest, *of.shape[1:])) for key, of in tensors.items()}
            found = session.run(None, whole)[0][: samples(tensors)]
        else:
            found = session.run(None, tensors)[0]
        if fault == "swapped":  # within a batch, whoever's samples are in it
            found = found[::-1].copy()
        if fault == "not finite" and calls[0] % 2:
            found = np.full_like(found, np.nan)
        if fault == "rounded":
            found = np.nextafter(found, np.float32(2))
        if fault == "slow":
            time.sleep(0.02)
        return {made[0].name: found}

    class Source(server.Source):
        def state(self) -> str:
            return "one"

        def load(self) -> Model:
            return Model(
                name=name,
                version="1",
                platform="onnx_onnxv1",
                interface=Interface(tuple(inputs), tuple(made), largest),
                runs=(run,),
                limits=Limits(batch=largest, queue=4 if fault == "slow" else 1024),
                close=lambda: None,
            )

    with ports.with_suffix(".log").open("w") as log:
        place = Place(port=0, grpc_port=0)
        server.run(Source(), Settings(), place, log, lambda bound: write_json(ports, bound.__dict__))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
