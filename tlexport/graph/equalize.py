"""Cross-layer equalisation: channels of unlike loudness between two products brought to one range.

An activation has one scale for all its channels, so that a loud one takes the resolution of all others. Where only
homogeneous operators stand between the products that make it and those that read it, every channel may have a factor
of its own (M. Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv:1906.04721, section 4.1). Ours compares the activation's measured range with the reading weights' one: the making
weights have a scale for each output channel and do not mind.

Clip is not homogeneous. Its bound could move with the factor only as a Min with a constant for each channel, which no
backend fuses into the product; behind a ReLU6 no channel is louder than 6 anyway. Such pairs are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from tlexport.graph import inspect, probe, rescaling
from tlexport.graph.rescaling import Region


def equalize(
    model: onnx.ModelProto, batches: Sequence[probe.Batch], *, alpha: float | None = None
) -> onnx.ModelProto:
    """The FP32 graph, computing the same, with every region of `regions(model)` equalised on `batches`.

    `alpha` in [0, 1] is the share of the difference between channels that the weights take; None chooses it for each
    region. Ranges have to be calibrated anew. A graph without such a region is returned as it is. Requires FP32.
    Raises ExportError if `alpha` is out of range, `batches` is empty or the output changed beyond rounding.
    """
    inspect.require_fp32(model, "equalisation")
    return rescaling.balance(model, regions(model), batches, alpha, "equalisation")


def regions(model: onnx.ModelProto) -> list[Region]:
    """Where channels can be equalised: between products with constant weights, none shared, and only Relu, sums, pooling."""
    return rescaling.regions(model, lambda node, graph: graph.is_product(node))
