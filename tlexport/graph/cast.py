"""FP32 to FP16 or BF16 by type: the precision is written into the graph, so that every backend computes the same thing."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tlexport import origin
from tlexport.errors import ExportError
from tlexport.graph import inspect, versions

HalfName = Literal["fp16", "bf16"]

_FLOAT_BY_DEFINITION = {"Resize": (2,)}  # inputs that ONNX types as float32 whatever the data is
_SHAPE_ONLY = ("Shape", "Size")  # what they make does not depend on their input's values
LARGEST_FP32 = float(np.finfo(np.float32).max)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Half:
    """A 16-bit float type."""

    name: HalfName
    onnx_type: int
    numpy_type: type
    opset: int  # the first in which ONNX defines it for Conv, pooling and activations

    @property
    def largest(self) -> float:
        return float(ml_dtypes.finfo(self.numpy_type).max)


_HALVES: dict[HalfName, _Half] = {
    "fp16": _Half("fp16", TensorProto.FLOAT16, np.float16, 1),
    "bf16": _Half("bf16", TensorProto.BFLOAT16, ml_dtypes.bfloat16, 22),
}


def to_half(model: onnx.ModelProto, precision: HalfName, *, exclude: Collection[str] = ()) -> onnx.ModelProto:
    """The same graph with all compute, and everything between compute nodes, in FP16 or BF16; inputs and outputs keep their types.

    FP32 stay: whatever is made of an input's values before the first compute node (imputation and scaling of raw
    numbers up to float32's own limits, masks), what follows the last one (softmax, a value's own unit), nodes that
    make floats out of other types, and the compute nodes that `exclude` names, with what lies between them where that
    takes fewer casts. Casts stand at the borders. A BF16 graph has at least opset 22, the first with BF16 convolutions.

    Requires an FP32 graph without subgraphs. Raises ExportError naming weights that are NaN or beyond the type's
    largest number (FP16: 65504), if a name in `exclude` is not a compute node or none is left, and if ONNX does not
    define one of the operators for BF16. Weights that are rounded to zero are logged and counted in the metadata under
    `fp16_flushed_to_zero` or `bf16_flushed_to_zero`. Float32's lowest and highest numbers, which attention masks use for
    infinity, become the type's own.
    """
    half = _HALVES[precision]
    _require_fp32(model, half, exclude)
    model = versions.at_least(model, half.opset)
    floats = {name for name, kind in inspect.element_types(model).items() if kind == TensorProto.FLOAT}
    chosen = _between_excluded(model.graph, floats, _half_nodes(model.graph, floats) - {*exclude}, exclude)
    nodes, halved = _retype(model.graph, floats, chosen, half)
    weights, flushed = _half_weights(model, halved, half)

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.value_info[:], graph.initializer[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    graph.initializer.extend(tensor for tensor in (*model.graph.initializer, *weights) if tensor.name in read)
    if flushed:
        _log.info("%d weights are too small for %s and became zero", flushed, precision.upper())
        helper.set_model_props(
            result, {**inspect.metadata(result), f"{precision}_flushed_to_zero": str(flushed)}
        )
    _ensure_half(result, half, exclude)
    return result


def _half_nodes(graph: onnx.GraphProto, floats: set[str]) -> set[str]:
    """Names of the nodes that shall compute in 16 bits: below a compute node, or fed by weights alone, and above another."""
    raw = {value.name for value in graph.input}  # depend on the inputs' values and on no compute node
    after: set[str] = set()  # have a compute node upstream
    head: set[str] = set()
    for node in graph.node:
        if node.op_type in inspect.COMPUTE or after.intersection(node.input):
            after.update(node.output)
        elif raw.intersection(node.input):
            head.add(node.name)
            raw.update(() if node.op_type in _SHAPE_ONLY else node.output)
    before: set[str] = set()  # values with a compute node downstream
    tail: set[str] = set()
    for node in reversed(graph.node):
        if node.op_type in inspect.COMPUTE or before.intersection(node.output):
            before.update(node.input)
        else:
            tail.add(node.name)
    makes_floats = {node.name for node in graph.node if not floats.intersection(node.input)}
    return {node.name for node in graph.node} - head - tail - makes_floats


def _between_excluded(
    graph: onnx.GraphProto, floats: set[str], half: set[str], exclude: Collection[str]
) -> set[str]:
    """`half` without the regions between compute nodes that need fewer casts in FP32.

    A region is what hangs together by activations without a compute node in it. In FP32 each float tensor that comes
    from, or goes to, a node in 16 bits is cast; in 16 bits each one shared with a node in FP32. Where the counts are
    equal, FP32 is for regions below a node in `exclude`: its output may be what 16 bits cannot hold.
    """
    if not exclude:
        return half
    makers = {value.name: "" for value in graph.input if value.name in floats}
    makers |= {name: node.name for node in graph.node for name in node.output if name in floats}
    readers: dict[str, set[str]] = {name: set() for name in makers}
    for node in graph.node:
        for name in readers.keys() & set(node.input):
            readers[name].add(node.name)
    outputs = {value.name for value in graph.output}
    products = {node.name for node in graph.node if node.op_type in inspect.COMPUTE}
    for region in _regions(makers, readers, half - products):
        entering = {t for t, maker in makers.items() if maker not in region and readers[t] & region}
        leaving = {
            t for t, maker in makers.items() if maker in region and (readers[t] - region or t in outputs)
        }
        casts = sum(makers[t] not in half for t in entering)
        casts += sum(bool(readers[t] - region - half) or t in outputs for t in leaving)
        casts_in_fp32 = sum(makers[t] in half for t in entering)
        casts_in_fp32 += sum(bool(readers[t] & half - region) for t in leaving)
        below = any(makers[t] in exclude for t in entering)
        if casts_in_fp32 < casts or (below and casts_in_fp32 == casts):
            half = half - region
    return half


def _regions(makers: dict[str, str], readers: dict[str, set[str]], nodes: set[str]) -> list[set[str]]:
    """The nodes in groups that share float tensors, in the graph's order."""
    near: dict[str, set[str]] = {node: set() for node in nodes}
    for tensor, maker in makers.items():
        for reader in readers[tensor] & nodes if maker in nodes else ():
            near[maker].add(reader)
            near[reader].add(maker)
    regions: list[set[str]] = []
    left = dict.fromkeys(maker for maker in makers.values() if maker in nodes)
    while left:
        region, edge = set(), {next(iter(left))}
        while edge:
            region |= edge
            edge = {other for node in edge for other in near[node]} - region
        regions.append(region)
        left = dict.fromkeys(node for node in left if node not in region)
    return regions


def _retype(
    graph: onnx.GraphProto, floats: set[str], chosen: set[str], half: _Half
) -> tuple[list[NodeProto], set[str]]:
    """Nodes that each read their float inputs in their own precision, and the names of weights needed in 16 bits.

    A value of the other precision is cast once; a weight is read from its copy, `<name>_fp16` or `<name>_bf16`.
    """
    weights = {tensor.name for tensor in graph.initializer}
    made_half = {name for node in graph.node if node.name in chosen for name in node.output}
    nodes: list[NodeProto] = []
    halved: set[str] = set()
    cast: set[str] = set()
    for original in graph.node:
        node = NodeProto()
        node.CopyFrom(original)
        for index, name in enumerate(original.input):
            to_half = node.name in chosen and index not in _FLOAT_BY_DEFINITION.get(node.op_type, ())
            if name not in floats or (name in made_half) == to_half:
                continue
            node.input[index] = f"{name}_{half.name}" if to_half else f"{name}_fp32"
            if name in weights:
                halved.add(name)
            elif node.input[index] not in cast:
                cast.add(node.input[index])
                to = half.onnx_type if to_half else TensorProto.FLOAT
                nodes.append(_cast(name, node.input[index], to, original))
        nodes.append(node)
    makers = {name: node for node in graph.node for name in node.output}
    for name in (value.name for value in graph.output if value.name in floats & made_half):
        _rename(nodes, name, f"{name}_{half.name}")
        nodes.append(_cast(f"{name}_{half.name}", name, TensorProto.FLOAT, makers[name]))
    return nodes, halved


def _cast(source: str, target: str, to: int, beside: NodeProto) -> NodeProto:
    """A Cast that counts as part of the module that `beside` is in."""
    node = helper.make_node("Cast", [source], [target], name=f"{target}/Cast", to=to)
    origin.set_module(node, origin.module(beside))
    return node


def _rename(nodes: list[NodeProto], old: str, new: str) -> None:
    for node in nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _half_weights(model: onnx.ModelProto, names: set[str], half: _Half) -> tuple[list[TensorProto], int]:
    """16-bit copies of the weights named, and how many of their elements are rounded to zero.

    Raises ExportError naming what does not fit.
    """
    copies: list[TensorProto] = []
    misfits: list[str] = []
    flushed = 0
    for tensor in (tensor for tensor in model.graph.initializer if tensor.name in names):
        full = numpy_helper.to_array(tensor)
        full = np.where(np.abs(full) == LARGEST_FP32, np.copysign(half.largest, full), full).astype(
            full.dtype
        )
        finite = full[np.isfinite(full)]
        if np.isnan(full).any() or (np.abs(finite) > half.largest).any():
            misfits.append(f"{tensor.name} (largest {np.abs(full).max():.4g})")
        with np.errstate(over="ignore"):
            narrow: np.ndarray = full.astype(half.numpy_type)
        flushed += int(np.count_nonzero((narrow == 0) & (full != 0)))
        copies.append(numpy_helper.from_array(narrow, f"{tensor.name}_{half.name}"))
    if misfits:
        shown = f"{', '.join(misfits[:5])}{f' and {len(misfits) - 5} more' if len(misfits) > 5 else ''}"
        raise ExportError(
            f"{half.name.upper()} holds numbers up to {half.largest:.5g}; beyond that or NaN: {origin.explained(shown, model)}; "
            f"leave {half.name} out of precision"
        )
    return copies, flushed


def _require_fp32(model: onnx.ModelProto, half: _Half, exclude: Collection[str]) -> None:
    title = half.name.upper()
    if any(
        attribute.type == onnx.AttributeProto.GRAPH
        for node in model.graph.node
        for attribute in node.attribute
    ):
        raise ExportError(f"graphs with branches or loops (If, Loop, Scan) cannot be cast to {title}")
    dtypes = inspect.compute_dtypes(model)
    if not dtypes:
        raise ExportError(inspect.NO_PRODUCTS.format(title))
    if found := sorted(set(dtypes.values()) - {"fp32"}):
        raise ExportError(f"the cast to {title} starts from an FP32 graph; this one has {', '.join(found)}")
    inspect.require_nodes(dtypes, exclude)
    if not dtypes.keys() - set(exclude):
        raise ExportError(f"every compute node is to stay in FP32, so nothing is left to cast to {title}")


def _ensure_half(model: onnx.ModelProto, half: _Half, exclude: Collection[str]) -> None:
    """ONNX Runtime's CPU provider has no kernels for BF16: such a graph is held to ONNX's own rules alone."""
    for name, dtype in inspect.compute_dtypes(model).items():
        wanted = "fp32" if name in exclude else half.name
        if dtype != wanted:
            raise ExportError(f"in {dtype} after the cast, not in {wanted}: {origin.listed(model, [name])}")
    if half.name == "bf16":
        inspect.require_valid(model)
    else:
        inspect.require_loadable(model)
