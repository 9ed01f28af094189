"""Einsum as the MatMul it stands for: only Conv, Gemm and MatMul are quantised, cast and vouched for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from tlexport import origin
from tlexport.errors import ExportError

_ADVICE = "write it with torch.matmul, or as a multiplication and a sum"


def to_matmul(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with every Einsum as Transpose, MatMul, Transpose.

    Weights become the right factor, are stored transposed, and their own indices become one: `bd,mdk->bmk` is one product
    with a matrix [d, m*k], which every backend quantises by output channel. Two operands with one summed index are taken, with
    any indices that both share with the output (batches). Raises ExportError naming an equation of another kind.
    """
    if all(node.op_type != "Einsum" for node in model.graph.node):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    rewriting = _Rewriting({tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer})
    for node in model.graph.node:
        rewriting.append(node)
    del result.graph.node[:]
    result.graph.node.extend(rewriting.nodes)
    read = {name for node in rewriting.nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del result.graph.initializer[:], result.graph.value_info[:]
    result.graph.initializer.extend([*kept, *(tensor for tensor in rewriting.made if tensor.name in read)])
    return result


@dataclass(frozen=True)
class _Product:
    """`bmd,mdk->bmk`: indices by their part in it."""

    left: str
    right: str
    output: str

    @property
    def summed(self) -> str:
        return "".join(i for i in self.left if i in self.right and i not in self.output)

    @property
    def batch(self) -> str:
        return "".join(i for i in self.output if i in self.left and i in self.right)

    def own(self, side: str, other: str) -> str:
        """Indices that only this operand has, in the output's order."""
        return "".join(i for i in self.output if i in side and i not in other)

    def is_one_matmul(self) -> bool:
        sides = (self.left, self.right, self.output)
        indices = set(self.left + self.right)
        return (
            all(len(set(side)) == len(side) and (side + "a").isalpha() for side in sides)
            and len(self.summed) == 1
            and indices == set(self.output + self.summed)
        )


class _Rewriting:
    """Builds the new node list; `constants` are the graph's weights by name."""

    def __init__(self, constants: dict[str, np.ndarray]) -> None:
        self.constants = constants
        self.nodes: list[NodeProto] = []
        self.made: list[onnx.TensorProto] = []

    def append(self, node: NodeProto) -> None:
        if node.op_type != "Einsum":
            self.nodes.append(node)
            return
        before = len(self.nodes)
        self._rewrite(node)
        for made in self.nodes[before:]:
            origin.set_module(made, origin.module(node))

    def _rewrite(self, node: NodeProto) -> None:
        left, right, product = self._read(node)
        name = node.output[0]
        batch, summed = product.batch, product.summed
        own_left, own_right = (
            product.own(product.left, product.right),
            product.own(product.right, product.left),
        )
        a = self._arranged(left, product.left, batch + own_left + summed, f"{name}_left")
        b = self._arranged(right, product.right, batch + summed + own_right, f"{name}_right")
        sizes = self.constants[b].shape[len(batch) + 1 :] if len(own_right) > 1 else ()
        if sizes:
            kept = self.constants[b].shape[: len(batch) + 1]
            b = self._constant(self.constants[b].reshape(*kept, -1), f"{name}_right_flat")
        # Where the left one has several indices of its own beside the batches, the right one gets ones in their place.
        ones = len(own_left) - 1 if batch and own_left else 0
        right_ones = [*range(len(batch), len(batch) + ones), *([] if own_right else [len(batch) + ones + 1])]
        a = self._with_ones(a, [] if own_left else [len(batch)], f"{name}_left_ones")
        b = self._with_ones(b, right_ones, f"{name}_right_ones")
        self._multiply(a, b, name, product, sizes)

    def _multiply(self, a: str, b: str, name: str, product: _Product, sizes: tuple[int, ...]) -> None:
        """MatMul, then the right one's own indices apart again, dimensions of one dropped, and all in the output's order."""
        own_left, own_right = (
            product.own(product.left, product.right),
            product.own(product.right, product.left),
        )
        arrangement = product.batch + own_left + own_right
        single = [axis for axis, own in ((-2, own_left), (-1, own_right)) if not own]
        steps: list[tuple[str, list[str], dict[str, Any]]] = [("MatMul", [a, b], {})]
        if sizes:
            shape = np.array([0] * len(arrangement[: -len(sizes)]) + list(sizes), np.int64)
            steps.append(("Reshape", [self._constant(shape, f"{name}_shape")], {}))
        if single:
            steps.append(("Squeeze", [self._constant(np.array(single, np.int64), f"{name}_single")], {}))
        if arrangement != product.output:
            steps.append(("Transpose", [], {"perm": [arrangement.index(i) for i in product.output]}))
        previous: list[str] = []
        for place, (operator, inputs, attributes) in enumerate(steps, start=1):
            output = name if place == len(steps) else f"{name}_{operator.lower()}"
            self.nodes.append(helper.make_node(operator, [*previous, *inputs], [output], **attributes))
            previous = [output]

    def _read(self, node: NodeProto) -> tuple[str, str, _Product]:
        """Both operands and the product, the weights on the right; of two activations the one with at most one own index."""
        equation = helper.get_attribute_value(node.attribute[0]).decode().replace(" ", "")
        terms, _, output = equation.partition("->")
        sides = terms.split(",")
        pairs = [(0, 1), (1, 0)] if len(sides) == 2 else []
        for first, second in sorted(pairs, key=lambda pair: node.input[pair[1]] not in self.constants):
            product = _Product(sides[first], sides[second], output)
            several = len(product.own(product.right, product.left)) > 1
            if product.is_one_matmul() and (node.input[second] in self.constants or not several):
                return node.input[first], node.input[second], product
        where = origin.named(node.name or node.output[0], origin.module(node))
        raise ExportError(f"einsum {equation!r} of {where} is not one matrix product; {_ADVICE}")

    def _arranged(self, value: str, indices: str, wanted: str, name: str) -> str:
        if indices == wanted:
            return value
        order = [indices.index(i) for i in wanted]
        if value in self.constants:
            return self._constant(self.constants[value].transpose(order), name)
        self.nodes.append(helper.make_node("Transpose", [value], [name], perm=order))
        return name

    def _with_ones(self, value: str, axes: list[int], name: str) -> str:
        """The value with new dimensions of one at these places of the result."""
        if not axes:
            return value
        if value in self.constants:
            return self._constant(np.expand_dims(self.constants[value], tuple(axes)), name)
        places = self._constant(np.array(axes, np.int64), f"{name}_axes")
        self.nodes.append(helper.make_node("Unsqueeze", [value, places], [name]))
        return name

    def _constant(self, values: np.ndarray, name: str) -> str:
        self.constants[name] = np.ascontiguousarray(values)
        self.made.append(numpy_helper.from_array(self.constants[name], name))
        return name
