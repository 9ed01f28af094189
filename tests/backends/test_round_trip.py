"""Calls to a GPU: on one where there is one; elsewhere the same code on a stand-in for torch.cuda that computes on the CPU."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch

from tlexport import hardware
from tlexport.backends import Options, eager, ort, ort_cuda, round_trip, trt, trt_options
from tlexport.backends.round_trip import GRAPH, RoundTrip
from tlexport.backends.trt_runner import EngineRunner
from tlexport.errors import CompileError
from tlexport.recipe import TensorRT
from tlexport.tensors import Profile

PARTS = {"enqueue", "h2d", "compute", "d2h"}
IMAGES = {"images": np.arange(12, dtype=np.uint8).reshape(2, 6)}


class CudaStandIn:
    """What round_trip uses of torch.cuda, in order and at once. `graphs`: what was captured, as a list of replays."""

    def __init__(self) -> None:
        self.current: object = "default"
        self.capturing: list[Callable[[], object]] | None = None
        self.ticks = 0
        self.refuses = ""
        self.broken = False
        stand_in = self

        class Stream:
            cuda_stream = 4711

            def synchronize(self) -> None:
                assert stand_in.capturing is None, "CUDA forbids waiting in a capture"

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                assert isinstance(stand_in.current, Stream), "recorded on the default stream"
                stand_in.ticks += 1
                self.at = stand_in.ticks

            def elapsed_time(self, end: Event) -> float:
                return float(end.at - self.at)

        class CUDAGraph:
            steps: list[Callable[[], object]]

            def replay(self) -> None:
                assert isinstance(stand_in.current, Stream)
                for step in [] if stand_in.broken else self.steps:
                    step()

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph

    def current_stream(self) -> object:
        return SimpleNamespace(synchronize=lambda: None)

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, *, stream: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local" and stream is self.current
        self.capturing = []
        try:
            yield
            if self.refuses:
                raise RuntimeError(f"{self.refuses}\nmore of it")
            graph.steps = self.capturing
        finally:
            self.capturing = None

    def does(self, step: Callable[[], object]) -> None:
        """A kernel: computed now, or when the graph that captures it is replayed."""
        assert isinstance(self.current, self.Stream), "computed on the default stream"
        step() if self.capturing is None else self.capturing.append(step)


@pytest.fixture
def cuda(monkeypatch) -> CudaStandIn:
    """Tensors `on the GPU` and page-locked ones are plain ones."""
    stand_in = CudaStandIn()
    monkeypatch.setattr(torch, "cuda", stand_in)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    empty, empty_like = torch.empty, torch.empty_like

    def empty_here(
        *size: int, dtype: torch.dtype, pin_memory: bool = False, device: str = "cpu"
    ) -> torch.Tensor:
        return empty(*size, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty_here)
    monkeypatch.setattr(torch, "empty_like", lambda tensor, device: empty_like(tensor))
    return stand_in


def doubling(cuda: CudaStandIn, trip: RoundTrip) -> round_trip.Compute:
    """A computation in buffers that are made once."""
    made = {"sums": torch.zeros(2, 1)}

    def compute() -> dict[str, torch.Tensor]:
        given = trip.held["images"]
        cuda.does(lambda: made["sums"].copy_(2 * given.float().sum(1, keepdim=True)))
        return made

    return compute


EXPECTED = 2 * IMAGES["images"].sum(1, keepdims=True).astype(np.float32)


@pytest.mark.parametrize("capture", [False, True])
def test_a_call_answers_and_is_timed_apart(cuda, capture) -> None:
    trip = RoundTrip(IMAGES, cuda.Stream())
    bound = trip.bound(doubling(cuda, trip), capture=capture, note="as it is")
    assert np.array_equal(bound.outputs()["sums"], EXPECTED)
    trip._given["images"].fill_(1)
    parts = bound.timed_parts()
    assert set(parts) == PARTS and parts["enqueue"] > 0
    assert [parts[part] for part in ("h2d", "compute", "d2h")] == [1, 1, 1], "between neighbouring events"
    assert (bound.outputs()["sums"] == 12).all(), "the inputs are copied anew by each call"
    held = bound.outputs()["sums"]
    trip._given["images"].fill_(2)
    bound.call()
    assert (held == 12).all() and (bound.outputs()["sums"] == 24).all()
    assert bound.note == (GRAPH if capture else "as it is")
    assert cuda.current == "default"


@pytest.mark.parametrize(
    "fault, words",
    [
        ({"refuses": "operation not permitted when stream is capturing"}, "operation not permitted when stream is capturing"),
        ({"broken": True}, "a replay does not write sums"),
    ],
)  # fmt: skip
def test_a_failed_capture_is_said_and_answers_still(cuda, fault, words) -> None:
    vars(cuda).update(fault)
    trip = RoundTrip(IMAGES, cuda.Stream())
    bound = trip.bound(doubling(cuda, trip), capture=True)
    assert bound.note == f"no {GRAPH}: {words}"
    bound.call()
    assert np.array_equal(bound.outputs()["sums"], EXPECTED) and cuda.current == "default"


def test_a_single_row_of_a_structured_array_crosses(cuda) -> None:
    rows = np.zeros(1, [("a", np.float32), ("b", np.int8)])
    held = RoundTrip({"a": rows["a"]}, cuda.Stream()).held
    assert held["a"].shape == (1,) and held["a"].dtype == torch.float32


class EngineStandIn:
    """An engine and its context: doubles the sums of its only input."""

    num_io_tensors = 2

    def __init__(self, cuda: CudaStandIn) -> None:
        self.cuda, self.at, self.executed, self.fails = cuda, {}, 0, False

    def get_tensor_name(self, index: int) -> str:
        return ("images", "sums")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "output" if name == "sums" else "input"

    def get_tensor_dtype(self, name: str) -> str:
        return "float"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        return shape[0] <= 2

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (2, 1)

    def set_tensor_address(self, name: str, address: int) -> None:
        self.at[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 4711 and set(self.at) == {"images", "sums"}
        self.executed += 1
        if self.fails:
            return False
        given = (np.ctypeslib.ctypes.c_uint8 * 12).from_address(self.at["images"])
        made = (np.ctypeslib.ctypes.c_float * 2).from_address(self.at["sums"])

        def kernel() -> None:
            np.frombuffer(made, np.float32)[:] = EXPECTED.ravel() if any(given) else 0

        self.cuda.does(kernel)
        return True


def engine_runner(cuda: CudaStandIn, **changed) -> tuple[EngineRunner, EngineStandIn]:
    engine = EngineStandIn(cuda)
    library = SimpleNamespace(TensorIOMode=SimpleNamespace(OUTPUT="output"), nptype=lambda kind: np.float32)
    return EngineRunner(library, engine, engine, "an engine", **changed), engine


def test_an_engine_is_executed_once_a_call_and_not_at_all_by_a_replay(cuda) -> None:
    runner, engine = engine_runner(cuda, capture=True)
    bound = runner.bind(IMAGES)
    before = engine.executed
    bound.call()
    assert engine.executed == before and bound.note == GRAPH
    assert np.array_equal(bound.outputs()["sums"], EXPECTED) and set(bound.timed_parts()) == PARTS
    assert np.array_equal(runner.run(IMAGES)["sums"], EXPECTED), "run captures nothing"
    assert engine.executed == before + 1
    plain, engine = engine_runner(cuda, note="another's graph")
    bound, before = plain.bind(IMAGES), engine.executed
    bound.call()
    assert engine.executed == before + 1 and bound.note == "another's graph"


def test_an_engine_that_fails_or_is_asked_for_too_much_says_so(cuda) -> None:
    runner, engine = engine_runner(cuda)
    with pytest.raises(CompileError, match=r"images of shape \(3, 6\) is outside"):
        runner.bind({"images": np.zeros((3, 6), np.uint8)})
    engine.fails = True
    with pytest.raises(CompileError, match="execution failed"):
        runner.bind(IMAGES)


def test_eager_copies_its_inputs_anew_and_lays_them_out_on_the_gpu(cuda) -> None:
    """The runner of a module on a GPU; the module computes on the CPU."""
    layouts = []

    class Sum(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            layouts.append(images.is_contiguous(memory_format=torch.channels_last))
            return images.half().sum((1, 2, 3))[:, None]

    images = np.ones((2, 3, 4, 4), np.float32)
    where = torch.device("cuda")
    runner = eager._EagerRunner(Sum(), ("images",), "sums", torch.channels_last, where, "", lambda: None)
    bound = runner.bind({"other": images, "images": images})
    assert bound.outputs()["sums"].tolist() == [[48], [48]] and bound.outputs()["sums"].dtype == np.float32
    bound.call()
    assert set(bound.timed_parts()) == PARTS and bound.note == "" and layouts == [True] * 3
    with pytest.raises(CompileError, match="needs images"):
        runner.bind({"other": images})


def test_the_names_used_are_those_of_torch_and_onnxruntime(graphs) -> None:
    """Which the stand-ins cannot show; the binding is a real one, of the CPU's memory."""
    import onnxruntime

    graph = inspect.signature(torch.cuda.graph.__init__).parameters
    assert {"cuda_graph", "stream", "capture_error_mode"} <= set(graph)
    assert "enable_timing" in inspect.signature(torch.cuda.Event.__new__).parameters
    used = {
        torch.cuda: ["Stream", "Event", "CUDAGraph", "graph", "stream", "current_stream"],
        torch.cuda.Stream: ["synchronize", "cuda_stream"],
        torch.cuda.Event: ["record", "elapsed_time"],
        torch.cuda.CUDAGraph: ["replay"],
    }
    assert [f"{of}.{name}" for of, names in used.items() for name in names if not hasattr(of, name)] == []
    libraries = b"".join(p.read_bytes() for p in Path(onnxruntime.__file__).parent.glob("capi/*.so"))
    for name in (b"user_compute_stream", b"enable_cuda_graph", b"use_tf32", b"gpu_graph_id"):
        assert name in libraries, name
    assert b"disable_synchronize_execution_providers" in libraries

    session = onnxruntime.InferenceSession(graphs.paths["fp32"], providers=["CPUExecutionProvider"])
    images, answers = torch.from_numpy(graphs.images), torch.zeros(graphs.reference().shape)
    binding = session.io_binding()
    binding.bind_input("images", "cpu", *ort_cuda._place(images, graphs.images.dtype)[1:])
    binding.bind_output("probabilities", "cpu", *ort_cuda._place(answers, np.dtype(np.float32))[1:])
    told = {"gpu_graph_id": "7", "disable_synchronize_execution_providers": "1"}
    options = ort_cuda._told(**told)
    assert {key: options.get_run_config_entry(key) for key in told} == told
    session.run_with_iobinding(binding, options)
    assert np.abs(answers.numpy() - graphs.reference()).max() < 1e-4


class SessionStandIn:
    """A session of ONNX Runtime; the run options are the library's own."""

    def __init__(self, cuda: CudaStandIn, fails: bool = False) -> None:
        self.cuda, self.fails, self.graphs = cuda, fails, []

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def get_outputs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name="sums")]

    def run(self, names, inputs, options) -> list[np.ndarray]:
        assert options.get_run_config_entry("gpu_graph_id") == "-1"
        return [EXPECTED.copy()]

    def io_binding(self) -> SimpleNamespace:
        places: dict[str, tuple] = {}
        keep = lambda name, *place: places.update({name: place})  # noqa: E731
        return SimpleNamespace(bind_input=keep, bind_output=keep, places=places)

    def run_with_iobinding(self, binding, options) -> None:
        graph = options.get_run_config_entry("gpu_graph_id")
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        if self.fails and graph != "-1":
            raise ValueError("Capturing failed\nat length")
        self.graphs.append(graph)
        device, number, kind, shape, address = binding.places["sums"]
        assert (device, number, kind, shape) == ("cuda", 0, np.float32, (2, 1))
        assert binding.places["images"][:4] == ("cuda", 0, np.uint8, (2, 6))
        made = (np.ctypeslib.ctypes.c_float * 2).from_address(address)
        self.cuda.does(lambda: np.copyto(np.frombuffer(made, np.float32), EXPECTED.ravel()))


def test_a_session_gets_our_stream_and_a_graph_for_each_binding(cuda) -> None:
    asked: list[dict[str, str]] = []
    session = SessionStandIn(cuda)
    runner = ort_cuda.opened(lambda settings: asked.append(dict(settings)) or session, graphs=True)
    assert asked == [{"user_compute_stream": "4711", "enable_cuda_graph": "1"}]
    for number in ("1", "2"):
        session.graphs.clear()
        bound = runner.bind(IMAGES)
        assert set(session.graphs) == {number} and bound.note == GRAPH
        assert np.array_equal(bound.outputs()["sums"], EXPECTED) and set(bound.timed_parts()) == PARTS
    assert np.array_equal(runner.run(IMAGES)["sums"], EXPECTED)


def test_a_session_that_cannot_capture_is_opened_without_and_says_so(cuda) -> None:
    asked: list[dict[str, str]] = []

    def session(settings) -> SessionStandIn:
        asked.append(dict(settings))
        if "enable_cuda_graph" in settings:
            raise CompileError("not all nodes are on CUDA")
        return SessionStandIn(cuda)

    bound = ort_cuda.opened(session, graphs=True).bind(IMAGES)
    assert bound.note == f"no {GRAPH}: not all nodes are on CUDA"
    assert len(asked) == 2 and "enable_cuda_graph" not in asked[1]
    assert ort_cuda.opened(session, graphs=False).bind(IMAGES).note == ""
    failing = SessionStandIn(cuda, fails=True)
    bound = ort_cuda.opened(lambda settings: failing, graphs=True).bind(IMAGES)
    assert bound.note == f"no {GRAPH}: Capturing failed" and set(failing.graphs) == {"-1"}
    assert np.array_equal(bound.outputs()["sums"], EXPECTED)


class RuntimeStandIn:
    """IRuntimeConfig and what makes it; `holds` is what it keeps instead of what it is given."""

    def __init__(self, holds: object = None) -> None:
        object.__setattr__(self, "holds", holds)

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, self.holds or value)

    def create_runtime_config(self) -> RuntimeStandIn:
        return self

    def create_execution_context(self, config: object = None) -> tuple[str, object]:
        return ("context", config)


def test_the_strategy_of_tensorrt_rtx_is_set_and_read_back() -> None:
    """With the library's own enumerators where it is installed: its config needs a GPU to be made."""
    if not trt.RTX.availability().installed:
        pytest.skip("tensorrt-rtx is not installed")
    import tensorrt_rtx

    engine = RuntimeStandIn()
    with trt_options.execution_context(tensorrt_rtx, engine, TensorRT(), graphs=True) as context:
        assert context == ("context", engine)
    assert engine.cuda_graph_strategy == tensorrt_rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    with trt_options.execution_context(tensorrt_rtx, RuntimeStandIn(), TensorRT(), graphs=False) as context:
        assert context == ("context", None)
    with (
        pytest.raises(CompileError, match="does not take CUDA graphs"),
        trt_options.execution_context(tensorrt_rtx, RuntimeStandIn("other"), TensorRT(), graphs=True),
    ):
        pass


def test_nothing_is_timed_apart_on_the_cpu(graphs) -> None:
    with ort.runner(graphs.paths["fp32"], threads=1, options=Options(cuda_graphs=True)) as runner:
        bound = runner.bind({"images": graphs.images})
    assert bound.timed_parts is None and bound.note == ""
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 2))
    with eager.runner_for(module, inputs=("x",), output="y") as runner:
        bound = runner.bind({"x": np.ones((2, 6), np.float32)})
    assert bound.timed_parts is None and bound.note == ""


@pytest.mark.gpu
def test_eager_on_the_gpu_is_timed_apart(graphs) -> None:
    if not hardware.capability():
        pytest.skip("needs an NVIDIA GPU")
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 2)).cuda()
    inputs = {"x": np.ones((2, 6), np.float32)}
    with eager.runner_for(module, inputs=("x",), output="y") as runner:
        bound, answer = runner.bind(inputs), runner.run(inputs)["y"]
        for _ in range(5):
            parts = bound.timed_parts()
    assert set(parts) == PARTS and all(value > 0 for value in parts.values())
    assert np.allclose(bound.outputs()["y"], answer, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs_on", [False, True])
def test_onnxruntime_on_the_gpu_with_and_without_a_graph(graphs, graphs_on) -> None:
    if len(ort.availability().runs) < 2:
        pytest.skip("needs an NVIDIA GPU and ONNX Runtime's CUDA provider")
    asked = Options(cuda_graphs=graphs_on)
    with ort.runner(graphs.paths["fp32"], threads=1, device="cuda", options=asked) as runner:
        for images in (graphs.images, graphs.images[:2], graphs.images):
            bound = runner.bind({"images": images})
            bound.call()
            assert np.abs(bound.outputs()["probabilities"] - graphs.reference()[: len(images)]).max() < 1e-4
            assert bound.note == (GRAPH if graphs_on else "")
        parts = bound.timed_parts()
    assert set(parts) == PARTS and parts["compute"] > 0


def with_a_determinant(model: onnx.ModelProto, path: Path) -> None:
    """The same answers, by way of an operator that ONNX Runtime has for the CPU alone."""
    nodes, make = model.graph.node, onnx.helper.make_node
    nodes[-1].output[0], name = "before", nodes[-1].output[0]
    nodes.append(make("Transpose", ["before"], ["across"], perm=[1, 0]))
    nodes.append(make("MatMul", ["across", "before"], ["square"]))
    nodes.append(make("Det", ["square"], ["determinant"]))
    nodes.append(make("Sub", ["determinant", "determinant"], ["zero"]))
    nodes.append(make("Add", ["before", "zero"], [name]))
    onnx.save(model, path)


def test_the_graph_with_a_determinant_answers_alike(graphs, tmp_path) -> None:
    with_a_determinant(onnx.load(graphs.paths["fp32"]), tmp_path / "mixed.onnx")
    with ort.runner(tmp_path / "mixed.onnx", threads=1) as runner:
        found = runner.run({"images": graphs.images})["probabilities"]
    assert np.abs(found - graphs.reference()).max() < 1e-4


@pytest.mark.gpu
def test_a_graph_with_a_node_that_cuda_lacks_is_run_without_a_cuda_graph(graphs, tmp_path) -> None:
    if len(ort.availability().runs) < 2:
        pytest.skip("needs an NVIDIA GPU and ONNX Runtime's CUDA provider")
    path = tmp_path / "mixed.onnx"
    with_a_determinant(onnx.load(graphs.paths["fp32"]), path)
    asked = Options(cuda_graphs=True)
    with ort.runner(path, threads=1, device="cuda", options=asked) as runner:
        bound = runner.bind({"images": graphs.images})
    assert bound.note.startswith(f"no {GRAPH}: ")
    assert np.abs(bound.outputs()["probabilities"] - graphs.reference()).max() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("graphs_on", [False, True])
@pytest.mark.parametrize("flavour", [trt.RTX, trt.TENSORRT], ids=lambda f: f.NAME)
def test_an_engine_on_the_gpu_with_and_without_a_graph(flavour, graphs_on, graphs, tmp_path) -> None:
    target = hardware.capability()
    if not target or target not in flavour.availability().builds:
        pytest.skip(f"needs an NVIDIA GPU that {flavour.NAME} compiles for")
    flavour.build(graphs.paths["fp16"], tmp_path / "m.engine", target, Profile(), graphs.expected("fp16"))
    asked = Options(cuda_graphs=graphs_on)
    with flavour.runner(tmp_path / "m.engine", threads=1, device="cuda", options=asked) as runner:
        for images in (graphs.images, graphs.images[:2], graphs.images):
            bound = runner.bind({"images": images})
            bound.call()
            assert np.abs(bound.outputs()["probabilities"] - graphs.reference()[: len(images)]).max() < 5e-3
            assert bound.note.startswith(GRAPH) if graphs_on else bound.note == ""
        assert set(bound.timed_parts()) == PARTS
