"""Which of several ranges costs a tensor's readers least, measured by running them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from tlexport.graph import inspect, probe
from tlexport.graph.grid import Flavour, Range, of_activation

TOGETHER = 4  # samples in one run: with all candidates it holds several times what the graph alone does

Label = TypeVar("Label", bound=str)


def least_error(
    model: onnx.ModelProto,
    batches: Sequence[probe.Batch],
    candidates: Mapping[str, Mapping[Label, Range]],
    flavour: Flavour,
) -> dict[str, Label]:
    """Tensor -> the label of the range that disturbs the products reading it least; the first of equals.

    Each candidate is tried with that tensor alone fake-quantised: all its products get a copy that reads the quantised
    tensor, and the squared differences of their outputs, each as a share of the output's own squares, are summed. A tensor
    that no product reads is judged by its own error. All candidates of all tensors run in one session, which keeps
    nothing but one sum for each.
    """
    trial = _Trial(model, flavour)
    for tensor, ranges in candidates.items():
        for interval in dict.fromkeys(ranges.values()):
            trial.add(tensor, interval)
    names = list(trial.sums)
    session = probe.session(trial.model, names)
    totals = np.zeros(len(names))
    for batch in batches:
        for start in range(0, len(next(iter(batch.values()))), TOGETHER):
            some = {name: values[start : start + TOGETHER] for name, values in batch.items()}
            totals += [float(value.item()) for value in session.run(names, some)]
    sums = dict(zip(names, totals, strict=True))
    return {
        tensor: min(ranges, key=lambda label: trial.error(tensor, ranges[label], sums))
        for tensor, ranges in candidates.items()
    }


class _Trial:
    """A graph that also computes every candidate's errors; `sums` are the names of its scalars."""

    def __init__(self, model: onnx.ModelProto, flavour: Flavour) -> None:
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.flavour = flavour
        self.sums: dict[str, None] = {}
        constants = {tensor.name for tensor in model.graph.initializer}
        self._products = [
            node
            for node in model.graph.node
            if node.op_type in inspect.QUANTISABLE
            and (flavour == "trt" or constants.intersection(node.input[:2]))
        ]
        self._errors: dict[tuple[str, Range], list[tuple[str, str]]] = {}
        self._squared: dict[str, str] = {}

    def add(self, tensor: str, interval: Range) -> None:
        base = f"{tensor}/range_{len(self._errors)}"
        grid = of_activation(interval, self.flavour)
        parameters = [f"{base}/scale", f"{base}/zero_point"]
        for name, values in zip(parameters, (grid.scale, grid.zero_point), strict=True):
            self.model.graph.initializer.append(numpy_helper.from_array(values, name))
        self._node("QuantizeLinear", [tensor, *parameters], f"{base}/integers")
        quantised = self._node("DequantizeLinear", [f"{base}/integers", *parameters], f"{base}/quantised")
        readers = [node for node in self._products if tensor in node.input[:2]]
        compared = [
            (node.output[0], self._disturbed(node, tensor, quantised, f"{base}/{index}"))
            for index, node in enumerate(readers)
        ]
        self._errors[tensor, interval] = [
            (self._square(self._node("Sub", [disturbed, output], f"{disturbed}/error")), self._square(output))
            for output, disturbed in compared or [(tensor, quantised)]
        ]

    def error(self, tensor: str, interval: Range, sums: Mapping[str, float]) -> float:
        tiny = float(np.finfo(np.float32).tiny)
        return sum(sums[error] / max(sums[output], tiny) for error, output in self._errors[tensor, interval])

    def _disturbed(self, product: NodeProto, tensor: str, quantised: str, output: str) -> str:
        copy = NodeProto()
        copy.CopyFrom(product)
        copy.name, copy.output[0] = output, output
        copy.input[:] = [
            quantised if name == tensor and place < 2 else name for place, name in enumerate(copy.input)
        ]
        self.model.graph.node.append(copy)
        return output

    def _square(self, value: str) -> str:
        if value not in self._squared:
            self._squared[value] = self._node("ReduceSumSquare", [value], f"{value}/squares")
            self.sums[self._squared[value]] = None
        return self._squared[value]

    def _node(self, operator: str, inputs: list[str], output: str) -> str:
        self.model.graph.node.append(helper.make_node(operator, inputs, [output], output))
        return output
