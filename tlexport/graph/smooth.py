"""SmoothQuant: the loud channels behind a normalisation quietened, and the weights that read them raised instead.

A normalisation's own factor and term for each channel take up the division, so that it costs nothing (G. Xiao et al.
2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", arXiv:2211.10438).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import NodeProto

from tlexport.graph import inspect, probe, rescaling
from tlexport.graph.rescaling import Graph, Region


def smooth(
    model: onnx.ModelProto, batches: Sequence[probe.Batch], *, alpha: float | None = 0.5
) -> onnx.ModelProto:
    """The FP32 graph, computing the same, with the input of every product behind a normalisation smoothed on `batches`.

    `alpha` in [0, 1] is the share of the difference between channels that the weights take (eq. 4), None chooses it for
    each region; of several readers (separate Q, K and V) the largest weight counts. Ranges have to be calibrated anew. A graph without
    `regions(model)` is returned as it is. Requires FP32. Raises ExportError if `alpha` is out of range, `batches` is
    empty or the output changed beyond rounding.
    """
    inspect.require_fp32(model, "smoothing")
    return rescaling.balance(model, regions(model), batches, alpha, "smoothing")


def regions(model: onnx.ModelProto) -> list[Region]:
    """The outputs of LayerNormalization, or of a factor for each channel, that only products read, terms added included."""
    return rescaling.regions(model, _normalises)


def _normalises(node: NodeProto, graph: Graph) -> bool:
    """LayerNormalization over the last axis; spelt out (also RMSNorm) it ends in a Mul with a vector."""
    vectors = [
        name for name in node.input if name in graph.constants and len(graph.constants[name].dims) == 1
    ]
    if node.op_type == "LayerNormalization":
        return len(vectors) == sum(map(bool, node.input)) - 1 and not any(node.output[1:])
    return node.op_type == "Mul" and len(vectors) == 1 and graph.constants[vectors[0]].dims[0] > 1
