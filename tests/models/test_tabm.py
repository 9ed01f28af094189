"""TabM: raw cells in, and the same answers from every backend; what it learned elsewhere fits or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from tlexport.backends import registry
from tlexport.errors import RecipeError
from tlexport.graph import cast, inspect, trace
from tlexport.modalities.dataset import DataReport, Dataset, Split
from tlexport.modalities.tabular_schema import Column, Schema
from tlexport.models import tabular
from tlexport.models.network import ServingModel
from tlexport.recipe import Pretrain, Recipe, parse
from tlexport.tensors import Profile

COLUMNS = (
    Column(name="amount", kind="numeric"),
    Column(name="grade", kind="categorical", vocabulary=("2", "1", "5"), numbers=True),
    Column(name="rate", kind="numeric"),
    Column(name="region", kind="categorical", vocabulary=("north", "south")),
)


def cells(n: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    found = np.stack(
        [
            random.lognormal(10, 2, n),
            random.choice([1, 2, 5, -1], n),
            random.normal(0, 1e-3, n),
            random.choice([0, 1, -1], n),
        ],
        axis=1,
    ).astype(np.float32)
    found[random.random(found.shape) < 0.1] = np.nan
    return found


def dataset(task: str = "binary") -> Dataset:
    def split(n: int, seed: int) -> Split:
        inputs = cells(n, seed)
        score = np.nan_to_num(np.log(inputs[:, 0]) - 10) + np.nan_to_num(inputs[:, 1])
        labels: Any = (score > 1).astype(np.int64) if task == "binary" else score[:, None].astype(np.float32)
        return Split(inputs, labels, None, tuple(map(str, range(n))))

    report = DataReport(source="", samples={}, counts={}, split_origin={}, groups=None, sha256="")
    schema = Schema(columns=COLUMNS, target=("y",), excluded={}, missing=("",))
    names = ("good", "bad") if task == "binary" else ("score",)
    return Dataset(split(400, 0), split(100, 1), split(100, 2), task, names, schema, report)


def recipe(**options: Any) -> Recipe:
    sizes = {"members": 4, "width": 16, "depth": 2, "bins": 6, "embedding": 4} | options
    document = {"name": "x", "modality": "tabular", "data": {"path": "x"}, "backbone": {"options": sizes}}
    return parse(document, [])


def model(task: str = "binary") -> tabular.TabM:
    torch.manual_seed(0)
    data = dataset(task)
    made = tabular.create(tabular.describe(recipe(), data))
    tabular.prepare(made, data)
    return made.eval()


def test_cells_are_encoded_in_the_graph() -> None:
    front = model().backbone.cells
    x = torch.tensor([[float("nan"), 5.0, 0.0, 1.0], [1e30, 7.0, -1e30, float("nan")]])
    encoded, matched = front.encoded(x), front.matched(x)
    assert encoded[0, 0, -1] == 1 and encoded[1, 0, -1] == 0, "the missing flag"
    assert (encoded[1, 0, :-1] == 1).all() and (encoded[1, 1, :-1] == 0).all(), (
        "beyond the last and the first bin"
    )
    # vocabulary of grade: 2, 1, 5; then unknown, missing
    assert matched[0, 0].tolist() == [0, 0, 1, 0, 0]
    assert matched[1, 0].tolist() == [0, 0, 0, 1, 0], "a grade that training never saw"
    assert matched[1, 1].tolist() == [0, 0, 0, 0, 1], "a missing region"


def test_bins_come_from_the_training_rows_alone() -> None:
    made, data = model(), dataset()
    low = made.backbone.cells.low[0]
    column = data.train.inputs[:, 0]
    assert float(low[0]) == pytest.approx(np.nanmin(column))
    assert float(made.backbone.cells.middle[0]) == pytest.approx(np.nanmedian(column), rel=1e-5)


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_backends_answer_as_torch_does(task: str, tmp_path: Path) -> None:
    serving = ServingModel(model(task)).eval()
    metadata = {"class_names": "[]", "preprocessing": "{}", "task": task}
    x = torch.from_numpy(cells(64, 7))
    graph = trace.trace(
        serving, (x[:2],), opset=20, input_names=("features",), output_name=serving.output, metadata=metadata
    )
    trace.save(graph, tmp_path / "fp32.onnx")
    with torch.no_grad():
        expected = serving(x).numpy()
    assert np.isfinite(expected).all() and np.ptp(expected, axis=0).max() > 1e-3
    backends = [
        "onnxruntime",
        *(["openvino"] if registry.BACKENDS["openvino"].availability().installed else []),
    ]
    for name in backends:
        with registry.BACKENDS[name].runner(_artifact(name, tmp_path), threads=1) as runner:
            got = runner.run({"features": x.numpy()})[serving.output]
        np.testing.assert_allclose(
            got, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(expected).max()))
        )


def _artifact(backend: str, folder: Path) -> Path:
    out = folder / f"model{registry.BACKENDS[backend].SUFFIX}"
    graph = folder / "fp32.onnx"
    expected = inspect.compute_dtypes(trace.load(graph))
    return registry.build(backend, graph, out, "cpu", Profile(max=64), expected, 120).path


def test_large_amounts_survive_fp16(tmp_path: Path) -> None:
    serving = ServingModel(model()).eval()
    metadata = {"class_names": "[]", "preprocessing": "{}", "task": "binary"}
    x = torch.from_numpy(cells(64, 7))
    x[:, 0] = x[:, 0] * 1e6  # far beyond FP16's 65504
    graph = trace.trace(
        serving, (x[:2],), opset=20, input_names=("features",), output_name="probabilities", metadata=metadata
    )
    session = ort.InferenceSession(
        cast.to_half(graph, "fp16").SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {"features": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, serving(x).numpy(), atol=5e-3)


def test_pretext_learns_and_its_masks_follow_the_seed() -> None:
    made, data = model(), dataset()
    task = tabular.pretext(made, Pretrain(), data)
    x = torch.from_numpy(data.train.inputs)

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        found: torch.Tensor = task(x)
        return found

    with torch.no_grad():
        before = [float(loss(seed)) for seed in range(5)]
        assert before[0] == float(loss(0)) and before[0] != before[1]
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)
    for step in range(40):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    with torch.no_grad():
        assert max(float(loss(seed)) for seed in range(5)) < min(before)
    with pytest.raises(RecipeError, match="there is: masked"):
        tabular.pretext(made, Pretrain(objective="forecast"), data)


def test_weights_of_other_columns_are_refused_by_name() -> None:
    spec = model().spec
    other = spec.model_copy(update={"columns": (("age", ()), *spec.columns[1:])})
    tensors = {"a": torch.zeros(1)}
    assert tabular.align(tensors, spec, spec) == (tensors, [])
    with pytest.raises(RecipeError, match="different: age, amount"):
        tabular.align(tensors, other, spec)


def test_mistaken_options_name_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'width'"):
        tabular.describe(recipe(widht=3), dataset())
    with pytest.raises(RecipeError, match="greater than or equal to 8"):
        tabular.describe(recipe(width=3), dataset())


def test_every_parameter_is_in_one_stage() -> None:
    made = model()
    staged = [name for _, names in made.stages() for name in names]
    assert sorted(staged) == sorted(name for name, _ in made.backbone.named_parameters())
    assert len(set(staged)) == len(staged)
