"""Bias correction: the mean that quantisation adds to a product's output, taken out of its bias again.

Rounded weights and clipped activations shift the mean of every output channel, and what follows adds the shifts up (M.
Nagel et al. 2019, arXiv:1906.04721, section 4.2). The shift is measured on calibration samples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from tlexport.errors import ExportError
from tlexport.graph import inspect, probe
from tlexport.graph.grid import Flavour, Range
from tlexport.graph.quantize import quantize
from tlexport.graph.walk import Walk


def correct_biases(
    model: onnx.ModelProto,
    batches: Sequence[probe.Batch],
    ranges: Mapping[str, Range],
    flavour: Flavour,
    *,
    exclude: Collection[str] = (),
    reduce_range: bool = False,
    reference: onnx.ModelProto | None = None,
) -> onnx.ModelProto:
    """The FP32 graph whose products, quantised with the same arguments, have the mean outputs that FP32 has.

    FP32 is `reference`, or `model` itself. Weights that were learnt to round (`rounding`) no longer compute what they
    did, so that the graph from before that has to be given; it has the same tensors.

    Takes each Conv, and each Gemm and MatMul with a constant matrix on the right, that `quantize` makes 8 bits of. A product
    without a bias gets one: a MatMul in the Add behind it, which is made where there is none. The products are
    corrected in the graph's order, each with all before it corrected. Memory grows with the samples (a photograph of 224 pixels
    takes 5 to 20 MB); 32 will do.

    The result itself no longer computes what `model` does. Raises what `quantize` raises, and ExportError if `batches`
    is empty or the means, measured in the graph quantised anew, did not come nearer.
    """
    quantised = quantize(model, ranges, flavour, exclude=exclude, reduce_range=reduce_range)
    biased, sites = _with_biases(model, inspect.compute_dtypes(quantised))
    if not sites:
        return model
    quantised = quantize(biased, ranges, flavour, exclude=exclude, reduce_range=reduce_range)
    expected = _moments(model if reference is None else reference, batches, sites)
    before = _shift(_moments(quantised, batches, sites), expected)
    result = _corrected(biased, sites, _corrections(quantised, batches, sites, expected))
    quantised = quantize(result, ranges, flavour, exclude=exclude, reduce_range=reduce_range)
    after = _shift(_moments(quantised, batches, sites), expected)
    if not after <= before:
        raise ExportError(
            f"bias correction left the mean outputs of {len(sites)} products further from FP32's ({after:.1e} of their "
            f"squares, {before:.1e} before); build without it"
        )
    return result


STEPS = 4  # of Newton's method


@dataclass(frozen=True)
class _Site:
    """A product's bias, the tensor that it is the last thing added to, and where the mean is to be right.

    That is behind a Relu or Clip: noise before it changes the mean behind it even where the mean before is right.
    """

    bias: str
    output: str
    axis: int  # of the channels in the output
    beta: float = 1.0  # what the product multiplies its bias by
    seen: str = ""
    low: float = -np.inf
    high: float = np.inf


class _Moments:
    """Of a tensor's channels [C]: the mean, and the mean square over all."""

    def __init__(self) -> None:
        self.total: np.ndarray | float = 0.0
        self.squares = 0.0
        self.count = 0

    def observe(self, values: np.ndarray, axis: int) -> None:
        others = tuple(d for d in range(values.ndim) if d != axis % values.ndim)
        self.total = self.total + values.sum(axis=others, dtype=np.float64)
        self.squares += float(np.square(values).sum(dtype=np.float64))
        self.count += values.size // values.shape[axis]

    @property
    def mean(self) -> np.ndarray:
        return np.asarray(self.total / self.count)


def _moments(
    model: onnx.ModelProto, batches: Sequence[probe.Batch], sites: Sequence[_Site]
) -> list[_Moments]:
    names = [site.seen for site in sites]
    session = probe.session(model, names)
    moments = [_Moments() for _ in sites]
    for batch in batches:
        for site, moment, values in zip(sites, moments, session.run(names, dict(batch)), strict=True):
            moment.observe(values, site.axis)
    if not moments[0].count:
        raise ExportError("bias correction got no samples; it needs at least one of the training split")
    return moments


def _shift(found: Sequence[_Moments], expected: Sequence[_Moments]) -> float:
    """The mean over products of their squared shifts as a share of the output's squares; NaN stays NaN."""
    shares = [
        np.square(now.mean - then.mean).sum() / max(then.squares / then.count, np.finfo(np.float32).tiny)
        for now, then in zip(found, expected, strict=True)
    ]
    return float(np.mean(shares))


def _corrections(
    quantised: onnx.ModelProto,
    batches: Sequence[probe.Batch],
    sites: Sequence[_Site],
    expected: Sequence[_Moments],
) -> list[np.ndarray]:
    """What each output's channels [C] lack, where all outputs before have been given what they lacked."""
    walk = Walk(quantised, batches)
    lacking = []
    for site, then in zip(sites, expected, strict=True):
        walk.through(site.output)
        outputs = [values[site.output] for values in walk.values]
        shape = [-1 if d == site.axis % outputs[0].ndim else 1 for d in range(outputs[0].ndim)]
        lacking.append(_lack(outputs, site, then.mean, shape))
        for values in walk.values:
            values[site.output] = values[site.output] + lacking[-1].reshape(shape)
    return lacking


def _lack(outputs: Sequence[np.ndarray], site: _Site, mean: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """float32 [C] to add so that the means behind the activation are `mean`, by Newton's method.

    The slope of a mean of clipped values is the share that is not clipped. A channel that the samples leave almost all
    clipped is moved no faster than if a tenth were not.
    """
    lack = np.zeros(len(mean), np.float32)
    for _ in range(STEPS if np.isfinite([site.low, site.high]).any() else 1):
        moments, inside = _Moments(), _Moments()
        for values in outputs:
            moved = values + lack.reshape(shape)
            moments.observe(np.clip(moved, site.low, site.high), site.axis)
            inside.observe((moved > site.low) & (moved < site.high), site.axis)
        lack += ((mean - moments.mean) / np.maximum(inside.mean, 0.1)).astype(np.float32)
    return lack


def _corrected(
    model: onnx.ModelProto, sites: Sequence[_Site], corrections: Sequence[np.ndarray]
) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    for site, correction in zip(sites, corrections, strict=True):
        bias = numpy_helper.to_array(tensors[site.bias]) + correction / site.beta
        tensors[site.bias].CopyFrom(numpy_helper.from_array(bias.astype(np.float32), site.bias))
    return result


def _with_biases(model: onnx.ModelProto, dtypes: Mapping[str, str]) -> tuple[onnx.ModelProto, list[_Site]]:
    """A copy, computing the same, in which every product in 8 bits has a bias that it shares with nobody."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    biases = _Biases(result)
    sites = []
    for node in result.graph.node:
        weight = biases.constants.get(node.input[1]) if dtypes.get(node.name) == "int8" else None
        if weight is None or (node.op_type != "Conv" and weight.ndim != 2):
            continue
        site = (
            biases.of_matmul(node, weight.shape[1]) if node.op_type == "MatMul" else biases.of(node, weight)
        )
        sites += [biases.with_activation(site)] if site else []
    nodes = [each for node in result.graph.node for each in (node, *biases.added.get(node.output[0], ()))]
    reordered = onnx.GraphProto(node=nodes)
    del result.graph.node[:]
    result.graph.node.extend(reordered.node)
    places = {output: place for place, node in enumerate(result.graph.node) for output in node.output}
    return result, sorted(sites, key=lambda site: places[site.output])


class _Biases:
    """Finds each product's bias among a graph's nodes, or makes it; the nodes are changed in place.

    `added` are the nodes to stand behind the one that makes a tensor.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.graph.initializer}
        self.outputs = {value.name for value in self.graph.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        self.added: dict[str, list[NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)

    def of(self, product: NodeProto, weight: np.ndarray) -> _Site | None:
        """Of a Conv or Gemm; None if its bias is computed or differs from row to row."""
        settings = {a.name: helper.get_attribute_value(a) for a in product.attribute}
        rows_first = product.op_type == "Conv" or settings.get("transB", 0)
        channels, beta = weight.shape[0 if rows_first else 1], float(settings.get("beta", 1.0))
        product.input.extend([""] * (3 - len(product.input)))
        name = product.input[2]
        if beta == 0 or (name and not self._is_vector(name, channels)):
            return None
        product.input[2] = self._own(name, channels, product.output[0])
        return _Site(product.input[2], product.output[0], 1 if product.op_type == "Conv" else -1, beta)

    def of_matmul(self, product: NodeProto, channels: int) -> _Site:
        """Its bias is added by the node that alone reads it, or by one made here under the product's own output name."""
        output = product.output[0]
        following = self.readers[output]
        if len(following) == 1 and following[0].op_type == "Add" and output not in self.outputs:
            add = following[0]
            place = 1 - list(add.input).index(output)
            if self._is_vector(add.input[place], channels):
                add.input[place] = self._own(add.input[place], channels, add.output[0])
                return _Site(add.input[place], add.output[0], -1)
        product.output[0] = f"{output}/product"
        bias = self._own("", channels, output)
        add = helper.make_node("Add", [product.output[0], bias], [output], f"{output}/Add")
        self.added[product.output[0]] = [add]
        return _Site(bias, output, -1)

    def with_activation(self, site: _Site) -> _Site:
        """The site, its mean seen behind the Relu or Clip that alone reads the output."""
        following = self.readers[site.output]
        if len(following) != 1 or following[0].op_type not in ("Relu", "Clip") or site.output in self.outputs:
            return replace(site, seen=site.output)
        activation = following[0]
        bounds = [-np.inf, np.inf] if activation.op_type == "Clip" else [0.0, np.inf]
        for place, name in enumerate(activation.input[1:]):
            if name and name not in self.constants:
                return replace(site, seen=site.output)
            bounds[place] = float(self.constants[name].item()) if name else bounds[place]
        return replace(site, seen=activation.output[0], low=bounds[0], high=bounds[1])

    def _is_vector(self, name: str, channels: int) -> bool:
        """A constant that adds one and the same vector [channels] everywhere."""
        value = self.constants.get(name)
        return (
            value is not None and value.size in (1, channels) and value.shape[-1:] in ((), (1,), (channels,))
        )

    def _own(self, name: str, channels: int, output: str) -> str:
        """The name of a constant [channels] that nobody else reads, with the value of the one named or zero."""
        value = self.constants[name] if name else np.zeros(channels, np.float32)
        if name and value.shape == (channels,) and len(self.readers[name]) == 1:
            return name
        own = f"{output}/bias"
        values = np.broadcast_to(value.ravel(), channels)
        self.graph.initializer.append(numpy_helper.from_array(np.array(values), own))
        return own
