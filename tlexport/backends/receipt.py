"""The receipt: which dtype each layer of the built artifact really computes in, read back and held against the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping

from pydantic import BaseModel, ConfigDict

from tlexport import origin

WIDTH = {"fp32": 32, "tf32": 19, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}


class Layer(BaseModel):
    """One layer of the artifact. `nodes` are the graph's node names it came from; several where layers were fused."""

    model_config = ConfigDict(frozen=True)

    name: str
    kind: str
    dtype: str  # a key of WIDTH: what it computes in
    nodes: tuple[str, ...] = ()


class Receipt(BaseModel):
    """What was asked of each compute node, what was built, and where the two differ."""

    model_config = ConfigDict(frozen=True)

    source: str  # where the dtypes were read: "TensorRT-RTX build log", "OpenVINO runtime model" ...
    expected: dict[str, str]
    layers: tuple[Layer, ...]
    disagreements: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        return not self.disagreements

    def summary(self) -> str:
        """For a table: `int8 x 50, fp32 x 3` over the compute layers; trees say what they were built as instead."""
        if not self.expected:
            dtypes = Counter(layer.dtype for layer in self.layers)
            return "no matrix products" + "".join(
                f", {dtype} x {count}" for dtype, count in dtypes.most_common()
            )
        built = self.built()
        counts = Counter(built.get(node, "?") for node in self.expected)
        return ", ".join(f"{dtype} x {count}" for dtype, count in counts.most_common())

    def built(self) -> dict[str, str]:
        """Compute node -> dtype it was built with."""
        return _by_node(self.expected, self.layers)


def make(
    source: str, expected: Mapping[str, str], layers: list[Layer], modules: Mapping[str, str]
) -> Receipt:
    """Hold the layers against what the graph asks for. `modules`: node -> where it is in the PyTorch model, as far as known.

    A node that is missing from the layers is a disagreement too: what cannot be read back is not claimed. A graph
    without compute nodes (trees) asks for no precision of a product, so that none can be missed.
    """
    built = _by_node(expected, layers)
    wrong = [
        f"{origin.named(node, modules.get(node, ''))}: asked {dtype}, built {built.get(node, 'not found in the artifact')}"
        for node, dtype in expected.items()
        if built.get(node) != dtype
    ]
    return Receipt(source=source, expected=dict(expected), layers=tuple(layers), disagreements=tuple(wrong))


def _by_node(expected: Mapping[str, str], layers: tuple[Layer, ...] | list[Layer]) -> dict[str, str]:
    """Node -> dtype; where several layers name a node, the widest one counts (a reformat may be narrower)."""
    built: dict[str, str] = {}
    for layer in layers:
        for node in layer.nodes:
            if node in expected and WIDTH.get(layer.dtype, 64) > WIDTH.get(built.get(node, ""), 0):
                built[node] = layer.dtype
    return built


def trace(name: str, known: Container[str]) -> str:
    """The graph's node that a backend's name was made from, or an empty string.

    Backends append to the node's name (`conv1/WithoutBiases`, `matmul/MatMulScaleFusion/`): the longest prefix
    that ends before a slash and is a known node is the node.
    """
    while name and name not in known:
        name = name.rpartition("/")[0]
    return name
