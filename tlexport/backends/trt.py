"""TensorRT and TensorRT-RTX: one implementation, two flavours of the same API.

Networks are strongly typed in both: the graph's own types decide what each layer computes in, and the receipt
is read from the message of the build log that lists the layers, which needs no GPU. TensorRT-RTX compiles ahead of
time for GPUs that are not here; TensorRT builds for the GPU of this machine. An engine is executable code:
building never loads one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tlexport.backends import Artifact, Availability, Runner, Tensors, gpu, receipt
from tlexport.errors import CompileError, NotInstalledError
from tlexport.run import replacing
from tlexport.targets import CAPABILITIES
from tlexport.tensors import Profile

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
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[.*\], (?P<rest>.*?)Metadata: (?P<metadata>.*)"
)
_TENSOR = re.compile(r"Dimensions: \[(?P<dimensions>[-\d,]*)\].*?Datatype: (?P<dtype>[^,}]+)")
_LISTED_WEIGHTS = re.compile(r'Weights: \{\s*"?Type"?: "?(\w+)')  # TensorRT's convolutions keep theirs apart
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PRODUCT = re.compile(r"correlation|conv|gemm|matrix_?multiply|matmul", re.IGNORECASE)
_GENERATED = (
    "kgen",
    "runtime_fusion",
)  # kernels written for this graph: anything from a cast to fused attention

# What TensorRT-RTX 1.7 was seen to do with typed graphs for each capability, by precision.
_RTX_REFUSALS = {
    ("sm75", "fp32"): "TensorRT-RTX compiles no FP32 matrix products (Gemm, MatMul) for SM75; use fp16 there",
    ("sm75", "int8"): "TensorRT-RTX computes INT8 convolutions in floating point for SM75; use fp16 there",
}
_RTX_ADVICE = (
    ("FP32 GEMM is not supported", "TensorRT-RTX has no FP32 matrix products for SM75: use fp16 there"),
)


@dataclass
class Flavour:
    """A backend: the package that is installed as `module`."""

    NAME: str
    EXTRA: str
    SUFFIX: str
    module: str

    @property
    def crosses(self) -> bool:
        """Whether it compiles for GPUs that are not in this machine."""
        return self.NAME == "tensorrt_rtx"

    def availability(self) -> Availability:
        if importlib.util.find_spec(self.module) is None:
            return Availability(False, note=f"pip install 'tlexport[{self.EXTRA}]'")
        trt, here = self._library(), gpu.capability()
        own = tuple(filter(None, [here]))
        builds = self._ahead_of_time() if self.crosses else own
        note = (
            ""
            if here
            else f"no NVIDIA GPU here: engines are {'built but not run' if self.crosses else 'not built'}"
        )
        return Availability(True, trt.__version__, builds=builds, runs=own, note=note)

    def refusal(self, target: str, precision: str) -> str:
        if target == "cpu":
            return f"{self.NAME} builds for NVIDIA GPUs only; for the cpu use onnxruntime or openvino"
        if not self.crosses:
            here = gpu.capability()
            found = f"this machine has {here}" if here else "this machine has no NVIDIA GPU"
            return (
                ""
                if here == target
                else f"TensorRT builds only for the GPU it runs on: {found}, not {target}"
            )
        if target not in (known := self._ahead_of_time()):
            return f"TensorRT-RTX cannot compile ahead of time for {target} (it can for {', '.join(known)})"
        return _RTX_REFUSALS.get((target, precision), "")

    def build(
        self, graph: Path, out: Path, target: str, profile: Profile, expected: Mapping[str, str]
    ) -> Artifact:
        """Compile `graph` for `target`. Raises CompileError with the parser's or compiler's own words."""
        trt = self._library()
        if reason := self.refusal(target, ""):
            raise CompileError(reason)
        log = _log(trt)
        builder = trt.Builder(log)
        network = _parse(trt, builder, log, graph)
        config = self._config(trt, builder, target)
        config.add_optimization_profile(_optimization_profile(builder, network, profile))
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise CompileError(_failure(f"{self.NAME} cannot compile {graph} for {target}", log.errors))
        layers = read_layers(log.layers)
        with replacing(out) as partial:
            partial.write_bytes(memoryview(engine))
        return Artifact(out, receipt.make(f"{self.NAME} {trt.__version__} build log", expected, layers))

    @contextlib.contextmanager
    def runner(
        self, artifact: Path, *, threads: int, device: str = "cuda", judge: bool = False
    ) -> Iterator[Runner]:
        """Load an engine on the first GPU. `threads` and `judge` change nothing: an engine is fixed.

        Loading executes what is in the file: call it only for engines whose hash was checked.
        """
        trt = self._library()
        if device != "cuda":
            raise CompileError(f"{self.NAME} engines run on an NVIDIA GPU, not on the {device}")
        if not (here := gpu.capability()):
            raise CompileError(
                f"{artifact} needs an NVIDIA GPU to run and this machine has none; it can only be built here"
            )
        log = _log(trt)
        engine = trt.Runtime(log).deserialize_cuda_engine(artifact.read_bytes())
        if engine is None:
            raise CompileError(_failure(f"{self.NAME} cannot load {artifact} on {here}", log.errors))
        yield _EngineRunner(trt, engine, engine.create_execution_context(), f"{self.NAME} on {here}")

    def _library(self) -> Any:
        if importlib.util.find_spec(self.module) is None:
            raise NotInstalledError(f"backend {self.NAME!r}", self.EXTRA)
        return importlib.import_module(self.module)

    def _ahead_of_time(self) -> tuple[str, ...]:
        return tuple(
            name for name in CAPABILITIES if hasattr(self._library().ComputeCapability, name.upper())
        )

    def _config(self, trt: Any, builder: Any, target: str) -> Any:
        """Full FP32 rather than TF32, and the layers' types written to the log."""
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.clear_flag(trt.BuilderFlag.TF32)
        if self.crosses:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0)
        return config


RTX = Flavour("tensorrt_rtx", "rtx", ".rtx.engine", "tensorrt_rtx")
TENSORRT = Flavour("tensorrt", "tensorrt", ".engine", "tensorrt")


@dataclass
class _EngineRunner:
    trt: Any
    engine: Any
    context: Any
    provider: str

    def run(self, inputs: Tensors) -> dict[str, np.ndarray]:
        import torch

        cuda: Any = torch.cuda
        stream = cuda.Stream()
        outputs: dict[str, torch.Tensor] = {}
        with cuda.stream(stream):
            held = {name: torch.from_numpy(array).cuda() for name, array in inputs.items()}
            for name, tensor in held.items():
                if not self.context.set_input_shape(name, tuple(tensor.shape)):
                    raise CompileError(
                        f"{name} of shape {tuple(tensor.shape)} is outside the engine's profile"
                    )
                self.context.set_tensor_address(name, tensor.data_ptr())
            for name in map(self.engine.get_tensor_name, range(self.engine.num_io_tensors)):
                if self.engine.get_tensor_mode(name) == self.trt.TensorIOMode.OUTPUT:
                    dtype = torch.from_numpy(
                        np.empty(0, self.trt.nptype(self.engine.get_tensor_dtype(name)))
                    ).dtype
                    shape = tuple(self.context.get_tensor_shape(name))
                    outputs[name] = torch.empty(shape, dtype=dtype, device="cuda")
                    self.context.set_tensor_address(name, outputs[name].data_ptr())
            if not self.context.execute_async_v3(stream.cuda_stream):
                raise CompileError(f"{self.provider}: the engine's execution failed")
        stream.synchronize()
        return {name: tensor.cpu().numpy() for name, tensor in outputs.items()}


def _log(trt: Any) -> Any:
    """A logger that keeps errors and the listing of the layers, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif message.startswith("Layers:"):
                self.layers = message

    return Log()


def _parse(trt: Any, builder: Any, log: Any, graph: Path) -> Any:
    """The graph as a strongly typed network; TensorRT 10 has a flag for it, later ones know nothing else."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.read_bytes()):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        found = [
            f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" if e.node_name() else e.desc()
            for e in errors
        ]
        raise CompileError(_failure(f"{trt.__name__} cannot read {graph}", found))
    return network


def _optimization_profile(builder: Any, network: Any, profile: Profile) -> Any:
    """Batch sizes for every input with a dynamic first dimension. Raises CompileError if another one is dynamic."""
    shapes = builder.create_optimization_profile()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        batch, *rest = tuple(tensor.shape)
        if -1 in rest:
            raise CompileError(
                f"input {tensor.name!r} has shape {tuple(tensor.shape)}; only the batch may be dynamic"
            )
        if batch == -1:
            shapes.set_shape(
                tensor.name, *([size, *rest] for size in (profile.min, profile.opt, profile.max))
            )
    return shapes


def _failure(what: str, messages: list[str]) -> str:
    advice = [words for sign, words in _RTX_ADVICE if any(sign in message for message in messages)]
    return f"{what}: {'; '.join(messages) or 'no reason was given'}" + "".join(
        f" ({words})" for words in advice
    )


def read_layers(log: str) -> list[receipt.Layer]:
    """Parse the `Layers:` message of a DETAILED build.

    A node belongs to the layer that does its product. Casts, scalings and activations around it are generated
    kernels whose metadata names it too: they count only for nodes that no product layer has (fused attention).
    """
    parsed = [match for line in log.splitlines() if (match := _LAYER.fullmatch(line.strip()))]
    owned = {node for match in parsed if _PRODUCT.search(match["kind"]) for node in _named(match)}
    return [_layer(match, owned) for match in parsed]


def _layer(match: re.Match[str], owned: set[str]) -> receipt.Layer:
    if _PRODUCT.search(match["kind"]):
        dtype, nodes = _product_dtype(match), _named(match)
    elif match["kind"] in _GENERATED:
        dtype, nodes = _generated_dtype(match), tuple(node for node in _named(match) if node not in owned)
    else:
        dtype, nodes = _widest(dtype for dtype, _ in _tensors(match["inputs"])), ()
    return receipt.Layer(name=match["name"], kind=match["kind"], dtype=dtype, nodes=nodes)


def _product_dtype(match: re.Match[str]) -> str:
    """The wider of the first input and the weights: the largest constant, or for two activations the other input.

    Other inputs (a residual) and small constants (bias, scales) stay FP32 in an INT8 product.
    """
    first, *others = [dtype for dtype, _ in _tensors(match["inputs"])] or [""]
    if listed := _LISTED_WEIGHTS.search(match["rest"]):
        return _widest([first, _dtype(listed[1])])
    constants = [(math.prod(shape), dtype) for dtype, shape in _tensors(match["constants"])]
    size, weights = max(constants, default=(0, ""))
    return _widest([first, weights if size > 1 else (others or [first])[0]])


def _generated_dtype(match: re.Match[str]) -> str:
    """The widest of a generated kernel's inputs and of its constants that are at least matrices."""
    matrices = [dtype for dtype, shape in _tensors(match["constants"]) if sum(size > 1 for size in shape) > 1]
    return _widest([*(dtype for dtype, _ in _tensors(match["inputs"])), *matrices])


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
