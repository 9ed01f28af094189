"""The plain model for images: it learns what a single untrained layer can, and its graph answers as the library does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from pipeline import Ended

from tlexport import baselines
from tlexport.baselines import Fitted, fitted
from tlexport.baselines import image as plain
from tlexport.errors import RecipeError
from tlexport.graph import inspect
from tlexport.modalities import image, metrics
from tlexport.modalities.image import ImageData
from tlexport.progress import Silent
from tlexport.recipe import Data
from tlexport.run import Run


def stripes(classes: int, n: int = 240, size: int = 24, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Noisy stripes of one direction a class, with any phase: no pixel by itself says anything."""
    random = np.random.default_rng(0)
    labels = np.arange(n) % classes
    down, across = np.mgrid[:size, :size]
    angles = np.pi * labels / classes
    phase = np.cos(angles)[:, None, None] * down + np.sin(angles)[:, None, None] * across
    waves = np.sin(phase * 1.3 + random.uniform(0, 2 * np.pi, (n, 1, 1)))
    pixels = 128 + 70 * waves[..., None] + random.normal(0, 40, (n, size, size, channels))
    return pixels.clip(0, 255).astype(np.uint8), labels


def load(images: np.ndarray, labels: np.ndarray, folder: Path, size: int = 24) -> ImageData:
    np.savez(folder / "images.npz", images=images, labels=labels)
    recipe = Data.model_validate({"path": str(folder / "images.npz"), "image_size": size})
    return image.load(recipe, task="auto", seed=0, cache=None)


def fit(data: ImageData, seed: int = 0) -> Fitted:
    (found,) = baselines.fit("image", data, ("auto",), seed=seed, progress=Silent())
    return found


def answers(graph: bytes | None, inputs: np.ndarray) -> np.ndarray:
    assert graph is not None
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (output,) = session.get_outputs()
    assert output.name == "probabilities"
    found: np.ndarray = session.run(None, {"images": inputs})[0]
    return found


@pytest.mark.parametrize(("task", "channels"), [("binary", 1), ("multiclass", 3), ("multilabel", 3)])
def test_it_learns_and_its_graph_says_the_same(task: str, channels: int, tmp_path: Path) -> None:
    images, labels = stripes({"binary": 2, "multiclass": 4, "multilabel": 4}[task], channels=channels)
    if task == "multilabel":
        labels = np.stack([labels >= 2, labels % 2 == 1, np.ones(len(labels), bool)], axis=1).astype(np.uint8)
    data = load(images, labels, tmp_path)
    assert data.task == task
    found = fit(data)
    assert found.why_not == ""
    of = metrics.evaluate(data.test.labels[:, :2], found.test[:, :2], task) if task == "multilabel" else None
    assert (of or metrics.evaluate(data.test.labels, found.test, task))["auc"] > 0.95
    inputs = data.test.batch(np.arange(len(data.test)))
    np.testing.assert_allclose(answers(found.graph, inputs), found.test, atol=1e-5)
    np.testing.assert_allclose(answers(found.graph, inputs[:1]), found.test[:1], atol=1e-5)
    if task == "multilabel":
        assert (found.test[:, 2] > 0.98).all(), "a label that never varies is answered by its frequency"


def test_the_graph_is_one_that_every_backend_takes(tmp_path: Path) -> None:
    data = load(*stripes(2), tmp_path)
    graph = onnx.load_from_string(fit(data).graph or b"")
    onnx.checker.check_model(graph, full_check=True)
    inputs, outputs = inspect.io(graph)
    assert [(spec.dtype, spec.shape) for spec in (*inputs, *outputs)] == [
        ("uint8", ("batch", 3, 24, 24)),
        ("float32", ("batch", 2)),
    ]
    assert set(inspect.compute_dtypes(graph).values()) == {"fp32"}
    operators = {node.op_type for node in graph.graph.node}
    assert operators == {"Cast", "AveragePool", "Conv", "Relu", "Flatten", "Gemm", "Softmax"}


def test_labels_that_say_nothing_are_not_learned(tmp_path: Path) -> None:
    images, labels = stripes(2, n=600)
    data = load(images, np.random.default_rng(1).permutation(labels), tmp_path)
    assert abs(metrics.evaluate(data.test.labels, fit(data).test, data.task)["auc"] - 0.5) < 0.2


def test_a_label_that_nobody_measured_counts_nowhere(tmp_path: Path) -> None:
    images, labels = stripes(2)
    data = load(images, np.stack([labels, labels], axis=1).astype(np.uint8), tmp_path)
    known = data.train.labels.astype(np.int8)
    # The second label is wrong wherever it is said to be unknown: reading it anyway would show.
    hidden = np.arange(len(known)) % 3 > 0
    known[hidden, 1] = -1
    found = fit(replace(data, train=replace(data.train, labels=known)))
    assert metrics.evaluate(data.test.labels, found.test, data.task)["auc"] > 0.9


def test_the_seed_draws_the_patches(tmp_path: Path) -> None:
    data = load(*stripes(2), tmp_path)
    assert fit(data).graph == fit(data).graph
    assert fit(data).graph != fit(data, seed=1).graph


@pytest.mark.parametrize("size", [8, 9, 70])
def test_any_size_and_images_without_any_content(size: int, tmp_path: Path) -> None:
    images, labels = stripes(2, n=60)
    images[10:] = 0
    data = load(images, labels, tmp_path, size)
    found = fit(data)
    assert found.graph is not None and np.isfinite(found.test).all()


def test_a_part_of_many_images_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load(*stripes(2), tmp_path)
    assert "fitted on" not in fit(data).description
    monkeypatch.setattr(plain, "MOST", 50)
    assert f"fitted on 50 of {len(data.train)} training images" in fit(data).description


def test_a_graph_that_answers_otherwise_is_not_offered(tmp_path: Path) -> None:
    data = load(*stripes(2), tmp_path)
    found = fit(data)
    graph = onnx.load_from_string(found.graph or b"")
    rows = np.arange(len(data.val))
    for tensor in graph.graph.initializer:
        if tensor.name == "biases":
            shifted = np.frombuffer(tensor.raw_data, np.float32) + np.array([0.0, 0.01], np.float32)
            tensor.raw_data = shifted.tobytes()
    content, why = fitted.checked(graph, data, data.val.batch(rows), "images", found.val)
    assert content is None and "differs from the library by" in why


def test_an_unknown_name_lists_what_there_is(tmp_path: Path) -> None:
    data = load(*stripes(2), tmp_path)
    with pytest.raises(RecipeError, match="there are: random_features"):
        baselines.fit("image", data, ("lightgbm",), seed=0, progress=Silent())


def test_it_goes_the_whole_way(run_copy: Run, tlx: Callable[..., Ended], tmp_path: Path) -> None:
    """What stands beside the network of `built` is a run of its own."""
    nested = run_copy / "baselines" / "random_features"
    built = tlx(
        "build", nested, "--target", "cpu", "gates.max_drop=0.001", "--out", tmp_path / "bundle", "--json"
    )
    assert built.code == 0, built.err
    assert built.json["chosen"]["cpu"].startswith("cpu-")
    assert all(variant["drop"] == pytest.approx(0, abs=1e-6) for variant in built.json["variants"])
    # One byte of what it was fitted to is changed: nothing is exported from it any more.
    path = nested / "checkpoint" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert tlx("export", nested).code == 6
