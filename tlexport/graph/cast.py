"""FP32 to FP16 by type: the precision is written into the graph, so that every backend computes the same thing."""

from __future__ import annotations

import logging

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tlexport import origin
from tlexport.errors import ExportError
from tlexport.graph import inspect

FLUSHED = "fp16_flushed_to_zero"  # metadata key: how many weights were too small for FP16

_FLOAT_BY_DEFINITION = {"Resize": (2,)}  # inputs that ONNX types as float32 whatever the data is
_SHAPE_ONLY = ("Shape", "Size")  # what they make does not depend on their input's values
LARGEST = float(np.finfo(np.float16).max)
LARGEST_FP32 = float(np.finfo(np.float32).max)
_log = logging.getLogger(__name__)


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with all compute, and everything between compute nodes, in FP16; inputs and outputs keep their types.

    FP32 stay: whatever is made of an input's values before the first compute node (imputation and scaling of raw
    numbers up to float32's own limits, masks), what follows the last one (softmax, a value's own unit), and nodes that
    make floats out of other types. Casts stand at the borders.

    Requires an FP32 graph without subgraphs. Raises ExportError naming weights that are NaN or beyond FP16's 65504;
    weights that FP16 rounds to zero are counted in the metadata under `fp16_flushed_to_zero` and logged. Float32's
    lowest and highest numbers, which attention masks use for infinity, become FP16's.
    """
    _require_fp32(model)
    floats = {name for name, kind in inspect.element_types(model).items() if kind == TensorProto.FLOAT}
    nodes, halved = _retype(model.graph, floats, _half_nodes(model.graph, floats))
    weights, flushed = _half_weights(model, halved)

    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:], graph.value_info[:], graph.initializer[:]
    graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    graph.initializer.extend(tensor for tensor in (*model.graph.initializer, *weights) if tensor.name in read)
    if flushed:
        _log.info("%d weights are too small for FP16 and became zero", flushed)
        helper.set_model_props(result, {**inspect.metadata(result), FLUSHED: str(flushed)})
    _ensure_fp16(result)
    return result


def _half_nodes(graph: onnx.GraphProto, floats: set[str]) -> set[str]:
    """Names of the nodes that shall compute in FP16: below a compute node, or fed by weights alone, and above another."""
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


def _retype(graph: onnx.GraphProto, floats: set[str], half: set[str]) -> tuple[list[NodeProto], set[str]]:
    """Nodes that each read their float inputs in their own precision, and the names of weights needed in FP16.

    A value of the other precision is cast once; a weight is read from its FP16 copy, `<name>_fp16`.
    """
    weights = {tensor.name for tensor in graph.initializer}
    made_half = {name for node in graph.node if node.name in half for name in node.output}
    nodes: list[NodeProto] = []
    halved: set[str] = set()
    cast: set[str] = set()
    for original in graph.node:
        node = NodeProto()
        node.CopyFrom(original)
        for index, name in enumerate(original.input):
            to_half = node.name in half and index not in _FLOAT_BY_DEFINITION.get(node.op_type, ())
            if name not in floats or (name in made_half) == to_half:
                continue
            node.input[index] = f"{name}_fp16" if to_half else f"{name}_fp32"
            if name in weights:
                halved.add(name)
            elif node.input[index] not in cast:
                cast.add(node.input[index])
                to = TensorProto.FLOAT16 if to_half else TensorProto.FLOAT
                nodes.append(_cast(name, node.input[index], to, original))
        nodes.append(node)
    makers = {name: node for node in graph.node for name in node.output}
    for name in (value.name for value in graph.output if value.name in floats & made_half):
        _rename(nodes, name, f"{name}_fp16")
        nodes.append(_cast(f"{name}_fp16", name, TensorProto.FLOAT, makers[name]))
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


def _half_weights(model: onnx.ModelProto, names: set[str]) -> tuple[list[TensorProto], int]:
    """FP16 copies of the weights named, and how many of their elements FP16 rounds to zero. Raises ExportError naming what does not fit."""
    copies: list[TensorProto] = []
    misfits: list[str] = []
    flushed = 0
    for tensor in (tensor for tensor in model.graph.initializer if tensor.name in names):
        full = numpy_helper.to_array(tensor)
        full = np.where(np.abs(full) == LARGEST_FP32, np.copysign(LARGEST, full), full).astype(full.dtype)
        finite = full[np.isfinite(full)]
        if np.isnan(full).any() or (np.abs(finite) > LARGEST).any():
            misfits.append(f"{tensor.name} (largest {np.abs(full).max():.4g})")
        with np.errstate(over="ignore"):
            half = full.astype(np.float16)
        flushed += int(np.count_nonzero((half == 0) & (full != 0)))
        copies.append(numpy_helper.from_array(half, f"{tensor.name}_fp16"))
    if misfits:
        shown = f"{', '.join(misfits[:5])}{f' and {len(misfits) - 5} more' if len(misfits) > 5 else ''}"
        raise ExportError(
            f"FP16 holds numbers up to {LARGEST:.0f}; beyond that or NaN: {origin.explained(shown, model)}; "
            "leave fp16 out of precision"
        )
    return copies, flushed


def _require_fp32(model: onnx.ModelProto) -> None:
    if any(
        attribute.type == onnx.AttributeProto.GRAPH
        for node in model.graph.node
        for attribute in node.attribute
    ):
        raise ExportError("graphs with branches or loops (If, Loop, Scan) cannot be cast to FP16")
    dtypes = inspect.compute_dtypes(model)
    if not dtypes:
        raise ExportError(inspect.NO_PRODUCTS.format("FP16"))
    if found := sorted(set(dtypes.values()) - {"fp32"}):
        raise ExportError(f"the cast to FP16 starts from an FP32 graph; this one has {', '.join(found)}")


def _ensure_fp16(model: onnx.ModelProto) -> None:
    if wide := [name for name, dtype in inspect.compute_dtypes(model).items() if dtype != "fp16"]:
        raise ExportError(f"still not in FP16 after the cast: {origin.listed(model, wide)}")
    inspect.require_loadable(model)
