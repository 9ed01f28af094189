"""The FP32 graph with some products computed as a typed graph computes them: what those products alone cost.

Works on any two graphs of one network whose products have the same names: FP16 or BF16 by cast, INT8, FP8 or INT4 by Q/DQ.
The typed graph is taken as it is, so that a fault which came into it after it was made is found too.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from tlexport.errors import ExportError
from tlexport.graph import inspect

Group = tuple[str, ...]  # names of products that change their precision together


def groups(model: onnx.ModelProto, typed: onnx.ModelProto) -> list[Group]:
    """The products that `typed` computes in less than FP32 or with other constants, in the graph's order.

    Those that read the same activation are one group: Q, K and V of attention, or the two branches of a residual block,
    share the converted tensor, and compilers merge them.
    """
    low = {name for name, dtype in inspect.compute_dtypes(typed).items() if dtype != "fp32"}
    low |= _with_other_constants(model, typed) - low
    members: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.name in low:
            members.setdefault(node.input[0], []).append(node.name)
    return [tuple(names) for names in members.values()]


def _with_other_constants(model: onnx.ModelProto, typed: onnx.ModelProto) -> set[str]:
    ours, theirs = ({t.name: t for t in m.graph.initializer} for m in (model, typed))
    changed = {
        name for name, tensor in ours.items() if name in theirs and _bytes(tensor) != _bytes(theirs[name])
    }
    return {
        node.name
        for node in model.graph.node
        if node.op_type in inspect.COMPUTE and changed.intersection(node.input)
    }


def _bytes(tensor: TensorProto) -> bytes:
    return bytes(numpy_helper.to_array(tensor).tobytes())


def lowered(model: onnx.ModelProto, typed: onnx.ModelProto, low: Collection[str]) -> onnx.ModelProto:
    """`model` (FP32) with the products named in `low` as `typed` has them; every tensor between products is FP32.

    A product brings what converts its factors (Cast, QuantizeLinear, DequantizeLinear). Where `typed` quantises its output
    (or that of the Relu or Clip behind it) for others than products, those read the quantised value.
    Raises ExportError if a name is no product of both graphs.
    """
    return _Splice(model, typed, low).result()


class _Splice:
    def __init__(self, model: onnx.ModelProto, typed: onnx.ModelProto, low: Collection[str]) -> None:
        self.model, self.typed = model, typed
        theirs = {node.name: node for node in typed.graph.node if node.op_type in inspect.COMPUTE}
        ours = {node.name for node in model.graph.node if node.op_type in inspect.COMPUTE}
        if unknown := sorted(set(low) - (theirs.keys() & ours)):
            raise ExportError(
                f"no product of both graphs is named {', '.join(unknown[:5])} (there are: {', '.join(sorted(ours)[:8])} ...)"
            )
        self.low = {name: theirs[name] for name in low}
        self.types = inspect.element_types(typed)
        self.producers = {output: node for node in typed.graph.node for output in node.output}
        self.constants = {tensor.name: tensor for tensor in typed.graph.initializer}
        self.own = {output for node in model.graph.node for output in node.output} | {
            value.name for value in model.graph.input
        }
        self.nodes: list[NodeProto] = []
        self.brought: dict[str, str] = {}  # typed value -> its name in the result
        self.initializers: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer}

    def result(self) -> onnx.ModelProto:
        rounded = self._rounded_outputs()
        for node in self.model.graph.node:
            if node.name in self.low:
                self._product(node, self.low[node.name])
                continue
            copy = NodeProto()
            copy.CopyFrom(node)
            if node.op_type not in inspect.COMPUTE:
                copy.input[:] = [
                    self._brought(rounded[name]) if name in rounded else name for name in node.input
                ]
            self.nodes.append(copy)
        made = onnx.ModelProto()
        made.CopyFrom(self.model)
        graph = made.graph
        del graph.node[:], graph.value_info[:], graph.initializer[:]
        graph.node.extend(self.nodes)
        read = {name for node in self.nodes for name in node.input}
        graph.initializer.extend(tensor for name, tensor in self.initializers.items() if name in read)
        return made

    def _product(self, node: NodeProto, typed: NodeProto) -> None:
        """The typed node with what feeds it; its output under the FP32 graph's name and type."""
        copy = NodeProto()
        copy.CopyFrom(typed)
        copy.input[:] = [self._brought(name) if name else "" for name in typed.input]
        output = node.output[0]
        if (kind := self.types[typed.output[0]]) == TensorProto.FLOAT:
            copy.output[:] = [output]
            self.nodes.append(copy)
            return
        copy.output[:] = [f"{output}/made_{kind}"]
        self.nodes += [
            copy,
            helper.make_node(
                "Cast", [copy.output[0]], [output], f"{output}/Cast_float", to=TensorProto.FLOAT
            ),
        ]

    def _brought(self, name: str) -> str:
        """A value of the typed graph in the result: made from the FP32 graph's tensor, or a constant of its own."""
        if name in self.brought:
            return self.brought[name]
        kind = self.types.get(name, 0)
        if name in self.constants:
            made = f"{name}/typed"
            tensor = TensorProto()
            tensor.CopyFrom(self.constants[name])
            tensor.name = made
            self.initializers[made] = tensor
        elif name in self.own:  # an activation of both graphs: ours is FP32, theirs may be of another type
            made = name if kind == TensorProto.FLOAT else self._cast(name, kind)
        else:
            source = self.producers[name]
            copy = NodeProto()
            copy.CopyFrom(source)
            copy.input[:] = [self._brought(value) if value else "" for value in source.input]
            copy.output[:] = [f"{value}/typed" for value in source.output]
            copy.name = f"{source.name}/typed"
            self.nodes.append(copy)
            made = f"{name}/typed"
        self.brought[name] = made
        return made

    def _cast(self, name: str, kind: int) -> str:
        made = f"{name}/typed_{kind}"
        self.nodes.append(helper.make_node("Cast", [name], [made], f"{made}/Cast", to=kind))
        return made

    def _rounded_outputs(self) -> dict[str, str]:
        """Tensor that `typed` quantises for others than products, for the sake of one in `low` -> its dequantised name there.

        That is one which makes the tensor, or which reads it.
        """
        found: dict[str, str] = {}
        read = {name for node in self.low.values() for name in node.input[:2]}
        for node in self.typed.graph.node:
            if node.op_type in inspect.COMPUTE:
                continue
            for name in node.input:
                source = self.producers.get(name)
                if source is None or source.op_type != "DequantizeLinear":
                    continue
                before = self.producers.get(source.input[0])
                if before is not None and before.op_type == "QuantizeLinear":
                    found[before.input[0]] = name
        return {tensor: name for tensor, name in found.items() if name in read or self._made_low(tensor)}

    def _made_low(self, tensor: str) -> bool:
        node = self.producers.get(tensor)
        if node is not None and node.op_type in ("Relu", "Clip"):
            node = self.producers.get(node.input[0])
        return node is not None and node.name in self.low
