"""Channels of activations divided by factors that the constants around them take up, so that the graph computes the same.

Dividing a channel by s > 0 commutes with what is homogeneous and keeps channels apart: Relu, pooling, sums. The tensors
that these tie together form a `Region`. At its rim stand the operators with constants that make the channels (their
constants are divided) and the products that read them (their weights are multiplied).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from tlexport.errors import ExportError
from tlexport.graph import inspect, probe
from tlexport.graph.grid import DEAD

_HOMOGENEOUS = ("Relu", "LeakyRelu", "Identity", "Add", "Sub")
_POOLING = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of alpha

_TRAILING, _SECOND = (
    -1,
    1,
)  # where channels lie: behind matrix products and LayerNormalization, behind convolutions


@dataclass
class Region:
    """Tensors whose channels can only be scaled together. Nodes are meant by name, constants too."""

    axis: int  # of the channels in every tensor: 1 or -1
    channels: int = 0
    tensors: dict[str, None] = field(default_factory=dict)
    producers: dict[str, NodeProto] = field(default_factory=dict)
    readers: dict[str, NodeProto] = field(default_factory=dict)
    terms: dict[str, str] = field(default_factory=dict)  # constant added inside -> tensor that the sum is

    @property
    def quantised(self) -> list[str]:
        """The tensors that products read."""
        return list(dict.fromkeys(node.input[0] for node in self.readers.values()))


class Graph:
    """What a search for regions asks of a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.nodes = list(graph.node)
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in graph.node for name in node.output if name}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self.readers[name].append(node)
        self.outside = {value.name for value in (*graph.output, *graph.input)}
        for node in graph.node:
            self.outside |= probe.read_by(node) - set(node.input)
        inferred = onnx.shape_inference.infer_shapes(model).graph
        self.shapes = {
            value.name: [d.dim_value or None for d in value.type.tensor_type.shape.dim]
            for value in (*inferred.input, *inferred.value_info, *inferred.output)
        }

    def value(self, constant: str) -> np.ndarray:
        return numpy_helper.to_array(self.constants[constant])

    def axis(self, node: NodeProto) -> int:
        return _SECOND if node.op_type == "Conv" else _TRAILING

    def is_product(self, node: NodeProto) -> bool:
        """A Conv, or a Gemm or MatMul with a constant matrix on the right."""
        if node.op_type not in inspect.QUANTISABLE or node.input[1] not in self.constants:
            return False
        matrix = node.op_type == "Conv" or len(self.constants[node.input[1]].dims) == 2
        return matrix and not attribute(node, "transA", 0)

    def owned(self, names: Iterable[str]) -> bool:
        """All are constants that one node alone reads."""
        return all(
            name in self.constants and len(self.readers[name]) == 1 and name not in self.outside
            for name in names
        )


def regions(model: onnx.ModelProto, is_producer: Callable[[NodeProto, Graph], bool]) -> list[Region]:
    """Every region that a node with `is_producer` makes, all of whose producers have it, in the graph's order.

    Left out are those that reach an input or output of the graph, an operator that is not homogeneous (Clip, the smooth
    activations) or does not keep channels apart, a weight that several nodes share, and a channel count that is not known.
    """
    graph = Graph(model)
    found: list[Region] = []
    seen: set[str] = set()
    for node in graph.nodes:
        if node.output[0] in seen or not is_producer(node, graph):
            continue
        region = _grow(graph, node, is_producer)
        if region is not None:
            seen |= set(region.tensors)
            found.append(region)
    return found


def rescaled(model: onnx.ModelProto, factors: Iterable[tuple[Region, np.ndarray]]) -> onnx.ModelProto:
    """A copy in which channel c of each region's tensors is divided by its factor [C], positive, computing the same."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = Graph(result)
    values: dict[str, np.ndarray] = {}

    def value(name: str) -> np.ndarray:
        return values[name] if name in values else graph.value(name).astype(np.float64)

    for region, factor in factors:
        for node in region.readers.values():
            values[node.input[1]] = _scale_input(value(node.input[1]), factor, node)
        for node in region.producers.values():
            for name in node.input:
                if name in graph.constants:
                    values[name] = _scale_output(value(name), 1 / factor, node, name)
        for name, total in region.terms.items():
            values[name] = _scale_term(value(name), 1 / factor, region.axis, len(graph.shapes[total]))
    for tensor in result.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name].astype(np.float32), tensor.name))
    return result


def attribute(node: NodeProto, name: str, default: int) -> int:
    return next((int(helper.get_attribute_value(a)) for a in node.attribute if a.name == name), default)


def balance(
    model: onnx.ModelProto,
    found: Sequence[Region],
    batches: Sequence[probe.Batch],
    alpha: float | None,
    change: str,
) -> onnx.ModelProto:
    """`model` with every region balanced on `batches`; raises ExportError naming the `change` if it computes anything else."""
    if alpha is not None and not 0 <= alpha <= 1:
        raise ExportError(f"alpha, the weights' share of the difference, is from 0 to 1, not {alpha}")
    if not found:
        return model
    graph = Graph(model)
    factors = [
        (region, balanced(region, loud, graph, alpha))
        for region, loud in zip(found, loudness(model, found, batches), strict=True)
    ]
    result = rescaled(model, factors)
    probe.require_same_outputs(model, result, batches, change)
    return result


class Loudness(NamedTuple):
    """Of a region's channels [C], over the tensors that products read: the largest |x|, and the mean of x^2."""

    largest: np.ndarray
    power: np.ndarray


def loudness(
    model: onnx.ModelProto, found: Sequence[Region], batches: Iterable[probe.Batch]
) -> list[Loudness]:
    """Measure each region. Raises ExportError if there is no batch or an activation is not finite."""
    wanted = list(dict.fromkeys(name for region in found for name in region.quantised))
    session = probe.session(model, wanted)
    largest = [np.zeros(region.channels) for region in found]
    power = [np.zeros(region.channels) for region in found]
    count = 0
    for batch in batches:
        values = dict(zip(wanted, session.run(wanted, dict(batch)), strict=True))
        samples = len(next(iter(batch.values())))
        count += samples
        for region, most, squares in zip(found, largest, power, strict=True):
            for name in region.quantised:
                by_channel = np.moveaxis(values[name], region.axis, 0).reshape(region.channels, -1)
                np.maximum(most, np.abs(by_channel).max(axis=1), out=most)
                squares += (
                    np.square(by_channel).mean(axis=1, dtype=np.float64) * samples / len(region.quantised)
                )
    if not count:
        raise ExportError("rescaling got no samples; it needs at least one of the training split")
    if strange := [
        r.quantised[0] for r, most in zip(found, largest, strict=True) if not np.isfinite(most).all()
    ]:
        raise ExportError(f"NaN or infinity on the calibration samples in {', '.join(strange[:5])}")
    return [Loudness(most, squares / count) for most, squares in zip(largest, power, strict=True)]


def balanced(region: Region, loud: Loudness, graph: Graph, alpha: float | None) -> np.ndarray:
    """Factors [C] to divide activations by: |x|^alpha / |w|^(1 - alpha) of the largest of each channel.

    At alpha = 1/2 both ranges become equal (M. Nagel et al. 2019, arXiv:1906.04721, eq. 11); G. Xiao et al. 2022,
    arXiv:2211.10438, eq. 4, for any. None: of 0.3 to 1, and of leaving the region alone, what `_noise` foresees least of.
    A channel quieter than a sixteenth of the loudest is taken for that much: the samples may have missed what it can
    do, and it has won four bits. The loudest |x| stays as it is; a channel that no weight reads is left alone.
    """
    blocks = [_by_input(graph.value(node.input[1]), node) for node in region.readers.values()]
    weights = np.max([np.abs(block).max(axis=(1, 3)).ravel() for block in blocks], axis=0)
    alive = (weights > DEAD) & (loud.largest.max() > DEAD)
    heard = np.maximum(loud.largest, loud.largest.max() / 16)

    def factor(share: float) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            raw = np.where(alive, heard**share / weights ** (1 - share), 0)
            return np.where(alive, raw * (heard / raw).max(where=alive, initial=0) / heard.max(), 1.0)

    if alpha is not None:
        return factor(alpha)
    tried = [np.ones(region.channels), *(factor(share) for share in SHARES)]
    return min(tried, key=lambda factors: _noise(factors, loud, blocks))


def _noise(factors: np.ndarray, loud: Loudness, blocks: Sequence[np.ndarray]) -> float:
    """The power of 8-bit rounding in the readers' outputs, as a share of the outputs' own, summed over the readers.

    A step's rounding has the power step^2 / 12, independently everywhere: the activation's step is set by its loudest channel and its
    noise passes every weight; a weight's by the largest of its row, and its noise passes every activation.
    """
    step = (loud.largest / factors).max()
    total = 0.0
    for block in blocks:
        scaled = block * factors.reshape(len(block), 1, -1, 1)
        power = (loud.power / factors**2).reshape(len(block), 1, -1, 1)
        rows = np.abs(scaled).max(axis=(2, 3), keepdims=True)
        noise = step**2 * np.square(scaled).sum() + (rows**2 * power).sum() * block.shape[3]
        total += noise / max((np.square(scaled) * power).sum(), DEAD)
    return float(total)


def _grow(graph: Graph, start: NodeProto, is_producer: Callable[[NodeProto, Graph], bool]) -> Region | None:
    """The region that the output of `start` belongs to; None if it reaches something that cannot take up a factor."""
    region = Region(graph.axis(start))
    waiting = [start.output[0]]
    while waiting:
        tensor = waiting.pop()
        if tensor in region.tensors:
            continue
        region.tensors[tensor] = None
        maker = graph.producers.get(tensor)
        if maker is None or tensor in graph.outside or not _same_channels(graph, region, tensor):
            return None
        if is_producer(maker, graph):
            region.producers[maker.output[0]] = maker
            data, *rest = sorted((name for name in maker.input if name), key=graph.constants.__contains__)
            if data in graph.constants or graph.axis(maker) != region.axis or not graph.owned(rest):
                return None
        elif not _inside(graph, region, maker, waiting):
            return None
        for reader in graph.readers[tensor]:
            if graph.is_product(reader) and reader.input[0] == tensor:
                region.readers[reader.output[0]] = reader
                if (
                    graph.axis(reader) != region.axis
                    or not graph.owned([reader.input[1]])
                    or tensor in reader.input[2:]
                ):
                    return None
            elif not _inside(graph, region, reader, waiting):
                return None
    return region if region.readers else None


def _inside(graph: Graph, region: Region, node: NodeProto, waiting: list[str]) -> bool:
    """Whether a factor passes the node; then its activations are to be visited and its constants are noted."""
    pooling = node.op_type in _POOLING and region.axis == _SECOND and len(node.output) == 1
    if node.op_type not in _HOMOGENEOUS and not pooling:
        return False
    for name in node.input:
        if name not in graph.constants:
            waiting.append(name)
        elif graph.owned([name]):
            region.terms[name] = node.output[0]
        else:
            return False
    waiting.append(node.output[0])
    return True


def _same_channels(graph: Graph, region: Region, tensor: str) -> bool:
    """All tensors have one and the same known number of channels, and one rank where they are counted from the front."""
    shape = graph.shapes.get(tensor, [])
    if len(shape) < 2 or not (channels := shape[region.axis]):
        return False
    if region.axis == _SECOND and any(len(graph.shapes[other]) != len(shape) for other in region.tensors):
        return False
    region.channels = region.channels or channels
    return bool(region.channels == channels)


def _by_input(weight: np.ndarray, node: NodeProto) -> np.ndarray:
    """The weight as [groups, outputs of each, inputs of each, positions]."""
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    matrix = weight if node.op_type == "Gemm" and attribute(node, "transB", 0) else weight.T
    return matrix[None, :, :, None]


def _scale_input(weight: np.ndarray, factor: np.ndarray, node: NodeProto) -> np.ndarray:
    blocks = _by_input(weight, node)
    scaled = blocks * factor.reshape(len(blocks), 1, -1, 1)
    if node.op_type == "Conv":
        return np.asarray(scaled.reshape(weight.shape))
    transposed = node.op_type == "Gemm" and attribute(node, "transB", 0)
    return np.asarray(scaled[0, :, :, 0] if transposed else scaled[0, :, :, 0].T)


def _scale_output(constant: np.ndarray, factor: np.ndarray, node: NodeProto, name: str) -> np.ndarray:
    """Multiply a producer's constant: its weight row by row, or a vector beside it."""
    by_row = node.op_type == "Conv" or (node.op_type == "Gemm" and attribute(node, "transB", 0))
    if node.op_type in inspect.QUANTISABLE and name == node.input[1] and by_row:
        factor = factor.reshape(-1, *[1] * (constant.ndim - 1))
    return np.asarray(constant * factor)


def _scale_term(term: np.ndarray, factor: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """A constant that is added, whatever of its dimensions broadcast."""
    shape = [1] * rank
    shape[axis] = len(factor)
    return np.asarray(term * factor.reshape(shape if axis == _SECOND else [-1]))
