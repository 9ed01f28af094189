"""A graph run piece by piece, so that a later piece can be changed by what the earlier ones computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from tlexport.graph import inspect, probe


class Walk:
    """All batches side by side, at one place of the graph's node list.

    `values` holds, for each batch, the tensors computed so far that are still to be read: the memory is that of the widest place,
    times the number of samples. `constants` may be changed until the nodes that read them have run.
    """

    def __init__(self, model: onnx.ModelProto, batches: Sequence[probe.Batch]) -> None:
        self.values: list[dict[str, np.ndarray]] = [dict(batch) for batch in batches]
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._model = model
        self._nodes = list(model.graph.node)
        self._place = 0
        self._types = inspect.element_types(model)
        self._last: dict[str, int] = {}
        for place, node in enumerate(self._nodes):
            self._last |= dict.fromkeys(probe.read_by(node), place)
        self._last |= {value.name: len(self._nodes) for value in model.graph.output}

    def before(self, output: str) -> NodeProto:
        """Run everything in front of the node that makes `output`, and return that node."""
        place = self._place_of(output)
        self._advance(place)
        node: NodeProto = self._nodes[place]
        return node

    def through(self, output: str) -> None:
        """Run everything up to the node that makes `output`, included."""
        self._advance(self._place_of(output) + 1)

    def _place_of(self, output: str) -> int:
        return next(place for place, node in enumerate(self._nodes) if output in node.output)

    def _advance(self, end: int) -> None:
        nodes = self._nodes[self._place : end]
        if not nodes:
            return
        made = [name for node in nodes for name in node.output if self._last.get(name, -1) >= end]
        session = self._session(nodes, made)
        inputs = [value.name for value in session.get_inputs()]
        for values in self.values:
            found = session.run(made, {name: values[name] for name in inputs}) if made else []
            kept = {name: value for name, value in values.items() if self._last.get(name, -1) >= end}
            values.clear()
            values.update(kept | dict(zip(made, found, strict=True)))
        self._place = end

    def _session(self, nodes: Sequence[NodeProto], made: Sequence[str]) -> Any:
        own = {name for node in nodes for name in node.output}
        read = dict.fromkeys(name for node in nodes for name in probe.read_by(node) if name not in own)
        piece = onnx.ModelProto(ir_version=self._model.ir_version, opset_import=self._model.opset_import)
        piece.graph.name = "piece"
        piece.graph.node.extend(nodes)
        piece.graph.initializer.extend(self.constants[name] for name in read if name in self.constants)
        for values, names in (
            (
                piece.graph.input,
                [name for name in read if name in self._types and name not in self.constants],
            ),
            (piece.graph.output, made),
        ):
            values.extend(helper.make_tensor_value_info(name, self._types[name], None) for name in names)
        return probe.loaded(piece)
