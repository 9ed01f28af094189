"""Weights of Gemm and MatMul in 4 bits, block by block; activations and everything else stay floats.

A block is a run of weights along the inner dimension, and has a scale of its own: weight = scale * integer in -8..7. Each
scale is the one, of a few that clip the block's largest weights, with the least expected squared error of the output:
errors of a weight count by the mean square of the activation it meets (the diagonal of the Hessian that GPTQ uses:
Frantar et al. 2023, arXiv:2210.17323, section 3; clipped as in AWQ, Lin et al. 2023, arXiv:2306.00978, section 5).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tlexport import origin
from tlexport.errors import ExportError
from tlexport.graph import inspect, probe, versions

OPSET = 21  # the first with INT4 and with blocks in DequantizeLinear
BLOCKS = (64, 32, 16)  # the largest that divides the inner dimension is taken
CLIPS = np.linspace(1.0, 0.6, 9)  # of a block's largest magnitude, tried from 1 down
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


class Weight(NamedTuple):
    """A constant second factor, [inner, outer] or `transposed`."""

    name: str
    transposed: bool
    block: int


def quantisable(model: onnx.ModelProto, *, for_cpu: bool = False) -> dict[str, Weight]:
    """Names of the Gemm and MatMul whose weights can be kept in 4 bits, in the graph's order.

    That takes a constant matrix as the second factor, FP32 or FP16, whose inner dimension is two blocks of 16 or more
    (compilers fold a single block into floats) and whose outer one is even (else TensorRT-RTX makes floats of the
    weights first, and multiplies those). `for_cpu` leaves out products that are scaled by a constant right away:
    OpenVINO multiplies the weights by it, and keeps the result as floats.
    """
    scaled = _scaled(model.graph) if for_cpu else set()
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, Weight] = {}
    for node in model.graph.node:
        tensor = constants.get(node.input[1]) if node.op_type in ("Gemm", "MatMul") else None
        if tensor is None or len(tensor.dims) != 2 or tensor.data_type not in _FLOATS:
            continue
        transposed = _flag(node, "transB")
        inner, outer = reversed(tensor.dims) if transposed else tensor.dims
        block = next((size for size in BLOCKS if inner % size == 0 and inner >= 2 * size), 0)
        if block and outer % 2 == 0 and not _flag(node, "transA") and node.output[0] not in scaled:
            found[node.name] = Weight(tensor.name, transposed, block)
    return found


def mean_squares(
    model: onnx.ModelProto, batches: Iterable[Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """For each node of `quantisable(model)`, float64 [inner]: the mean square of the activations its weights meet.

    `batches` are input name -> array [n, ...] of an FP32 graph. Raises ExportError if there is no batch, or if an
    activation is not finite.
    """
    chosen = quantisable(model)
    factors = {node.name: node.input[0] for node in model.graph.node if node.name in chosen}
    tensors = sorted(set(factors.values()))
    session = probe.showing(model, tensors)
    sums: dict[str, np.ndarray] = dict.fromkeys(tensors, np.zeros(()))
    rows = dict.fromkeys(tensors, 0)
    for batch in batches:
        for name, values in zip(tensors, session.run(tensors, dict(batch)), strict=True):
            vectors = values.astype(np.float64).reshape(-1, values.shape[-1])
            sums[name] = sums[name] + np.square(vectors).sum(axis=0)
            rows[name] += len(vectors)
    if not all(rows.values()):
        raise ExportError("INT4 got no calibration samples; it needs at least one of the training split")
    if strange := [name for name, total in sums.items() if not np.isfinite(total).all()]:
        raise ExportError(
            f"the tensors {', '.join(strange[:5])} are not finite on the calibration samples; "
            "replace missing values before the first product (torch.where), or leave int4 out of precision"
        )
    return {node: sums[factor] / rows[factor] for node, factor in factors.items()}


def weights_to_int4(
    model: onnx.ModelProto,
    importance: Mapping[str, np.ndarray],
    *,
    for_cpu: bool = False,
    exclude: Collection[str] = (),
) -> onnx.ModelProto:
    """The graph with INT4 weights through DequantizeLinear at the nodes of `quantisable` that `exclude` does not name.

    `model` is FP32, or FP16 by `cast.to_half`: scales, and what is computed, are of the weights' own type.
    `importance` holds `mean_squares` of the FP32 graph. Weights are written as [inner, outer], the one order that ONNX
    Runtime has INT4 kernels for, so that a Gemm with transB loses it. `for_cpu` writes a Relu behind a Gemm as the maximum with 0:
    ONNX Runtime would fuse the Gemm with its Relu first, and has no INT4 kernel for the pair. The result has at
    least opset 21.

    Raises ExportError if there is no such node, a name in `exclude` is not a compute node, a weight is NaN or infinite,
    or the result breaks its promise: each chosen node `int4`, and no other node's precision changed.
    """
    before = inspect.compute_dtypes(model)
    inspect.require_nodes(before, exclude)
    chosen = {
        name: weight for name, weight in quantisable(model, for_cpu=for_cpu).items() if name not in exclude
    }
    if not chosen:
        raise ExportError(
            "no weights to keep in INT4: they take a Gemm or MatMul with a constant matrix whose inner dimension is a multiple "
            f"of {BLOCKS[-1]} and at least {2 * BLOCKS[-1]}, and whose outer one is even "
            f"(compute nodes: {', '.join(list(before)[:8]) or 'none'}); "
            "leave int4 out of precision"
        )
    raised = versions.at_least(model, OPSET)
    result = onnx.ModelProto()
    result.CopyFrom(raised)
    _replace(result.graph, chosen, importance)
    if for_cpu:
        _relu_as_maximum(result.graph, chosen)
    after = {**before, **dict.fromkeys(chosen, "int4")}
    if inspect.compute_dtypes(result) != after:
        raise ExportError("some node did not get the precision it was to have after its weights became INT4")
    inspect.require_loadable(result)
    return result


def _replace(
    graph: onnx.GraphProto, chosen: Mapping[str, Weight], importance: Mapping[str, np.ndarray]
) -> None:
    """Put a DequantizeLinear before each chosen node; a weight that several of them read is quantised once for all."""
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    readers: dict[Weight, list[str]] = {}
    for name, weight in chosen.items():
        readers.setdefault(weight, []).append(name)
    if missing := chosen.keys() - importance.keys():
        raise ExportError(f"no mean squares are given for {', '.join(sorted(missing)[:5])}")
    outputs: dict[Weight, str] = {}
    nodes: list[NodeProto] = []
    for node in list(graph.node):
        if node.name in chosen:
            weight = chosen[node.name]
            if weight not in outputs:
                summed = np.sum([importance[name] for name in readers[weight]], axis=0)
                constants, dequantise = _dequantised(floats[weight.name], weight, summed)
                graph.initializer.extend(constants)
                origin.set_module(dequantise, origin.module(node))
                nodes.append(dequantise)
                outputs[weight] = dequantise.output[0]
            node.input[1] = outputs[weight]
            kept_attributes = [attribute for attribute in node.attribute if attribute.name != "transB"]
            del node.attribute[:]
            node.attribute.extend(kept_attributes)
        nodes.append(node)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)


def _dequantised(
    values: np.ndarray, weight: Weight, importance: np.ndarray
) -> tuple[list[TensorProto], NodeProto]:
    """The constants and the node that makes the weight out of them."""
    if not np.isfinite(values).all():
        raise ExportError(f"NaN or infinity in weights: {weight.name}")
    integers, scale = quantised(values.T if weight.transposed else values, weight.block, importance)
    base = f"{weight.name}{'_transposed' if weight.transposed else ''}"
    constants = [
        numpy_helper.from_array(integers, f"{base}_quantized"),
        numpy_helper.from_array(scale, f"{base}_scale"),
    ]
    node = helper.make_node(
        "DequantizeLinear",
        [constant.name for constant in constants],
        [f"{base}_dequantized"],
        f"{base}/DequantizeLinear",
        axis=0,
        block_size=weight.block,
    )
    return constants, node


def quantised(values: np.ndarray, block: int, importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers [k, n] as int4, and scales [k / block, n] of the type of `values` [k, n]; `importance` is [k].

    The scale is rounded to its type before the integers are chosen; a block of zeros gets the scale 1.
    """
    k, n = values.shape
    blocks = values.astype(np.float64).reshape(k // block, block, n)
    cost = np.maximum(importance, importance.max(initial=0) * 1e-6).reshape(k // block, block, 1)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    smallest = float(np.finfo(values.dtype).smallest_normal)
    best = np.full((k // block, 1, n), np.inf)
    scales = np.ones((k // block, 1, n), values.dtype)
    for clip in CLIPS:
        scale = np.where(largest / 7 < smallest, 1.0, clip * largest / 7).astype(values.dtype)
        error = (cost * np.square(blocks - _steps(blocks, scale) * scale)).sum(axis=1, keepdims=True)
        scales = np.where(error < best, scale, scales)
        best = np.minimum(error, best)
    integers = _steps(blocks, scales).reshape(k, n).astype(ml_dtypes.int4)
    return integers, scales[:, 0]


def _steps(blocks: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(blocks / scale.astype(np.float64)), -8, 7)


def _relu_as_maximum(graph: onnx.GraphProto, chosen: Collection[str]) -> None:
    products = {
        node.output[0]: node.op_type for node in graph.node if node.name in chosen and node.op_type == "Gemm"
    }
    relus = [node for node in graph.node if node.op_type == "Relu" and node.input[0] in products]
    for node in relus:
        node.op_type = "Max"
        node.input.append("relu_zero")
    if relus:
        graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), "relu_zero"))


def _scaled(graph: onnx.GraphProto) -> set[str]:
    """The values that a Mul or Div with a constant reads."""
    constants = {tensor.name for tensor in graph.initializer}
    return {
        name
        for node in graph.node
        if node.op_type in ("Mul", "Div") and constants.intersection(node.input)
        for name in node.input
    }


def _flag(node: NodeProto, name: str) -> bool:
    return any(attribute.name == name and attribute.i for attribute in node.attribute)
