"""The forest for molecules: it learns, and its graph answers from the fingerprint as the library does."""

from __future__ import annotations

import importlib.util

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tlexport import baselines
from tlexport.baselines import molecule
from tlexport.modalities import metrics
from tlexport.modalities.dataset import DataReport, Dataset, Split
from tlexport.progress import Silent


class Prepared:
    radius = 2

    def describe(self) -> dict[str, str]:
        return {}


def data_of(task: str) -> Dataset:
    def split(n: int, seed: int) -> Split:
        random = np.random.default_rng(seed)
        inputs = np.zeros(n, [("tokens", np.int32, (4,)), ("fingerprint", np.uint8, (32,))])
        inputs["fingerprint"] = random.poisson(0.7, (n, 32))
        bits = inputs["fingerprint"] > 0
        score = bits[:, 0] * 2.0 + bits[:, 1] - bits[:, 2]
        labels = {
            "binary": (score > 1).astype(np.int64),
            "multilabel": np.stack([score > 1, bits[:, 3], bits[:, 4]], axis=1).astype(np.int8),
            "regression": score[:, None].astype(np.float32),
        }[task]
        if task == "multilabel":
            labels[random.random(labels.shape) < 0.3] = -1
        return Split(inputs, labels, None, tuple(map(str, range(n))))

    report = DataReport(source="", samples={}, counts={}, split_origin={}, groups=None, sha256="")
    names = {"binary": ("no", "yes"), "multilabel": ("a", "b", "c"), "regression": ("value",)}[task]
    return Dataset(split(300, 0), split(80, 1), split(80, 2), task, names, Prepared(), report)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(molecule, "TREES", 60)
    monkeypatch.setattr(molecule, "TREES_A_LABEL", 30)


@pytest.mark.parametrize("task", ["binary", "multilabel", "regression"])
def test_it_learns_and_its_graph_says_the_same(task: str) -> None:
    pytest.importorskip("skl2onnx")
    data = data_of(task)
    (found,) = baselines.fit("molecule", data, ("auto",), seed=0, progress=Silent())
    judged = metrics.evaluate(data.test.labels, found.test, task)
    assert judged["r2" if task == "regression" else "auc"] > 0.85
    assert found.graph is not None, found.why_not
    session = ort.InferenceSession(found.graph, providers=["CPUExecutionProvider"])
    (given,), (output,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type) == ("fingerprint", "tensor(uint8)") and found.inputs == ("fingerprint",)
    assert output.name == ("values" if task == "regression" else "probabilities")
    for rows in (slice(0, 1), slice(0, 80)):
        fed = np.ascontiguousarray(data.test.inputs["fingerprint"][rows])
        (got,) = session.run(None, {"fingerprint": fed})
        np.testing.assert_allclose(got, found.test[rows], atol=1e-4)
    onnx.checker.check_model(onnx.load_from_string(found.graph), full_check=True)


def test_it_reads_whether_a_substructure_is_there_and_not_how_often() -> None:
    pytest.importorskip("skl2onnx")
    data = data_of("binary")
    (found,) = baselines.fit("molecule", data, ("forest",), seed=0, progress=Silent())
    assert found.graph is not None
    session = ort.InferenceSession(found.graph, providers=["CPUExecutionProvider"])
    counts = np.ascontiguousarray(data.test.inputs["fingerprint"])
    once, often = (
        session.run(None, {"fingerprint": fed})[0]
        for fed in (np.minimum(counts, 1), np.minimum(counts * 9, 255))
    )
    np.testing.assert_array_equal(once, often)


def test_a_label_that_never_changes_is_served_but_has_no_graph() -> None:
    pytest.importorskip("skl2onnx")
    data = data_of("multilabel")
    data.train.labels[:, 2] = np.minimum(data.train.labels[:, 2], 0)
    (found,) = baselines.fit("molecule", data, ("forest",), seed=0, progress=Silent())
    assert (found.test[:, 2] == 0).all()
    assert found.graph is None and "same value" in found.why_not


def test_without_the_converter_it_still_stands_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skl2onnx" else real(name))
    (found,) = baselines.fit("molecule", data_of("binary"), ("auto",), seed=0, progress=Silent())
    assert found.graph is None and "converter is not installed" in found.why_not
