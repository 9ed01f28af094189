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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlexport import hardware
from tlexport.backends import (
    DEFAULTS,
    Artifact,
    Availability,
    Options,
    Runner,
    capabilities,
    receipt,
    trt_options,
    trt_progress,
    typed,
)
from tlexport.backends.round_trip import GRAPH
from tlexport.backends.trt_log import read_layers
from tlexport.backends.trt_runner import EngineRunner
from tlexport.errors import CompileError, NotInstalledError
from tlexport.recipe import TensorRT
from tlexport.run import replacing
from tlexport.targets import CAPABILITIES
from tlexport.tensors import Profile


@dataclass
class Flavour:
    """A backend: the package that is installed as `module`."""

    NAME: str
    EXTRA: str
    SUFFIX: str
    module: str
    BOUND: str = "buffers are page-locked and allocated once; copies to the GPU and back are in the time"

    @property
    def crosses(self) -> bool:
        """Whether it compiles for GPUs that are not in this machine."""
        return self.NAME == "tensorrt_rtx"

    def availability(self) -> Availability:
        if importlib.util.find_spec(self.module) is None:
            return Availability(False, note=f"pip install 'tlexport[{self.EXTRA}]'")
        trt, here = self._library(), hardware.capability()
        own = tuple(filter(None, [here]))
        builds = self._ahead_of_time() if self.crosses else own
        note = (
            ""
            if here
            else f"no NVIDIA GPU here: engines are {'built but not run' if self.crosses else 'not built'}"
        )
        options = trt_options.supported(self.NAME)
        return Availability(True, trt.__version__, builds=builds, runs=own, note=note, options=options)

    def refusal(self, target: str, precision: str) -> str:
        if reason := capabilities.refusal(self.NAME, target, precision):
            return reason
        if not self.crosses:
            here = hardware.capability()
            found = f"this machine has {here}" if here else "this machine has no NVIDIA GPU"
            return (
                ""
                if here == target
                else f"TensorRT builds only for the GPU it runs on: {found}, not {target}"
            )
        if target not in (known := self._ahead_of_time()):
            return f"this TensorRT-RTX ({self._library().__version__}) does not compile for {target} (it does for {', '.join(known)})"
        return ""

    def build(
        self,
        graph: Path,
        out: Path,
        target: str,
        profile: Profile,
        expected: Mapping[str, str],
        options: Options = DEFAULTS,
    ) -> Artifact:
        """Compile `graph` for `target`. Raises CompileError with the parser's or compiler's own words, and for an
        option that the library cannot honour.

        With TF32 allowed a product in FP32 may be done in it, so TF32 is what the receipt then asks for and claims.
        """
        trt = self._library()
        asked = options.tensorrt
        if reason := self.refusal(target, "") or trt_options.refusal(self.NAME, asked):
            raise CompileError(reason)
        typed.require_standard(graph, self.NAME)
        log = _log(trt)
        builder = trt.Builder(log)
        options.report("reading the graph", 0.0)
        network = _parse(trt, builder, log, graph)
        config = self._config(trt, builder, log, target, asked)
        config.add_optimization_profile(_optimization_profile(builder, network, profile))
        monitor = trt_progress.monitor(trt, options.report)
        config.progress_monitor = monitor
        with trt_options.timing_cache(config, asked):
            engine = builder.build_serialized_network(network, config)
            if engine is None:
                failure = _failure(f"{self.NAME} cannot compile {graph} for {target}", log.errors)
                raise CompileError(typed.explained(failure + trt_options.advice(asked, log.errors), graph))
        options.report("reading the log", 1.0)
        layers = read_layers(log.layers)
        if asked.tf32:
            expected = {node: "tf32" if dtype == "fp32" else dtype for node, dtype in expected.items()}
            layers = [_in_tf32(layer) for layer in layers]
        with replacing(out) as partial:
            partial.write_bytes(memoryview(engine))
        source = f"{self.NAME} {trt.__version__} build log"
        return Artifact(out, receipt.make(source, expected, layers, typed.modules(graph)))

    @contextlib.contextmanager
    def runner(
        self,
        artifact: Path,
        *,
        threads: int,
        device: str = "cuda",
        judge: bool = False,
        options: Options = DEFAULTS,
    ) -> Iterator[Runner]:
        """Load an engine on the first GPU. `threads` and `judge` change nothing: an engine is fixed.

        For `options.cuda_graphs` TensorRT-RTX has a strategy of its own, which waits for the kernels that it compiles for
        the shapes it meets; TensorRT's executions are captured here.

        Loading executes what is in the file: call it only for engines whose hash was checked. Raises CompileError
        if there is no GPU, or the engine is not for it, or holds no weights.
        """
        trt = self._library()
        if device != "cuda":
            raise CompileError(f"{self.NAME} engines run on an NVIDIA GPU, not on the {device}")
        if not (here := hardware.capability()):
            raise CompileError(
                f"{artifact} needs an NVIDIA GPU to run and this machine has none; it can only be built here"
            )
        log = _log(trt)
        runtime = trt.Runtime(log)
        runtime.engine_host_code_allowed = True  # a version-compatible engine brings its runtime as code
        engine = runtime.deserialize_cuda_engine(artifact.read_bytes())
        if engine is None:
            raise CompileError(_failure(f"{self.NAME} cannot load {artifact} on {here}", log.errors))
        if engine.refittable:  # engines are built so for nothing else
            raise CompileError(
                f"{artifact} was built without its weights (tensorrt.strip_weights): refit it before it runs"
            )
        own = self.crosses and options.cuda_graphs
        with trt_options.execution_context(trt, engine, options.tensorrt, graphs=own) as context:
            capture = options.cuda_graphs and not self.crosses
            note = f"{GRAPH}, which {self.NAME} captures by itself" if own else ""
            yield EngineRunner(trt, engine, context, f"{self.NAME} on {here}", capture, note)

    def _library(self) -> Any:
        if importlib.util.find_spec(self.module) is None:
            raise NotInstalledError(f"backend {self.NAME!r}", self.EXTRA)
        return importlib.import_module(self.module)

    def _ahead_of_time(self) -> tuple[str, ...]:
        return tuple(
            name for name in CAPABILITIES if hasattr(self._library().ComputeCapability, name.upper())
        )

    def _config(self, trt: Any, builder: Any, log: Any, target: str, options: TensorRT) -> Any:
        """Target and options, and the layers' types written to the log. Raises CompileError with what the library minds."""
        before = len(log.errors)
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if self.crosses:
            config.num_compute_capabilities = 1
            if not config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), 0):
                raise CompileError(_failure(f"{self.NAME} does not take {target}", log.errors[before:]))
        trt_options.apply(trt, config, options)
        if wrong := log.errors[before:]:
            raise CompileError(_failure(f"{self.NAME} refuses its settings for {target}", wrong))
        return config


RTX = Flavour("tensorrt_rtx", "rtx", ".rtx.engine", "tensorrt_rtx")
TENSORRT = Flavour("tensorrt", "tensorrt", ".engine", "tensorrt")


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
        text = _failure(f"{trt.__name__} cannot read {graph}", found)
        raise CompileError(typed.explained(text, graph))
    return network


def _in_tf32(layer: receipt.Layer) -> receipt.Layer:
    return layer.model_copy(update={"dtype": "tf32"}) if layer.dtype == "fp32" and layer.nodes else layer


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
    return f"{what}: {'; '.join(messages) or 'no reason was given'}" + "".join(
        f" ({words})" for words in capabilities.advice(messages)
    )
