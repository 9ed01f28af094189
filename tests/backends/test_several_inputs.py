"""Several inputs, missing values and huge amounts: the backends agree with eager, and build what the types say."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from raw_numbers import Feed, Mixed, eager, feed_of, traced

from tlexport.backends import eager as reference
from tlexport.backends import ort, ov, registry, trt
from tlexport.errors import CompileError
from tlexport.graph import inspect, trace
from tlexport.graph.calibration import calibrate
from tlexport.graph.cast import to_half
from tlexport.graph.quantize import quantize, tensors_to_calibrate
from tlexport.tensors import Profile

needs_openvino = pytest.mark.skipif(not ov.availability().installed, reason="openvino is not installed")
needs_rtx = pytest.mark.skipif(not trt.RTX.availability().installed, reason="tensorrt-rtx is not installed")
CPU = [pytest.param(ort, id="onnxruntime"), pytest.param(ov, id="openvino", marks=needs_openvino)]
NAMES = ("numbers", "tokens", "flags")


@dataclass(frozen=True)
class Case:
    paths: dict[str, Path]
    expected: np.ndarray
    feed: Feed

    def dtypes(self, precision: str) -> dict[str, str]:
        return inspect.compute_dtypes(trace.load(self.paths[precision]))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Case:
    feed, folder = feed_of(), tmp_path_factory.mktemp("mixed")
    graphs = {"fp32": traced(Mixed().eval(), feed)}
    graphs["fp16"] = to_half(graphs["fp32"], "fp16")
    for flavour in ("cpu", "trt"):
        ranges = calibrate(
            graphs["fp32"], [feed], tensors_to_calibrate(graphs["fp32"], flavour), method="max"
        )
        graphs[f"int8-{flavour}"] = quantize(graphs["fp32"], ranges, flavour, reduce_range=flavour == "cpu")
    for name, graph in graphs.items():
        trace.save(graph, folder / f"{name}.onnx")
    paths = {name: folder / f"{name}.onnx" for name in graphs}
    return Case(paths, eager(Mixed().eval(), feed), feed)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("int8-cpu", 0.05)])
def test_built_as_asked_and_agrees_with_eager(backend, precision, tolerance, mixed: Case, tmp_path) -> None:
    out, expected = tmp_path / "m.onnx", mixed.dtypes(precision)
    artifact = backend.build(mixed.paths[precision], out, "cpu", Profile(min=1, opt=1, max=8), expected)
    assert artifact.receipt.disagreements == ()
    assert artifact.receipt.built() == expected and len(expected) >= 7
    with backend.runner(out, threads=1) as runner:
        found = runner.run(mixed.feed)["values"]
    assert np.abs(found - mixed.expected).max() < tolerance


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8-trt"])
def test_tensorrt_rtx_builds_what_the_types_say(precision, mixed: Case, tmp_path) -> None:
    expected = mixed.dtypes(precision)
    profile = Profile(min=1, opt=1, max=8)
    made = registry.build(
        "tensorrt_rtx", mixed.paths[precision], tmp_path / "e", "sm89", profile, expected, timeout=120
    )
    assert made.receipt.disagreements == () and made.receipt.built() == expected


@pytest.mark.parametrize("backend", CPU)
def test_a_bound_call_computes_the_same_answer_in_the_same_place(backend, mixed: Case) -> None:
    one = {name: array[4:5].copy() for name, array in mixed.feed.items()}
    with backend.runner(mixed.paths["fp32"], threads=1) as runner:
        expected = runner.run(one)["values"]
        bound = runner.bind(one)
        bound.call()
        first = bound.outputs()["values"]
        np.testing.assert_allclose(first, expected, rtol=1e-5)
        one["numbers"][:] = mixed.feed["numbers"][5:6]  # bound without a copy, so the next call reads it
        bound.call()
        np.testing.assert_allclose(bound.outputs()["values"], runner.run(one)["values"], rtol=1e-5)
        assert np.abs(bound.outputs()["values"] - expected).max() > 1e-3
        # A runner still takes other batches, and a second binding leaves the first alone.
        several = runner.bind(mixed.feed)
        several.call()
        np.testing.assert_allclose(several.outputs()["values"], mixed.expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(runner.run(mixed.feed)["values"], mixed.expected, rtol=1e-4, atol=1e-4)
        bound.call()
        assert bound.outputs()["values"].shape == (1, 2)


@pytest.mark.parametrize("backend", CPU)
def test_a_bound_call_keeps_its_memory_when_nobody_else_does(backend, mixed: Case) -> None:
    """Libraries read and write by address: without it a call would overwrite what others were given since."""
    one = {name: array[:1].copy() for name, array in mixed.feed.items()}
    kept = [weakref.ref(array) for array in one.values()]
    with backend.runner(mixed.paths["fp32"], threads=1) as runner:
        call = runner.bind(one).call
        del one
        gc.collect()
        assert all(reference() is not None for reference in kept)
        others = [np.full((1, 2), 7, np.float32) for _ in range(2000)]
        for _ in range(10):
            call()
        assert all((array == 7).all() for array in others)
        answer = call.memory[1]["values"]
        np.testing.assert_allclose(answer, mixed.expected[:1], rtol=1e-4, atol=1e-5)
        answer[:] = np.nan
        call()
        np.testing.assert_allclose(answer, mixed.expected[:1], rtol=1e-4, atol=1e-5)


def test_eager_takes_its_inputs_by_name_and_binds_them(mixed: Case) -> None:
    module = Mixed()
    shuffled = dict(reversed(mixed.feed.items()))
    with reference.runner_for(module, inputs=NAMES, output="values") as runner:
        np.testing.assert_array_equal(runner.run(shuffled)["values"], mixed.expected)
        bound = runner.bind(shuffled)
        bound.call()
        np.testing.assert_array_equal(bound.outputs()["values"], mixed.expected)
        with pytest.raises(CompileError, match="the module needs flags; given: numbers, tokens"):
            runner.run({name: mixed.feed[name] for name in NAMES[:2]})
    assert module.training


@pytest.mark.parametrize("name", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_predict_reads_the_fields_that_the_graph_reads(name, mixed: Case, tmp_path) -> None:
    feed = mixed.feed
    rows = np.empty(32, [("unread", "f8"), *((k, v.dtype, v.shape[1:]) for k, v in feed.items())])
    for key, array in feed.items():
        rows[key] = array
    rows["unread"] = np.nan
    np.save(tmp_path / "x.npy", rows)
    settings = {"batch_size": 5, "threads": 1, "timeout": 60}
    inputs, output = tmp_path / "x.npy", tmp_path / "y.npy"
    registry.predict(name, mixed.paths["fp32"], inputs, output, input_names=NAMES, **settings)
    assert np.abs(np.load(output) - mixed.expected).max() < 1e-4
    with pytest.raises(CompileError, match="inputs hold unread, numbers, tokens, flags; wanted: prices"):
        registry.predict(name, mixed.paths["fp32"], inputs, output, input_names=("prices",), **settings)


def trees(path: Path) -> onnx.ModelProto:
    """A random forest of scikit-learn as an ONNX graph, probabilities alone."""
    pytest.importorskip("skl2onnx")
    from skl2onnx import to_onnx
    from sklearn.datasets import load_breast_cancer
    from sklearn.ensemble import RandomForestClassifier

    data = load_breast_cancer()
    forest = RandomForestClassifier(10, max_depth=4, random_state=0).fit(data.data, data.target)
    model = to_onnx(forest, data.data[:1].astype(np.float32), options={"zipmap": False})
    del model.graph.output[0]
    trace.save(model, path)
    return model


def test_a_graph_of_trees_is_taken_by_onnxruntime_and_refused_in_one_line_elsewhere(tmp_path) -> None:
    path = tmp_path / "forest.onnx"
    model = trees(path)
    assert inspect.compute_dtypes(trace.load(path)) == {}
    assert inspect.io(model)[0][0].shape == ("batch", 30)
    made = registry.build("onnxruntime", path, tmp_path / "m.onnx", "cpu", Profile(), {}, timeout=60)
    assert made.receipt.agrees and made.receipt.summary() == "no matrix products, fp32 x 1"
    for name, target in (("openvino", "cpu"), ("tensorrt_rtx", "sm89")):
        if registry.get(name).availability().installed:
            with pytest.raises(
                CompileError, match=r"has no TreeEnsembleClassifier .*build it for onnxruntime$"
            ):
                registry.build(name, path, tmp_path / "m", target, Profile(), {}, timeout=60)
