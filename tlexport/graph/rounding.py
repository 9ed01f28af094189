"""AdaRound: which weights to round up and which down, learnt so that their errors cancel in the product's output.

The nearest integer is best for a weight by itself, not for the sum it is part of (M. Nagel et al. 2020, "Up or Down?
Adaptive Rounding for Post-Training Quantization", arXiv:2004.10568). A layer's squared error is a quadratic form in its weights,
of the second moments of its inputs; it is minimised over these, so that the time does not depend on the samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from tlexport.errors import ExportError
from tlexport.graph import inspect, patches, probe
from tlexport.graph.grid import Flavour, Range
from tlexport.graph.quantize import quantize
from tlexport.graph.walk import Walk

ITERATIONS = 200
POSITIONS = 64  # outputs looked at in each sample of each layer
PRIOR = 0.01  # of the inputs' mean power, added to each: what the samples lack in variety must not be free
RATE, WEIGHT = 0.1, 0.3  # of Adam, and of the term that drives the choices to 0 and 1
SHARP = (20.0, 2.0)  # its exponent beta at the start and at the end (section 4)
WARM = 0.2  # share of the iterations without it
STRETCH = 0.1  # of the sigmoid beyond 0 and 1 on either side (eq. 23)


def learn_rounding(
    model: onnx.ModelProto,
    batches: Sequence[probe.Batch],
    ranges: Mapping[str, Range],
    flavour: Flavour,
    *,
    exclude: Collection[str] = (),
    reduce_range: bool = False,
    layers: Collection[str] | None = None,
    iterations: int = ITERATIONS,
) -> onnx.ModelProto:
    """The FP32 graph with weights on their grids, of which `quantize` with the same arguments makes the integers learnt.

    Layer by layer in the graph's order: the input as the layers before, rounded as learnt, hand it on, the output wanted
    FP32's (asymmetric reconstruction, eq. 25, without the activation function). A row of weights for which nearest
    rounding is as good keeps it. `layers` names the products to learn, None all in 8 bits with a constant matrix; a weight that several
    nodes share keeps nearest rounding, and so does a channel whose bias sets its scale (`cpu`).

    The scale of a channel is set by its largest |w|, which keeps its value. Other settings than these need their own
    result; biases may still be corrected afterwards, with `model` as the reference. Memory grows with the samples as in `correct_biases`.

    Raises what `quantize` raises, and ExportError if `batches` is empty, a name in `layers` is no such product, or
    `quantize` would make other integers than those learnt.
    """
    quantised = quantize(model, ranges, flavour, exclude=exclude, reduce_range=reduce_range)
    if not batches:
        raise ExportError("learning to round got no samples; it needs at least one of the training split")
    largest = 63 if reduce_range else 127
    exact, rounded = Walk(model, batches), Walk(quantised, batches)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    learnt: dict[str, np.ndarray] = {}
    for node in _learnable(model, quantised, layers):
        moments = _moments(node, exact, rounded, tensors[node.input[1]])
        weight = numpy_helper.to_array(tensors[node.input[1]])
        scale = _scale(quantised, node)
        choice = _Layer(weight, scale, node, largest)
        integers = choice.learn(moments, iterations)
        values = choice.weights(integers)
        learnt[node.name] = patches.like(weight, integers, node)
        tensors[node.input[1]].CopyFrom(numpy_helper.from_array(values, node.input[1]))
        dequantised = rounded.before(node.output[0]).input[1]
        for each in rounded.values:
            each[dequantised] = patches.like(weight, integers * choice.scale, node).astype(np.float32)
    _ensure_reproduced(quantize(result, ranges, flavour, exclude=exclude, reduce_range=reduce_range), learnt)
    return result


class _Moments(NamedTuple):
    """Sums over positions: of q q^T and of q x^T, [groups, K, K]; q is the quantised input, x FP32's."""

    quantised: np.ndarray
    crossed: np.ndarray


class _Layer:
    """One product's weights in units of their steps, as rows [groups, outputs, K]."""

    def __init__(self, weight: np.ndarray, scale: np.ndarray, node: NodeProto, largest: int) -> None:
        self.weight, self.node = weight, node
        rows = patches.rows_of(weight, node).astype(np.float64)
        self.scale = scale.astype(np.float64).reshape(*rows.shape[:2], 1)
        self.steps = rows / self.scale
        most = np.abs(self.steps).max(axis=2, keepdims=True)
        self.largest = largest
        widest = np.abs(self.steps) == most
        self.fixed = widest | (
            np.abs(most - largest) > 1e-3
        )  # the latter: a bias, or nothing at all, set the scale
        self.nearest = np.clip(np.rint(self.steps), -largest, largest)

    def learn(self, moments: _Moments, iterations: int) -> np.ndarray:
        """The integers: row by row the choice learnt, or the nearest where that is as good."""
        power = np.trace(moments.quantised, axis1=1, axis2=2)[:, None, None] / moments.quantised.shape[1]
        if not power.any():
            return self.nearest
        power = np.maximum(power, np.finfo(np.float32).tiny)
        prior = PRIOR * np.eye(self.steps.shape[2])
        curve = moments.quantised / power + prior
        target = self.steps @ (moments.crossed / power + prior).transpose(0, 2, 1)
        found = np.where(self.fixed, self.nearest, self._relaxed(curve, target, iterations))

        def error(integers: np.ndarray) -> np.ndarray:
            return np.asarray(((integers @ curve - 2 * target) * integers).sum(axis=2, keepdims=True))

        return np.where(error(found) < error(self.nearest), found, self.nearest)

    def weights(self, integers: np.ndarray) -> np.ndarray:
        """float32, in the weight's own shape: on the grid, but for those that keep their value."""
        rows = np.where(self.fixed, patches.rows_of(self.weight, self.node), integers * self.scale)
        return patches.like(self.weight, rows.astype(np.float32), self.node)

    def _relaxed(self, curve: np.ndarray, target: np.ndarray, iterations: int) -> np.ndarray:
        """Integers from choices in [0, 1] that gradient descent moves, and a growing term drives apart (eq. 21 to 24)."""
        import torch

        quadratic, linear = (torch.from_numpy(each.astype(np.float32)) for each in (curve, target))
        down = torch.from_numpy(np.floor(self.steps).astype(np.float32))
        fixed = torch.from_numpy(self.fixed)
        nearest = torch.from_numpy(self.nearest.astype(np.float32))
        width = 1 + 2 * STRETCH
        start = torch.from_numpy((self.steps - np.floor(self.steps)).astype(np.float32))
        choice = torch.logit((start + STRETCH) / width)
        adam = torch.optim.Adam([choice], lr=RATE, fused=True)
        for iteration in range(iterations):
            sigmoid = torch.sigmoid(choice)
            up = (sigmoid * width - STRETCH).clamp_(0, 1)
            slope = (torch.where(fixed, nearest, down + up) @ quadratic).sub_(linear).mul_(2)
            progress = (iteration / iterations - WARM) / (1 - WARM)
            if progress > 0:
                beta = SHARP[1] + (SHARP[0] - SHARP[1]) * (1 - progress)
                side = up * 2 - 1
                slope -= 2 * WEIGHT * beta * side.abs().pow_(beta - 1).copysign_(side)
            choice.grad = slope.mul_(sigmoid).mul_(1 - sigmoid).mul_(width).mul_((up > 0) & (up < 1))
            adam.step()
        return np.asarray((down + (choice >= 0)).numpy().astype(np.float64))


def _learnable(
    model: onnx.ModelProto, quantised: onnx.ModelProto, layers: Collection[str] | None
) -> list[NodeProto]:
    """The products to learn, in the graph's order."""
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    uses = Counter(name for node in model.graph.node for name in node.input)
    types = inspect.compute_dtypes(quantised)
    possible = [
        node
        for node in model.graph.node
        if types.get(node.name) == "int8"
        and (ranks.get(node.input[1]) == 2 or (node.op_type == "Conv" and node.input[1] in ranks))
        and not (node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute))
    ]
    names = [node.name for node in possible]
    if unknown := sorted(set(layers or ()) - set(names)):
        raise ExportError(
            f"no product in 8 bits with a constant matrix is named {', '.join(unknown)} (there are: {', '.join(names[:8])} ...)"
        )
    return [node for node in possible if uses[node.input[1]] == 1 and (layers is None or node.name in layers)]


def _moments(node: NodeProto, exact: Walk, rounded: Walk, weight: onnx.TensorProto) -> _Moments:
    """Second moments at random positions of every sample, both walks at the same ones."""
    source, kernel = node.input[0], tuple(weight.dims[2:])
    exact.before(node.output[0])
    dequantised = rounded.before(node.output[0]).input[0]
    sums: list[np.ndarray] = []
    for seed, (wanted, given) in enumerate(zip(exact.values, rounded.values, strict=True)):
        chosen = patches.places(wanted[source], node, kernel, POSITIONS, seed)
        x = patches.patches(wanted[source], node, kernel, chosen)
        q = patches.patches(given[dequantised], node, kernel, chosen)
        parts = [q.transpose(0, 2, 1) @ q, q.transpose(0, 2, 1) @ x]
        sums = parts if not sums else [total + part for total, part in zip(sums, parts, strict=True)]
    return _Moments(*(total.astype(np.float64) for total in sums))


def _scale(quantised: onnx.ModelProto, node: NodeProto) -> np.ndarray:
    """The scale of each output channel that `quantize` gave the product's weight."""
    producers = {name: each for each in quantised.graph.node for name in each.output}
    product = producers[node.output[0]]
    return _constant(quantised, producers[product.input[1]].input[1])


def _constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


def _ensure_reproduced(quantised: onnx.ModelProto, learnt: Mapping[str, np.ndarray]) -> None:
    producers = {name: node for node in quantised.graph.node for name in node.output}
    for node in quantised.graph.node:
        if node.name in learnt:
            integers = _constant(quantised, producers[node.input[1]].input[0])
            if not np.array_equal(integers, learnt[node.name]):
                different = int((integers != learnt[node.name]).sum())
                raise ExportError(
                    f"{different} of {integers.size} weights of {node.name!r} are quantised to other integers than those "
                    "learnt; build without learning to round"
                )
