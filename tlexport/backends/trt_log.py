"""What TensorRT's build log says of each layer's real type: the message that begins with `Layers:`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from tlexport.backends import receipt

_DTYPES = {
    "float": "fp32",
    "fp32": "fp32",
    "half": "fp16",
    "fp16": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
}
_DTYPES |= {"int8": "int8", "uint8": "int8", "fp8": "fp8", "int4": "int4"}
_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[(?P<outputs>.*)\], (?P<rest>.*?)Metadata: (?P<metadata>.*)"
)
_TENSOR = re.compile(r"Dimensions: \[(?P<dimensions>[-\d,]*)\].*?Datatype: (?P<dtype>[^,}]+)")
_LISTED_WEIGHTS = re.compile(r'Weights: \{\s*"?Type"?: "?(\w+)')  # TensorRT's convolutions keep theirs apart
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PRODUCT = re.compile(r"correlation|conv|gemm|matrix_?multiply|matmul", re.IGNORECASE)
_GENERATED = (
    "kgen",
    "runtime_fusion",
)  # kernels written for this graph: anything from a cast to fused attention


def read_layers(log: str) -> list[receipt.Layer]:
    """Parse the `Layers:` message of a DETAILED build.

    A node belongs to the layer that does its product, or that holds its INT4 weights. Casts, scalings and activations
    around it are generated kernels whose metadata names it too: they count only for nodes that no such layer has
    (fused attention).
    """
    parsed = [match for line in log.splitlines() if (match := _LAYER.fullmatch(line.strip()))]
    owned = {
        node
        for match in parsed
        if _PRODUCT.search(match["kind"]) or _weights_dtype(match) == "int4"
        for node in _named(match)
    }
    return [_layer(match, owned) for match in parsed]


def _layer(match: re.Match[str], owned: set[str]) -> receipt.Layer:
    if _PRODUCT.search(match["kind"]):
        dtype, nodes = _product_dtype(match), _named(match)
    elif match["kind"] in _GENERATED and _weights_dtype(match) == "int4":
        dtype, nodes = "int4", _named(match)
    elif match["kind"] in _GENERATED:
        dtype, nodes = _generated_dtype(match), tuple(node for node in _named(match) if node not in owned)
    else:
        dtype, nodes = _widest(dtype for dtype, _ in _tensors(match["inputs"])), ()
    return receipt.Layer(name=match["name"], kind=match["kind"], dtype=dtype, nodes=nodes)


def _product_dtype(match: re.Match[str]) -> str:
    """The wider of the first input and the weights: the largest constant, or for two activations the other input.

    Other inputs (a residual) and small constants (bias, scales) stay FP32 in an INT8 product. INT4 is what weights are
    stored in: the first input is a float then.
    """
    if _weights_dtype(match) == "int4":
        return "int4"
    first, *others = [dtype for dtype, _ in _tensors(match["inputs"])] or [""]
    if listed := _LISTED_WEIGHTS.search(match["rest"]):
        return _widest([first, _dtype(listed[1])])
    constants = [(math.prod(shape), dtype) for dtype, shape in _tensors(match["constants"])]
    size, weights = max(constants, default=(0, ""))
    return _widest([first, weights if size > 1 else (others or [first])[0]])


def _weights_dtype(match: re.Match[str]) -> str:
    """The dtype of a layer's largest constant, its weights if it has any; the scales of INT4 weights are smaller."""
    constants = [(math.prod(shape), dtype) for dtype, shape in _tensors(match["constants"])]
    return max(constants, default=(0, ""))[1]


def _generated_dtype(match: re.Match[str]) -> str:
    """The widest of a generated kernel's factors: its inputs and its constants that are at least matrices.

    What is added to a product is none: the mask of fused attention, and what a kernel that begins with a product
    (`__myl_FcAddCastAdd`) reads later.
    """
    inputs = _tensors(match["inputs"])
    matrices = [found for found in _tensors(match["constants"]) if sum(size > 1 for size in found[1]) > 1]
    if "mha" in match["name"]:  # the factors' batch and heads are one dimension, a mask's are two
        rank = min((len(shape) for _, shape in inputs), default=0)
        inputs = [found for found in inputs if len(found[1]) == rank]
    elif match["name"].startswith("__myl_Fc") and matrices:
        weights = max((shape for _, shape in matrices), key=math.prod)
        outputs = {size for _, shape in _tensors(match["outputs"]) for size in shape}
        summed = set(weights) - outputs or set(weights)
        inputs = [found for found in inputs if summed.intersection(found[1])] or inputs
    return _widest(dtype for dtype, _ in (*inputs, *matrices))


def _named(match: re.Match[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_NODE.findall(match["metadata"])))


def _tensors(text: str | None) -> list[tuple[str, tuple[int, ...]]]:
    """dtype and shape of each tensor of a list in the log."""
    return [
        (_dtype(tensor["dtype"]), tuple(map(int, filter(None, tensor["dimensions"].split(",")))))
        for tensor in _TENSOR.finditer(text or "")
    ]


def _dtype(text: str) -> str:
    """`Half`, or the older `Channel major FP16 format where channel % 8 == 0`, as a key of receipt.WIDTH."""
    words = text.strip().lower().split()
    return next((_DTYPES[word] for word in words if word in _DTYPES), text.strip().lower())


def _widest(dtypes: Iterable[str]) -> str:
    return max(dtypes, key=lambda dtype: receipt.WIDTH.get(dtype, 64), default="none")
