"""One INT8 graph by one of the makers that bench/quantize.py compares with, each used as its documentation says.

Runs in the interpreter that has the maker installed, so it imports nothing of tlexport. Writes the graph to --out, and
beside it (.json) `{seconds, versions, settings}`, or `{missing}` where the maker is not installed there. The seconds
are the maker's calls alone, without the imports.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 16
PACKAGES = ("onnxruntime-gpu", "onnxruntime", "nvidia-modelopt", "nncf", "onnx", "onnxslim", "numpy")
PRODUCTS = ("Conv", "Gemm", "MatMul")


class Reader:
    """onnxruntime.quantization's CalibrationDataReader over an array [n, ...], some samples at a time."""

    def __init__(self, name: str, samples: np.ndarray, batch: int) -> None:
        self.name, self.samples, self.batch = name, samples, batch
        self.rewind()

    def rewind(self) -> None:
        self.left = self._batches()

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(self.samples), self.batch):
            yield {self.name: self.samples[start : start + self.batch]}


def ort_cpu(options: argparse.Namespace, samples: np.ndarray) -> dict[str, Any]:
    """As ONNX Runtime's guide says for x86: prepared, Q/DQ, per channel, U8 activations, 7-bit weights without VNNI."""
    from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process, quantize_static

    prepared = options.out.with_suffix(".prepared.onnx")
    quant_pre_process(options.fp32, prepared)
    quantize_static(
        prepared,
        options.out,
        Reader(input_of(prepared), samples, BATCH),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        reduce_range=not options.vnni,
    )
    prepared.unlink()
    return {"pre_process": True, "per_channel": True, "activations": "U8", "reduce_range": not options.vnni}


def ort_trt(options: argparse.Namespace, samples: np.ndarray) -> dict[str, Any]:
    """The form that TensorRT takes: symmetric, only products, their biases left in float."""
    from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process, quantize_static

    prepared = options.out.with_suffix(".prepared.onnx")
    quant_pre_process(options.fp32, prepared)
    quantize_static(
        prepared,
        options.out,
        Reader(input_of(prepared), samples, BATCH),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=list(PRODUCTS),
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "DedicatedQDQPair": True,
            "OpTypesToExcludeOutputQuantization": list(PRODUCTS),
        },
    )
    prepared.unlink()
    return {"pre_process": True, "per_channel": True, "activations": "S8", "symmetric": True}


def modelopt(options: argparse.Namespace, samples: np.ndarray) -> dict[str, Any]:
    """NVIDIA's own for TensorRT. FP32 beside INT8: with its default, FP16, the comparison would be another one."""
    from modelopt.onnx.quantization import quantize

    method = "max" if options.maker == "modelopt-max" else "entropy"
    quantize(
        str(options.fp32),
        quantize_mode="int8",
        calibration_data={input_of(options.fp32): samples},
        calibration_method=method,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(options.out),
        log_level="WARNING",
    )
    return {"calibration_method": method, "high_precision_dtype": "fp32"}


def nncf(options: argparse.Namespace, samples: np.ndarray) -> dict[str, Any]:
    """NNCF's basic flow, and with `nncf-accuracy` its flow with accuracy control on the run's validation samples."""
    import nncf as library
    import onnx

    model = onnx.load(options.fp32)
    name = input_of(options.fp32)
    transformer = any(node.op_type == "LayerNormalization" for node in model.graph.node)
    settings: dict[str, Any] = {
        "target_device": library.TargetDevice.CPU,
        "model_type": library.ModelType.TRANSFORMER if transformer else None,
        "subset_size": len(samples),
    }
    calibration = library.Dataset([{name: samples[i : i + 1]} for i in range(len(samples))])
    if options.maker == "nncf":
        made = library.quantize(model, calibration, **settings)
    else:
        inputs = np.load(options.validation / "inputs.npy", allow_pickle=False)
        labels = np.load(options.validation / "labels.npy", allow_pickle=False)
        rows = [slice(start, start + BATCH) for start in range(0, len(inputs), BATCH)]
        pairs = [(inputs[of], labels[of]) for of in rows]
        validation = library.Dataset(pairs, lambda pair: {name: pair[0]})
        made = library.quantize_with_accuracy_control(
            model,
            calibration,
            validation,
            lambda candidate, parts: measured(candidate, parts, name, options.metric),
            max_drop=options.max_drop,
            drop_type=library.DropType.ABSOLUTE,
            **settings,
        )
    onnx.save(made, options.out)
    return {key: str(value) for key, value in settings.items()} | {"bias_correction": "fast"}


def measured(model: Any, parts: Any, name: str, metric: str) -> tuple[float, None]:
    """The metric of NNCF's candidate over pairs of images and labels; no sample has a value of its own."""
    import onnxruntime

    content = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    pairs = list(parts)
    outputs = np.concatenate([session.run(None, {name: images})[0] for images, _ in pairs])
    labels = np.concatenate([np.ravel(of) for _, of in pairs])
    if metric == "accuracy":
        return float((decided(outputs) == labels).mean()), None
    from sklearn.metrics import roc_auc_score

    scores = outputs[:, -1] if outputs.shape[1] <= 2 else outputs
    return float(roc_auc_score(labels, scores, multi_class="ovr")), None


def decided(outputs: np.ndarray) -> np.ndarray:
    """Class of each row: the largest probability, or one column's above a half."""
    return (outputs[:, 0] > 0.5).astype(int) if outputs.shape[1] == 1 else outputs.argmax(1)


def input_of(graph: Path) -> str:
    """The name of the graph's only input."""
    import onnx

    (value,) = onnx.load(graph, load_external_data=False).graph.input
    return str(value.name)


MAKERS: dict[tuple[str, str], Callable[[argparse.Namespace, np.ndarray], dict[str, Any]]] = {
    ("onnxruntime", "cpu"): ort_cpu,
    ("onnxruntime", "trt"): ort_trt,
    ("modelopt", "trt"): modelopt,
    ("modelopt-max", "trt"): modelopt,
    ("nncf", "cpu"): nncf,
    ("nncf-accuracy", "cpu"): nncf,
}
NEEDS = {
    "onnxruntime": "onnxruntime.quantization",
    "modelopt": "modelopt.onnx.quantization",
    "modelopt-max": "modelopt.onnx.quantization",
    "nncf": "nncf",
    "nncf-accuracy": "nncf",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("maker", choices=list(NEEDS))
    parser.add_argument("flavour", choices=("cpu", "trt"))
    parser.add_argument("--fp32", type=Path, required=True, help="graph with one input")
    parser.add_argument(
        "--calibration", type=Path, required=True, help=".npy, samples as the graph takes them"
    )
    parser.add_argument("--validation", type=Path, required=True, help="folder of inputs.npy and labels.npy")
    parser.add_argument("--metric", choices=("accuracy", "auc"), required=True)
    parser.add_argument("--max-drop", type=float, default=0.005)
    parser.add_argument("--vnni", action="store_true", help="the CPU sums 8-bit products in 32 bits")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    report = options.out.with_suffix(".json")
    try:
        __import__(NEEDS[options.maker])
    except ImportError as error:
        report.write_text(json.dumps({"missing": f"{NEEDS[options.maker]}: {error}"}))
        sys.exit(0)
    samples = np.load(options.calibration, allow_pickle=False)
    started = time.monotonic()
    settings = MAKERS[options.maker, options.flavour](options, samples)
    seconds = round(time.monotonic() - started, 2)
    report.write_text(json.dumps({"seconds": seconds, "versions": versions(), "settings": settings}))


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
