"""ONNX Runtime sessions that show what a graph computes on the way."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import onnx

from tlexport import cores
from tlexport.errors import ExportError
from tlexport.graph import inspect

ROUNDING = (
    1e-4  # of the root mean square: 10 to 100 times what reordered FP32 sums of a deep network differ by
)

Batch = Mapping[str, np.ndarray]


def session(model: onnx.ModelProto, tensors: Collection[str]) -> Any:
    """An ONNX Runtime session of the graph with the float32 tensors as outputs, in this order.

    Raises ExportError naming a tensor that the graph lacks or that is of another type.
    """
    types = inspect.element_types(model)
    if strange := [name for name in tensors if types.get(name) != onnx.TensorProto.FLOAT]:
        raise ExportError(
            f"only float32 tensors of the graph can be calibrated, not {', '.join(strange[:5])}"
        )
    return showing(model, tensors)


def showing(model: onnx.ModelProto, tensors: Collection[str]) -> Any:
    """As `session`, for tensors that are known to be float32."""
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    observed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors
    )
    return loaded(observed)


def loaded(model: onnx.ModelProto) -> Any:
    """A session that computes what the graph is typed with: no low-precision kernel replaces Q, DQ and product."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = cores.usable()
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def read_by(node: onnx.NodeProto) -> set[str]:
    """Names that the node reads, also in the branches of If, Loop and Scan (and there the names of their own)."""
    names = {name for name in node.input if name}
    for entry in node.attribute:
        for inner in (*([entry.g] if entry.HasField("g") else []), *entry.graphs):
            names |= {value.name for value in inner.output}
            for each in inner.node:
                names |= read_by(each)
    return names


def require_same_outputs(
    before: onnx.ModelProto, after: onnx.ModelProto, batches: Iterable[Batch], change: str
) -> None:
    """Raise ExportError, naming the `change`, unless both FP32 graphs agree to rounding on every batch.

    The root mean square of the difference may be 1e-4 of that of the output as it varies about its mean: softmax's
    constant share says nothing.
    """
    names = [value.name for value in before.graph.output]
    sessions = [session(model, names) for model in (before, after)]
    difference, spread, samples = np.zeros(len(names)), np.zeros(len(names)), 0
    for batch in batches:
        samples += len(next(iter(batch.values())))
        expected, found = (each.run(names, dict(batch)) for each in sessions)
        for index, (old, new) in enumerate(zip(expected, found, strict=True)):
            if not np.isfinite(new).all():
                raise ExportError(f"{change} made NaN or infinity in {names[index]!r}; build without it")
            difference[index] += np.square(new.astype(np.float64) - old).sum()
            spread[index] += np.square(old - old.mean(dtype=np.float64)).sum()
    if not samples:
        raise ExportError(
            f"{change} got no samples to be checked on; it needs at least one of the training split"
        )
    limit = ROUNDING**2 * spread + np.finfo(np.float32).eps ** 2
    for name, far, about, most in zip(names, difference, spread, limit, strict=True):
        if far > most:
            raise ExportError(
                f"{change} changed the FP32 output {name!r} by {np.sqrt(far / max(about, 1e-300)):.1e} of its spread, "
                f"where rounding explains {ROUNDING:.0e}; build without it"
            )
