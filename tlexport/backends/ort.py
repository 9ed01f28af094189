"""ONNX Runtime: the artifact is the graph itself; what it computes in is read from a profiled inference."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tlexport import hardware
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
    ort_cuda,
    receipt,
    typed,
)
from tlexport.errors import CompileError
from tlexport.run import replacing
from tlexport.tensors import Profile

NAME = "onnxruntime"
EXTRA = ""
SUFFIX = ".onnx"
BOUND = "inputs and outputs are bound once (IOBinding); on a GPU page-locked, with copies there and back in the time"

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_DTYPES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "int8", "uint8": "int8"}
_COMPUTE = re.compile(r"Conv|Gemm|MatMul|Attention|TreeEnsemble|LinearClassifier|LinearRegressor|SVM")
_LACKING = re.compile(r"(?:an implementation|Provider type) for (\w+)(?:\(\d+\))? node with name")
_NCHWC = "_nchwc"
_NONE: Mapping[str, str] = {}


def availability() -> Availability:
    import onnxruntime

    cuda, note = _cuda_problem()
    here = ("cpu", cuda) if cuda else ("cpu",)
    return Availability(True, onnxruntime.__version__, builds=here, runs=here, note=note)


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
    """Copy `graph` to `out` and read back what an inference of it computes in.

    What a GPU computes in can only be read on that GPU, so a CUDA target is built on its own machine alone.
    Raises CompileError if the target is not this machine's or ONNX Runtime refuses the graph.
    """
    if target not in availability().builds:
        raise CompileError(f"ONNX Runtime can vouch for {target} only on a machine that runs it")
    device = "cpu" if target == "cpu" else "cuda"
    # Copied first: a full disk is then reported as one, and not as what ONNX Runtime makes of it.
    with replacing(out) as partial:
        shutil.copyfile(graph, partial)
        layers = _executed(graph, device, profile, expected)
    source = f"ONNX Runtime profile ({device})"
    return Artifact(out, receipt.make(source, expected, layers, typed.modules(graph)))


@dataclass
class _CpuRunner:
    session: Any
    provider: str

    def run(self, inputs: Tensors) -> dict[str, np.ndarray]:
        return dict(zip(self._outputs, self.session.run(self._outputs, dict(inputs)), strict=True))

    @functools.cached_property
    def _outputs(self) -> list[str]:
        return [output.name for output in self.session.get_outputs()]

    def bind(self, inputs: Tensors) -> Bound:
        """The session reads the inputs and writes the outputs in place (IOBinding)."""
        from onnxruntime import OrtValue

        outputs = self.run(inputs)
        binding = self.session.io_binding()
        read = {name: OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        written = {name: OrtValue.ortvalue_from_numpy(array) for name, array in outputs.items()}
        for name, value in read.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in written.items():
            binding.bind_ortvalue_output(name, value)
        call = Held(self.session.run_with_iobinding, binding)
        call.memory = (inputs, outputs, read, written)
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
    """Load the graph on `device`. Raises CompileError if CUDA was asked for and does not work.

    To judge, Q/DQ graphs run at the basic level, since kernels for CPUs without VNNI saturate in 16 bits
    (S8S8), and FP16 graphs on the CPU with every tensor rounded to FP16, which ONNX Runtime would leave out.
    """
    facts = typed.facts(artifact)
    source: Path | bytes = artifact
    if judge and facts.half and device == "cpu":
        source = typed.rounding_to_half(typed.load(artifact)).SerializeToString()
    level = "BASIC" if judge and facts.quantized else "EXTENDED" if facts.half else "ALL"
    if device == "cpu":
        session = _session(source, level, threads, device)
        yield _CpuRunner(session, session.get_providers()[0])
    else:
        _require_cuda()
        on_cuda = functools.partial(_session, source, level, threads, device)
        yield ort_cuda.opened(lambda settings: on_cuda(cuda=settings), graphs=options.cuda_graphs)


def _session(
    source: Path | bytes,
    level: str,
    threads: int,
    device: str,
    *,
    cuda: Mapping[str, str] = _NONE,
    **options: Any,
) -> Any:
    """A session on one device, which is checked afterwards: ONNX Runtime falls back to the CPU by itself.

    `cuda` are options of the CUDA provider, `options` attributes of SessionOptions.

    `level`: FP16 graphs crashed ONNX Runtime 1.31 at ALL (vit_b_16), so they get EXTENDED at most.
    """
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads, 1
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    settings.log_severity_level = 3
    # An idle session must not hold cores that another one is timed on.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    for name, value in options.items():
        setattr(settings, name, value)
    providers: list[Any] = [_CPU] if device == "cpu" else [(_CUDA, {"use_tf32": "0", **cuda}), _CPU]
    model = source if isinstance(source, bytes) else str(source)
    try:
        session = ort.InferenceSession(model, settings, providers=providers, enable_fallback=0)
    except Exception as error:  # its exceptions share no other base class
        text = typed.explained(str(error), source) + _expanded(str(error), source)
        raise CompileError(f"ONNX Runtime refused {_label(source)}: {text}") from error
    wanted = _CPU if device == "cpu" else _CUDA
    if session.get_providers()[0] != wanted:
        raise CompileError(
            f"ONNX Runtime runs {_label(source)} on {session.get_providers()[0]}, not on {wanted}"
        )
    return session


def _expanded(text: str, source: Path | bytes) -> str:
    """What a refusal means whose operator the graph has not got; empty for any other."""
    named = _LACKING.search(text)
    if named is None or any(node.op_type == named[1] for node in typed.parsed(source).graph.node):
        return ""
    return (
        f" (the graph has no {named[1]}: ONNX Runtime wrote another operator as simpler ones, since no provider has it "
        "in the graph's types; use another precision, or another backend)"
    )


def _label(source: Path | bytes) -> str:
    return "the graph" if isinstance(source, bytes) else str(source)


def _require_cuda() -> None:
    if problem := _cuda_problem()[1]:
        raise CompileError(problem)


@functools.cache
def _cuda_problem() -> tuple[str, str]:
    """The target this machine's CUDA provider runs, and why it does not run if it does not."""
    import onnxruntime as ort

    if not (capability := hardware.capability()):
        return "", "no NVIDIA GPU here: ONNX Runtime runs on the CPU only"
    if _CUDA not in ort.get_available_providers():
        return (
            "",
            "this ONNX Runtime has no CUDA provider; pip uninstall onnxruntime; pip install onnxruntime-gpu",
        )
    with contextlib.redirect_stdout(None):
        ort.preload_dlls()
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    try:
        session = ort.InferenceSession(_smallest(), settings, providers=[_CUDA], enable_fallback=0)
    except Exception as error:  # noqa: BLE001  its exceptions share no other base, and the text is returned
        return "", f"ONNX Runtime's CUDA provider does not load: {' '.join(str(error).split())}"
    if session.get_providers()[0] != _CUDA:
        return (
            "",
            "ONNX Runtime's CUDA provider does not load its libraries; compare its CUDA and cuDNN with torch's",
        )
    return capability, ""


def _smallest() -> bytes:
    """A graph of one node, to see whether a provider works."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "smallest", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def _executed(graph: Path, device: str, profile: Profile, expected: Mapping[str, str]) -> list[receipt.Layer]:
    """The compute kernels of one inference of zeros at the profile's smallest batch, with the types they got."""
    level = "EXTENDED" if typed.facts(graph).half else "ALL"
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "enable_profiling": True,
            "profile_file_prefix": str(Path(folder) / "profile"),
        }
        session = _session(graph, level, 1, device, **options)
        session.run(None, {tensor.name: _zeros(tensor, profile.min) for tensor in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text())
        kernels = {
            event["name"].removesuffix("_kernel_time"): event["args"]
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        }
        blocked = any(name.endswith(_NCHWC) for name in kernels)
        producers = _producers(graph, Path(folder) / "extended.onnx", device) if blocked else {}
    return [
        receipt.Layer(
            name=name, kind=f"{args['op_name']} on {args['provider']}", dtype=_dtype(args), nodes=nodes
        )
        for name, args in kernels.items()
        if _COMPUTE.search(args["op_name"])
        for nodes in [tuple(filter(None, [_origin(name, producers, expected)]))]
    ]


def _zeros(tensor: Any, batch: int) -> np.ndarray:
    dtype = {"float": "float32", "double": "float64"}.get(
        tensor.type[7:-1], tensor.type[7:-1]
    )  # tensor(uint8)
    return np.zeros([d if isinstance(d, int) else batch for d in tensor.shape], dtype)


def _dtype(args: Mapping[str, Any]) -> str:
    """The first operand's type of one profiled kernel; its second has the same by the operators' definitions.

    The second is not always listed: kernels that pack their weights at load let go of them. The one for weights of
    few bits says in its name alone what they are; nothing here makes others than INT4.
    """
    if args["op_name"] == "MatMulNBits":
        return "int4"
    name = str(next(iter(args["input_type_shape"][0])))
    return _DTYPES.get(name, name)


def _producers(graph: Path, scratch: Path, device: str) -> dict[str, str]:
    """Tensor -> node after the fusions of level EXTENDED, which keep the nodes' names.

    The blocked-layout (NCHWc) convolutions of level ALL are named after the tensor they make.
    """
    import onnx

    _session(graph, "EXTENDED", 1, device, optimized_model_filepath=str(scratch))
    return {str(node.output[0]): str(node.name) for node in onnx.load(scratch).graph.node}


def _origin(name: str, producers: Mapping[str, str], expected: Mapping[str, str]) -> str:
    if name.endswith(_NCHWC):
        name = producers.get(name.removesuffix(_NCHWC), "")
    return receipt.trace(re.sub(r"^fused |_token_\d+$", "", name), expected)
