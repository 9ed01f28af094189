"""quantize under a budget and explain-drop, on a real run: what they keep, refuse and blame."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from pipeline import Built, Ended

from tlexport import flow
from tlexport.errors import RunError
from tlexport.progress import Silent
from tlexport.recipe import with_overrides
from tlexport.results import CompileResult
from tlexport.run import Run, digest
from tlexport.stages import quantize

Cli = Callable[..., Ended]


def test_the_search_is_recorded_and_looks_at_validation_alone(run_copy: Run) -> None:
    (run_copy / "reference/inputs.npy").unlink()  # the test split: a search that reads it fails
    (run_copy / "reference/outputs.npy").unlink()
    recipe = with_overrides(
        run_copy.recipe, ["precision=[fp32, int8]", "search.report=true"], targets=["cpu"]
    )
    result = quantize.run(run_copy, recipe, Silent())
    (search,) = result.searches
    held = len(np.load(run_copy / "reference/validation/labels.npy"))
    assert search.graph == "int8-cpu" and search.samples == held and search.trials[0].within
    assert search.trials[0].low_macs == 1 and search.budget == recipe.gates.max_drop
    products = sum(len(layer.layers) for layer in search.layers)
    assert products == next(g for g in result.graphs if g.name == "int8-cpu").compute["int8"]
    assert "not measured" not in search.cost_model and "roofline" in search.cost_model


def test_layers_named_by_the_user_stay_in_fp32(run_copy: Run) -> None:
    recipe = with_overrides(run_copy.recipe, ["precision=[int8]", "search.report=true"], targets=["cpu"])
    worst = quantize.run(run_copy, recipe, Silent()).searches[0].layers[0].layers
    kept = with_overrides(recipe, [f"search.keep=[{', '.join(worst)}]"])
    result = quantize.run(run_copy, kept, Silent())
    assert result.graphs[-1].compute["fp32"] == len(worst)


def test_a_budget_that_nothing_keeps_is_an_error_that_names_the_closest(run_copy: Run, tlx: Cli) -> None:
    """The reference is made out to be always right on validation: no graph of this network comes near."""
    folder = run_copy / "reference/validation"
    labels = np.load(folder / "labels.npy")
    np.save(folder / "outputs.npy", np.eye(10, dtype=np.float32)[labels])
    ended = tlx("build", *(run_copy.path, "--target", "cpu", "-p", "int8", "--max-drop", "0.01"), "--json")
    assert ended.code == 10, ended.err
    why = json.dumps(ended.json["failed"])
    assert "no int8-cpu graph keeps the budget" in why and "closest of" in why and "drop" in why
    assert ended.json["bundle"] is None


@pytest.mark.parametrize(
    ("count", "message"), [(8, "8 calibration samples"), (24, "all 24 calibration samples are of one")]
)
def test_calibration_samples_that_prove_nothing_are_refused(
    run_copy: Run, count: int, message: str, tlx: Cli
) -> None:
    folder = run_copy / "reference"
    np.save(folder / "calibration.npy", np.load(folder / "calibration.npy")[:count])
    labels = np.load(folder / "calibration-labels.npy")[:count]
    np.save(folder / "calibration-labels.npy", np.zeros_like(labels) if count == 24 else labels)
    result = quantize.run(run_copy, run_copy.recipe, Silent())
    assert message in result.refused["int8-cpu"]
    assert {"fp32", "fp16"} <= {graph.name for graph in result.graphs}  # they are not calibrated
    ended = tlx("quantize", run_copy.path, "-p", "int8", "-t", "cpu", "--json")
    assert ended.code == 10 and message in ended.err


def _damage(run: Run, graph: str, ending: str) -> str:
    """Shuffle the weights of the layer in the middle; returns its name."""
    path = run / f"graphs/{graph}.onnx"
    model = onnx.load(path)
    tensors = [t for t in model.graph.initializer if t.name.endswith(ending) and len(t.dims) == 4]
    tensor = tensors[len(tensors) // 2]
    weight = numpy_helper.to_array(tensor)
    shuffled = np.random.default_rng(0).permutation(weight.ravel()).reshape(weight.shape)
    tensor.CopyFrom(numpy_helper.from_array(shuffled, tensor.name))
    onnx.save(model, path)
    return tensor.name.removesuffix(ending)


@pytest.mark.parametrize(
    ("graph", "ending"), [("int8-cpu", ".weight_quantized"), ("fp16", ".weight_fp16"), ("fp32", ".weight")]
)
def test_a_layer_damaged_after_export_is_blamed_by_name(
    run_copy: Run, graph: str, ending: str, tlx: Cli
) -> None:
    layer = _damage(run_copy, graph, ending)
    ended = tlx("explain-drop", run_copy.path, graph, "--samples", "32", "--json")
    assert ended.code == 0, ended.err
    (culprit,) = ended.json["culprits"]
    assert layer in culprit["layers"] and culprit["share"] > 0.5
    assert "weights are not those of the FP32 graph" in culprit["cause"]
    assert layer in ended.json["sentence"] and ended.json["sentence"].startswith(
        "The step torch -> fp32" if graph == "fp32" else f"The step fp32 -> {graph}"
    )


def test_a_sound_graph_is_said_to_be_sound(run_copy: Run) -> None:
    result = flow.explain_drop(run_copy, run_copy.recipe, Silent(), name="fp32", samples=16)
    assert result.culprits == () and result.evaluations == 0
    assert "as PyTorch does" in result.sentence


def test_a_variant_that_runs_here_is_compared_with_its_graph(run_copy: Run) -> None:
    result = flow.explain_drop(run_copy, run_copy.recipe, Silent(), name="cpu-onnxruntime-int8", samples=16)
    assert [step.step for step in result.steps] == [
        "torch -> fp32",
        "fp32 -> int8-cpu",
        "int8-cpu -> cpu-onnxruntime-int8",
    ]
    assert result.steps[1].noise > result.steps[0].noise and all(s.flips is not None for s in result.steps)


def test_an_error_of_the_artifact_alone_is_blamed_on_no_layer_of_the_graph(run_copy: Run) -> None:
    """The artifact's head is turned around, and the manifest is made to agree, as if the backend computed wrongly."""
    name = "cpu-onnxruntime-int8"
    (variant,) = (v for v in run_copy.result("compile", CompileResult).variants if v.name == name)
    path = run_copy / variant.file
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.int8 and values.ndim == 2:
            turned = np.negative(np.maximum(values, -127))
            tensor.CopyFrom(numpy_helper.from_array(turned, tensor.name))
    onnx.save(model, path)
    manifest = run_copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace(variant.sha256, digest(path)))
    result = flow.explain_drop(Run(run_copy.path), run_copy.recipe, Silent(), name=name, samples=16)
    assert result.steps[-1].noise > 10 * result.steps[1].noise
    assert result.culprits == () and result.evaluations == 0
    assert "the artifact's own arithmetic does, compare another backend" in result.sentence


def test_an_unknown_graph_is_an_error_that_lists_what_there_is(run_copy: Run) -> None:
    with pytest.raises(RunError, match=r"no graph or variant 'int9'.*int8-cpu.*cpu-onnxruntime-int8"):
        flow.explain_drop(run_copy, run_copy.recipe, Silent(), name="int9", samples=16)


def test_the_built_run_explains_each_loser(built: Built, tlx: Cli) -> None:
    ended = tlx("build", built.run, "--out", built.bundle, "--json")
    document = ended.json
    named = {v["name"] for v in document["variants"]}
    assert set(document["losers"]) == named - set(document["chosen"].values())
    assert set(document["front"]) <= named and all(document["losers"].values())
