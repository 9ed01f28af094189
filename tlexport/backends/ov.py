"""OpenVINO on the CPU: the artifact is the graph itself; what it computes in is read from the compiled model."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlexport.backends import (
    DEFAULTS,
    Artifact,
    Availability,
    Bound,
    Held,
    Options,
    Runner,
    Tensors,
    capabilities,
    receipt,
    signal_stack,
    typed,
)
from tlexport.errors import CompileError, NotInstalledError
from tlexport.run import replacing
from tlexport.tensors import Profile

if TYPE_CHECKING:
    import onnx

NAME = "openvino"
EXTRA = "openvino"
SUFFIX = ".onnx"
BOUND = "the model is reshaped to the batch and compiled; the request's tensors are set once"

_DTYPES = {
    "f32": "fp32",
    "f16": "fp16",
    "bf16": "bf16",
    "u8": "int8",
    "i8": "int8",
    "u4": "int4",
    "i4": "int4",
}
_COMPUTE = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "Subgraph")


def availability() -> Availability:
    if importlib.util.find_spec("openvino") is None:
        return Availability(False, note=f"pip install 'tlexport[{EXTRA}]'")
    import openvino

    return Availability(True, openvino.__version__.split("-")[0], builds=("cpu",), runs=("cpu",))


def refusal(target: str, precision: str) -> str:
    return capabilities.refusal(NAME, target, precision)


def build(
    graph: Path,
    out: Path,
    target: str,
    profile: Profile,
    expected: Mapping[str, str],
    options: Options = DEFAULTS,
) -> Artifact:
    """Copy `graph` to `out` and read back what OpenVINO compiles it to on this machine's CPU.

    `profile` has no effect: the batch stays dynamic. Raises CompileError if OpenVINO refuses the graph.
    """
    if target != "cpu":
        raise CompileError(refusal(target, ""))
    typed.require_standard(graph, "OpenVINO")
    model = typed.load(graph)
    layers = _layers(_compile(graph, threads=1), model, expected)
    with replacing(out) as partial:
        shutil.copyfile(graph, partial)
    made = receipt.make("OpenVINO runtime model", expected, layers, typed.modules(graph))
    return Artifact(out, made)


@dataclass
class _OvRunner:
    artifact: Path
    threads: int
    request: Any
    provider: str

    def run(self, inputs: Tensors) -> dict[str, np.ndarray]:
        """The inputs are read in place; the outputs are copies."""
        results = self.request.infer(dict(inputs), share_inputs=True, share_outputs=False)
        return {output.get_any_name(): array for output, array in results.items()}

    def bind(self, inputs: Tensors) -> Bound:
        """The model compiled for exactly these shapes, which a small one runs up to twice as fast, and a request of its own.

        The request reads the inputs and writes the outputs in place: tensors that share NumPy's memory.
        """
        import openvino

        outputs = self.run(inputs)
        shapes = {name: array.shape for name, array in inputs.items()}
        request = _compile(self.artifact, self.threads, shapes).create_infer_request()
        for name, array in {**inputs, **outputs}.items():
            request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        # The class's own infer wraps each answer in a dictionary, which takes as long as a small layer; its base's does not.
        plain: Any = super(openvino.InferRequest, request)
        call = Held(plain.infer, {}, share_outputs=True, decode_strings=False)
        call.memory = (inputs, outputs)
        return Bound(call, lambda: {name: array.copy() for name, array in outputs.items()})


@contextlib.contextmanager
def runner(
    artifact: Path,
    *,
    threads: int,
    device: str = "cpu",
    judge: bool = False,
    options: Options = DEFAULTS,
) -> Iterator[Runner]:
    """Load the graph on the CPU. `judge` changes nothing: there is one level of optimisation."""
    if device != "cpu":
        raise CompileError(f"OpenVINO runs on the cpu here, not on {device}")
    model = _compile(artifact, threads)
    devices = ", ".join(model.get_property("EXECUTION_DEVICES"))
    yield _OvRunner(artifact, threads, model.create_infer_request(), f"OpenVINO {devices}")


def _compile(graph: Path, threads: int, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Any:
    """One stream of `threads` threads at full precision; the batch stays free where no `shapes` are given.

    By default OpenVINO computes in BF16 on CPUs that have it, which is not what an FP32 graph asks for. Threads
    are not pinned, since the caller's own (torch's, ONNX Runtime's) would meet them on the same cores.
    """
    if importlib.util.find_spec("openvino") is None:
        raise NotInstalledError("backend 'openvino'", EXTRA)
    import openvino

    config = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "ENABLE_HYPER_THREADING": True,
    }
    core = openvino.Core()
    try:
        with signal_stack.kept():
            if shapes is None:
                return core.compile_model(str(graph), "CPU", config)
            model = core.read_model(str(graph))
            model.reshape(dict(shapes))
            return core.compile_model(model, "CPU", config)
    except RuntimeError as error:
        text = typed.explained(str(error).strip(), graph)
        raise CompileError(f"OpenVINO refused {graph}: {text}") from error


def _layers(model: Any, graph: onnx.ModelProto, expected: Mapping[str, str]) -> list[receipt.Layer]:
    """The layers of a compiled model that multiply, with the graph's nodes they come from."""
    operations = [
        op for op in model.get_runtime_model().get_ordered_ops() if _rt(op, "layerType") in _COMPUTE
    ]
    named = {op: _nodes(op, expected) for op in operations}
    for op, nodes in named.items():
        if nodes and _rt(op, "layerType") == "Subgraph":
            others = {node for found in named.values() for node in found}
            named[op] = (*nodes, *(node for node in _feeding(op, graph) if node in expected.keys() - others))
    claimed = {node for nodes in named.values() for node in nodes}
    return [
        receipt.Layer(
            name=op.get_friendly_name(),
            kind=_rt(op, "layerType"),
            dtype=_dtype(op),
            nodes=nodes or _folded_into(op, graph, set(expected) - claimed),
        )
        for op, nodes in named.items()
    ]


def _rt(op: Any, key: str) -> str:
    return str(op.get_rt_info()[key].astype(str))


def _dtype(op: Any) -> str:
    """The widest of the layer's runtime precision and its two operands' types; INT4 where weights are stored in it."""
    operands = [str(operand.get_element_type().get_type_name()) for operand in op.inputs()[:2]]
    if _DTYPES.get(operands[-1]) == "int4":
        return "int4"
    names = [_DTYPES.get(name, name) for name in (_rt(op, "runtimePrecision"), *operands)]
    return max(names, key=lambda dtype: receipt.WIDTH.get(dtype, 64))


def _nodes(op: Any, expected: Mapping[str, str]) -> tuple[str, ...]:
    """The graph's nodes that a layer names; if it lost its own name, the one that its weights' layer kept."""
    for source in (op, *(operand.get_source_output().get_node() for operand in op.inputs()[1:2])):
        if _rt(source, "layerType") in (*_COMPUTE, "Transpose", "Reorder"):
            traced = (receipt.trace(name, expected) for name in _rt(source, "originalLayersNames").split(","))
            if nodes := tuple(dict.fromkeys(filter(None, traced))):
                return nodes
    return ()


def _feeding(op: Any, graph: onnx.ModelProto) -> Iterator[str]:
    """The products whose outputs the nodes of a fused layer read: the first product of fused attention loses its name."""
    names = set(_rt(op, "originalLayersNames").split(","))
    read = {value for node in graph.graph.node if names & {node.name, *node.output} for value in node.input}
    for node in graph.graph.node:
        if node.op_type in typed.COMPUTE and read.intersection(node.output):
            yield node.name


def _folded_into(op: Any, graph: onnx.ModelProto, unclaimed: set[str]) -> tuple[str, ...]:
    """The product that a layer with another node's name holds.

    A scaling that was folded into a product's weights leaves its own name on the layer. The product is then the
    first one above that node; where several are (a residual sum), or where it has a layer already, none is claimed.
    """
    producers = {output: node for node in graph.graph.node for output in node.output}
    names = set(_rt(op, "originalLayersNames").split(","))
    above = [node for node in graph.graph.node if names & {node.name, *node.output}]
    products: set[str] = set()
    while above:
        node = above.pop()
        if node.op_type in typed.COMPUTE:
            products.add(node.name)
        else:
            above.extend(producers[name] for name in node.input if name in producers)
    return tuple(products) if len(products) == 1 and products <= unclaimed else ()
