"""What fitting a plain model gives, and the checks that its graph must pass before it is offered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport.modalities.dataset import Dataset

if TYPE_CHECKING:
    import onnx

TOLERANCE = (
    1e-4  # of a probability, or of a value's spread: the libraries compute in float64, graphs in float32
)


@dataclass(frozen=True)
class Fitted:
    """`val` and `test` are what it serves, float32 [n, K]; `graph` is ONNX with the data's own inputs, None: see `why_not`."""

    name: str
    description: str
    val: NDArray[np.float32]
    test: NDArray[np.float32]
    graph: bytes | None
    inputs: tuple[str, ...]
    why_not: str
    seconds: float


def checked(
    graph: onnx.ModelProto, data: Dataset, inputs: NDArray[Any], name: str, expected: NDArray[Any]
) -> tuple[bytes | None, str]:
    """The graph's bytes with metadata, if ONNX Runtime answers the validation rows as the library did; else why not."""
    import onnx
    import onnxruntime as ort

    metadata = {
        "task": data.task,
        "class_names": json.dumps(data.class_names),
        "preprocessing": json.dumps(data.preprocessing.describe()),
    }
    onnx.helper.set_model_props(graph, metadata)
    content = graph.SerializeToString()
    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {name: inputs})
    error = float(np.abs(got - expected).max())
    scale = max(1.0, float(np.ptp(expected))) if data.task == "regression" else 1.0
    if got.shape != expected.shape or not error <= TOLERANCE * scale:
        return None, f"its ONNX graph differs from the library by {error:.2g} on the validation rows"
    return content, ""
