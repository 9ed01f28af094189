"""bench on runs made of real parts: a network with its graph, and a plain baseline that has none."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from tlexport.backends import Bound, registry
from tlexport.evidence.latency import closed_loop, histogram
from tlexport.graph import inspect, trace
from tlexport.models import image
from tlexport.models.checkpoint import save_checkpoint, save_graph
from tlexport.models.network import ServingModel
from tlexport.progress import Silent
from tlexport.recipe import Recipe, parse
from tlexport.results import Variant, VerifyResult
from tlexport.run import Run, digest
from tlexport.stages import bench
from tlexport.tensors import Profile

ABOUT = {"class_names": "[]", "preprocessing": "{}", "task": "binary"}


def recipe_of(*overrides: str) -> Recipe:
    document = {"name": "bench", "data": {"path": "sklearn/digits"}, "backbone": {"name": "timm/test_resnet"}}
    return parse(document, ["bench.samples=10", "bench.batch_sizes=[2]", *overrides])


def prepared(path: Path, recipe: Recipe, graph: Path, inputs: np.ndarray) -> Run:
    """A run whose checkpoint is there and whose only variant passed."""
    run = Run(path)
    for folder in ("reference", "graphs", "variants/cpu-onnxruntime-fp32"):
        (path / folder).mkdir(parents=True)
    np.save(path / "reference/inputs.npy", inputs)
    (path / "graphs/fp32.onnx").write_bytes(graph.read_bytes())
    file = path / "variants/cpu-onnxruntime-fp32/model.onnx"
    expected = inspect.compute_dtypes(trace.load(graph))
    registry.build("onnxruntime", graph, file, "cpu", Profile(), expected, timeout=60)
    passed = Variant(
        name="cpu-onnxruntime-fp32",
        backend="onnxruntime",
        target="cpu",
        precision="fp32",
        file=run.relative(file),
        sha256=digest(file),
        size_bytes=file.stat().st_size,
        verdict="pass",
    )
    refused = Variant(
        name="cpu-openvino-fp32", backend="openvino", target="cpu", precision="fp32", verdict="refused"
    )
    verified = VerifyResult(
        run=str(path),
        metric="auc",
        reference=0.9,
        samples=len(inputs),
        confidence=0.95,
        gates={},
        variants=(passed, refused),
    )
    (path / "verify.json").write_text(verified.model_dump_json())
    run.stage("verify", {}, inputs=[]).finish(verified, outputs=[path / "verify.json"])
    return run


@pytest.fixture
def network(tmp_path: Path) -> Run:
    recipe = recipe_of()
    run = Run.create(tmp_path / "run", recipe)
    torch.manual_seed(0)
    spec = image.describe_backbone("timm/test_resnet", classes=2, task="binary", image_size=32)
    model = image.create(spec).eval()
    save_checkpoint(run / "checkpoint", model, spec, {})
    inputs = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    graph = trace.trace(
        ServingModel(model),
        (torch.from_numpy(inputs[:2]),),
        opset=20,
        input_names=("images",),
        output_name="probabilities",
        metadata=ABOUT,
    )
    trace.save(graph, tmp_path / "graph.onnx")
    return prepared(run.path, recipe, tmp_path / "graph.onnx", inputs)


@pytest.fixture
def baseline(tmp_path: Path) -> Run:
    """Logistic regression on two of a structured array's fields; there is no PyTorch model."""
    pytest.importorskip("skl2onnx")
    from skl2onnx import to_onnx
    from sklearn.datasets import load_breast_cancer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    data = load_breast_cancer()
    x = data.data.astype(np.float32)
    model = to_onnx(
        make_pipeline(StandardScaler(), LogisticRegression()).fit(x, data.target),
        x[:1],
        options={"zipmap": False},
    )
    del model.graph.output[0]
    trace.save(model, tmp_path / "graph.onnx")
    recipe = recipe_of()
    run = Run.create(tmp_path / "run", recipe)
    (run / "checkpoint").mkdir()
    save_graph(run / "checkpoint", model.SerializeToString(), "baseline/logistic", "binary", {})
    rows = np.zeros(5, [("X", "f4", (30,)), ("other", "f4", (4,))])
    rows["X"] = x[:5]
    return prepared(run.path, recipe, tmp_path / "graph.onnx", rows)


def test_a_network_and_its_variant_are_timed_with_the_threads_that_suit_them(network: Run) -> None:
    found = bench.run(network, network.recipe, Silent())
    assert found == bench.load(network)
    variant, refused = found.variants
    assert found.reference.name == "torch-eager" and found.reference.speedup == 1.0
    assert variant.speedup is not None and variant.speedup > 1.5
    for timed in (variant, found.reference):
        assert timed.threads in {1, found.threads} and timed.count == 10 and timed.calls_per_sample == 1
        assert timed.p50_ms is not None and 0.01 < timed.p50_ms < 1000
        assert timed.throughput is not None and timed.throughput["2"] > 0
    assert refused.p50_ms is None and refused.threads is None and refused.latency is None
    assert variant.latency is not None and variant.latency.p50.value_ms == variant.p50_ms
    assert variant.latency.p50.low_ms <= variant.p50_ms <= variant.latency.p50.high_ms
    _, counts = histogram.decode(variant.latency.histogram)
    assert counts.sum() == variant.count
    assert variant.knee is not None and variant.knee.at == 2 and not variant.knee.passed
    assert variant.memory is not None and found.reference.memory is None
    if sys.platform == "linux":
        assert 0 < variant.memory.host_peak_mib < 500 and variant.memory.device_mib is None
    assert found.watch is not None and found.watch.seconds > 0 and found.watch.readings >= 2
    assert found.clock_ns is not None and 1 < found.clock_ns < 1e5
    with np.load(network / found.raw, allow_pickle=False) as raw:
        assert np.median(raw[variant.name]) == pytest.approx(variant.p50_ms / 1e3)


def test_threads_that_the_recipe_states_are_used_as_they_are(
    network: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "fastest_threads", lambda *_: pytest.fail("there is nothing to choose"))
    found = bench.run(network, recipe_of("bench.threads=1"), Silent())
    assert found.reference.threads == found.variants[0].threads == found.threads == 1


class Slept:
    """Stands for a loaded candidate: a call takes `seconds`, wherever it is said to run."""

    provider = "clock"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def bind(self, inputs):
        return Bound(lambda: time.sleep(self.seconds), dict)


def test_the_faster_number_of_threads_is_found() -> None:
    """A call that two threads make slower, as they do with a small model, and one that they make faster."""

    def small(threads: int):
        return nullcontext(Slept(1e-4 * threads))

    def large(threads: int):
        return nullcontext(Slept(4e-3 / threads))

    assert bench.fastest_threads(small, {}, 4) == 1
    assert bench.fastest_threads(large, {}, 4) == 4
    assert bench.fastest_threads(small, {}, 1) == 1


def test_a_baseline_has_no_reference_to_be_faster_than(baseline: Run) -> None:
    found = bench.run(baseline, baseline.recipe, Silent())
    variant = found.variants[0]
    assert (found.reference.name, found.reference.metric) == ("baseline/logistic", 0.9)
    assert found.reference.p50_ms is found.reference.speedup is variant.speedup is None
    assert variant.p50_ms is not None and variant.p50_ms < 0.2
    assert variant.calls_per_sample is not None and variant.calls_per_sample > 1
    sooner = any("keep it on the CPU" in note and "not measured here" in note for note in found.notes)
    assert sooner == (variant.p50_ms < 0.0151)  # two copies, a launch and one kernel
    assert any(f"cpu-onnxruntime-fp32 {variant.calls_per_sample}" in note for note in found.notes)


def test_variants_for_a_gpu_are_held_against_the_reference_there(
    network: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is needed: its candidates sleep. They are twenty times faster than the CPU's, and drop none of those."""
    verified = network.result("verify", VerifyResult)
    (network.path / "variants/sm90-onnxruntime-fp16").mkdir()
    (network.path / "variants/sm90-onnxruntime-fp16/receipt.json").write_text('{"layers": []}')
    on_gpu = verified.variants[0].model_copy(
        update={
            "name": "sm90-onnxruntime-fp16",
            "target": "sm90",
            "precision": "fp16",
            "file": "variants/sm90-onnxruntime-fp16/receipt.json",
        }
    )
    network.stage("verify", {}, inputs=[]).finish(
        verified.model_copy(update={"variants": (*verified.variants, on_gpu)}),
        outputs=[network / "verify.json"],
    )
    takes = {"cpu": 8e-3, "cuda": 8e-4}
    monkeypatch.setattr(
        bench, "_reference", lambda serving, device, threads: nullcontext(Slept(takes[device]))
    )
    monkeypatch.setattr(
        bench.registry,
        "loader",
        lambda backend, artifact, target, options: (
            lambda threads: nullcontext(Slept(4e-3 if target == "cpu" else 2e-4))
        ),
    )
    found = bench.run(network, recipe_of("bench.threads=1"), Silent())
    assert [variant.name for variant in found.references] == ["torch-eager", "torch-eager-gpu"]
    by_name = {variant.name: variant for variant in found.variants}
    cpu, gpu = by_name["cpu-onnxruntime-fp32"], by_name["sm90-onnxruntime-fp16"]
    assert not cpu.dropped and cpu.count == found.reference.count == gpu.count == 10
    times = np.load(network / found.raw)
    for variant, reference in ((cpu, "torch-eager"), (gpu, "torch-eager-gpu")):
        assert variant.speedup == closed_loop.speedup(times[reference], times[variant.name]).ratio
    assert any("torch-eager-gpu runs as torch does by default" in note for note in found.notes)
    assert times["started/sm90-onnxruntime-fp16"].min() > times["started/cpu-onnxruntime-fp32"].max()


def test_a_missed_latency_gate_fails_the_variant_with_its_digits(baseline: Run) -> None:
    found = bench.run(baseline, recipe_of("gates.max_p50_ms=1e-6"), Silent())
    assert found.variants[0].verdict == "fail" and found.variants[0].too_slow
    assert (
        found.variants[0].reason.startswith("p50_ms 0.0")
        and "over max_p50_ms 1e-06" in found.variants[0].reason
    )


def test_nothing_to_time_is_no_error(baseline: Run) -> None:
    verified = baseline.result("verify", VerifyResult)
    failed = tuple(v.model_copy(update={"verdict": "fail"}) for v in verified.variants)
    baseline.stage("verify", {}, inputs=[]).finish(
        verified.model_copy(update={"variants": failed}), outputs=[baseline / "verify.json"]
    )
    found = bench.run(baseline, baseline.recipe, Silent())
    assert all(variant.p50_ms is None for variant in found.variants) and found.notes == ()
    assert isinstance(closed_loop.clock_ns(), float)


def test_a_candidate_that_slows_down_while_it_is_counted_is_told(
    baseline: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: every call of the variant sleeps 20 microseconds longer than the one before."""
    from contextlib import contextmanager
    from itertools import count
    from time import sleep

    @contextmanager
    def slowing(*words, **more):
        calls = count()

        class Slowing:
            provider = "clock"

            def bind(self, inputs):
                return Bound(lambda: sleep(2e-5 * next(calls)), dict)

        yield Slowing()

    monkeypatch.setattr(bench.registry, "loader", lambda *_: slowing)
    found = bench.run(baseline, recipe_of("bench.samples=120", "bench.threads=1"), Silent())
    variant = found.variants[0]
    assert variant.unsettled and any("not settled when the warm-up" in note for note in found.notes)
    assert "the median rose by" in variant.latency.drift
    assert any(note.startswith("cpu-onnxruntime-fp32: not stationary") for note in found.notes)
