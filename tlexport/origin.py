"""Where in the PyTorch model a node of a graph comes from, and how a message says so.

The export keeps one entry per node, `tlexport_module`: the path of the module whose forward made it. Graphs made elsewhere
have none, and then a node goes by its name alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

MODULE = "tlexport_module"
_WORD = re.compile(r"[\w./]+")
_SHOWN = 5


def module(node: onnx.NodeProto) -> str:
    """Path of the module that made `node` (`net.blocks.0.attn`); empty for the model's own forward or if unknown."""
    return next((str(entry.value) for entry in node.metadata_props if entry.key == MODULE), "")


def set_module(node: onnx.NodeProto, path: str) -> None:
    """Leave `path` as the only metadata of `node`; none at all if it is empty."""
    node.ClearField("metadata_props")
    if path:
        entry = node.metadata_props.add()
        entry.key, entry.value = MODULE, path


def modules(model: onnx.ModelProto) -> dict[str, str]:
    """Node name -> its module, for the nodes that know it."""
    return {node.name: path for node in model.graph.node if (path := module(node))}


def named(name: str, path: str) -> str:
    """`MatMul_3 (module net.blocks.0.attn)`; a node that is named after its module says it already."""
    return f"{name} (module {path})" if path and not name.startswith(path) else name


def listed(model: onnx.ModelProto, names: Iterable[str]) -> str:
    """The first nodes of `names` with their modules, and how many more there are."""
    known, every = modules(model), list(names)
    shown = ", ".join(named(name, known.get(name, "")) for name in every[:_SHOWN])
    return shown + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")


def explained(text: str, model: onnx.ModelProto) -> str:
    """A message, with the modules of the nodes that it mentions: by name, by a value they make or by a weight they read.

    Where it mentions no node, as OpenVINO's list of operators without a conversion, those of the operators in it.
    """
    words = {word.strip("./") for word in _WORD.findall(text)}
    weights = words.intersection(tensor.name for tensor in model.graph.initializer)
    nodes = model.graph.node
    found = [
        node
        for node in nodes
        if node.name in words or words.intersection(node.output) or weights.intersection(node.input)
    ]
    found = found or [node for node in nodes if node.op_type in words]
    located = [node.name for node in found if named(node.name, module(node)) != node.name]
    return f"{text} [in the PyTorch model: {listed(model, located)}]" if located else text
