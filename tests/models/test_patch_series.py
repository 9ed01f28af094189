"""The patch transformer: raw prices in, a variance in their own unit out, the same from every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import prices
import pytest
import torch

from tlexport.backends import registry
from tlexport.errors import RecipeError
from tlexport.graph import inspect, trace
from tlexport.graph.calibration import calibrate
from tlexport.graph.quantize import quantize, tensors_to_calibrate
from tlexport.modalities import metrics
from tlexport.modalities import series as modality
from tlexport.modalities.series_windows import SeriesData
from tlexport.models import series
from tlexport.models.network import ServingModel
from tlexport.recipe import Pretrain, Recipe, parse
from tlexport.tensors import Profile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prices.folder(tmp_path_factory.mktemp("prices"), assets=3, days=260)


def recipe(folder: Path, options: dict[str, Any] | None = None, **wanted: Any) -> Recipe:
    data = {"path": str(folder), "series": {"window": 32, **wanted}, "split": {"val": 0.2, "test": 0.2}}
    own = {"width": 8, "summary": 16, "depth": 1, **(options or {})}
    return parse(
        {"name": "x", "modality": "series", "metric": "qlike", "data": data, "backbone": {"options": own}}, []
    )


def made(folder: Path, **wanted: Any) -> tuple[series.PatchNet, SeriesData]:
    torch.manual_seed(0)
    asked = recipe(folder, **wanted)
    data = modality.load(asked.data, task="auto", seed=0, cache=None)
    model = series.create(series.describe(asked, data))
    series.prepare(model, data)
    return model.eval(), data


def windows(data: SeriesData, n: int = 64) -> torch.Tensor:
    return torch.from_numpy(data.test.batch(np.arange(min(n, len(data.test)))))


def test_untrained_it_is_a_har_forecast(folder: Path) -> None:
    """Better than the training mean, and by the formula: 1/4 day + 1/4 week + 1/2 month of the log variance."""
    model, data = made(folder)
    with torch.no_grad():
        served = ServingModel(model)(windows(data)).numpy()
    values = windows(data).numpy().astype(np.float64)
    logs = np.log(np.log(values[:, :, 1] / values[:, :, 2]) ** 2 / (4 * np.log(2)))
    formula = 0.25 * logs[:, -1] + 0.25 * logs[:, -5:].mean(axis=1) + 0.5 * logs[:, -22:].mean(axis=1)
    np.testing.assert_allclose(np.log(served[:, 0]), formula, atol=2e-4)
    judged = metrics.evaluate(data.test.labels[:64], served, "regression")["qlike"]
    constant = np.full_like(served, data.train.labels.mean())
    assert judged < metrics.evaluate(data.test.labels[:64], constant, "regression")["qlike"]


def test_a_variance_does_not_depend_on_the_prices_unit(folder: Path) -> None:
    model, data = made(folder)
    dollars = windows(data)
    cents = dollars * torch.tensor([100.0, 100, 100, 100, 1])
    with torch.no_grad():
        torch.testing.assert_close(
            ServingModel(model)(cents), ServingModel(model)(dollars), rtol=2e-3, atol=0
        )


@pytest.mark.parametrize("kind", ["bars", "closes"])
@pytest.mark.parametrize("target", [{}, {"target": "direction"}])
def test_backends_answer_as_torch_does(
    kind: str, target: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    source = folder
    if kind == "closes":
        source = tmp_path / "closes"
        source.mkdir()
        for number in range(3):
            prices.bars(260, seed=number).select("Date", "Close").write_csv(source / f"asset{number}.csv")
    model, data = made(source, **target)
    torch.nn.init.normal_(
        model.head[-1].weight, std=0.1
    )  # untrained, a class has even odds whatever the prices
    serving, x = ServingModel(model).eval(), windows(data)
    metadata = {"class_names": "[]", "preprocessing": "{}", "task": data.task}
    graph = trace.trace(
        serving, (x[:2],), opset=20, input_names=("prices",), output_name=serving.output, metadata=metadata
    )
    trace.save(graph, tmp_path / "fp32.onnx")
    with torch.no_grad():
        expected = serving(x).numpy()
    assert np.isfinite(expected).all() and np.ptp(expected[:, -1]) > 1e-3 * np.abs(expected[:, -1]).mean()
    for name in ("onnxruntime", "openvino"):
        if registry.BACKENDS[name].availability().installed:
            out = tmp_path / f"{name}{registry.BACKENDS[name].SUFFIX}"
            asked = inspect.compute_dtypes(graph)
            artifact = registry.build(name, tmp_path / "fp32.onnx", out, "cpu", Profile(max=64), asked, 120)
            with registry.BACKENDS[name].runner(artifact.path, threads=1) as runner:
                got = runner.run({"prices": x.numpy()})[serving.output]
            np.testing.assert_allclose(got, expected, rtol=1e-3)


@pytest.mark.skipif(
    not registry.BACKENDS["tensorrt_rtx"].availability().installed, reason="tensorrt-rtx is not installed"
)
def test_it_compiles_for_a_gpu_in_int8(folder: Path, tmp_path: Path) -> None:
    model, data = made(folder)
    serving, x = ServingModel(model).eval(), windows(data)
    metadata = {"class_names": "[]", "preprocessing": "{}", "task": data.task}
    graph = trace.trace(
        serving, (x[:2],), opset=20, input_names=("prices",), output_name="values", metadata=metadata
    )
    ranges = calibrate(graph, [{"prices": x.numpy()}], tensors_to_calibrate(graph, "trt"), method="max")
    trace.save(quantize(graph, ranges, "trt"), tmp_path / "int8.onnx")
    expected = inspect.compute_dtypes(trace.load(tmp_path / "int8.onnx"))
    assert "int8" in set(expected.values())
    built = registry.build(
        "tensorrt_rtx", tmp_path / "int8.onnx", tmp_path / "e.engine", "sm89", Profile(max=8), expected, 300
    )
    assert built.path.stat().st_size > 0


def test_a_gap_in_the_future_of_a_patch_is_seen(folder: Path) -> None:
    """Every day of the window counts: changing one day changes the answer."""
    model, data = made(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        model.head[-1].weight.normal_()
        x = windows(data, 1)
        plain = model(x)
        for day in range(1, 32):
            moved = x.clone()
            moved[:, day, 1] *= 1.05
            assert not torch.allclose(model(moved), plain, rtol=1e-6), day


@pytest.mark.parametrize("objective", ["auto", "masked", "forecast"])
def test_pretext_learns_what_is_hidden(objective: str, folder: Path) -> None:
    model, data = made(folder)
    task = series.pretext(model, Pretrain(objective=objective), data)
    x = torch.from_numpy(data.train.batch(np.arange(128)))

    def loss(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        found: torch.Tensor = task(x)
        return found

    with torch.no_grad():
        before = np.mean([float(loss(seed)) for seed in range(5)])
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)
    for step in range(40):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
    with torch.no_grad():
        assert np.mean([float(loss(seed)) for seed in range(5)]) < 0.95 * before


def test_a_hidden_patch_is_not_seen(folder: Path) -> None:
    """The planted leak: if the encoder saw hidden patches, other contents would give other codes."""
    model, data = made(folder)
    patches = model.backbone.patched(model.backbone.days(windows(data, 2))[0])
    hidden = torch.zeros_like(patches[..., :1], dtype=torch.bool)
    hidden[:, :, -1] = True
    other = patches.clone()
    other[:, :, -1] += 5
    with torch.no_grad():
        torch.testing.assert_close(
            model.backbone.encode(patches, hidden), model.backbone.encode(other, hidden)
        )
        assert not torch.allclose(model.backbone.encode(patches), model.backbone.encode(other))


def test_another_networks_weights_and_sizes_are_refused(folder: Path) -> None:
    model, data = made(folder)
    spec = model.spec
    assert series.align({}, spec, spec) == ({}, [])
    with pytest.raises(RecipeError, match=r"channels are \('close',\)"):
        series.align({}, spec.model_copy(update={"channels": ("close",)}), spec)
    for options, message in (
        ({"widht": 3}, "did you mean 'width'"),
        ({"width": 9, "heads": 2}, "no multiple of heads"),
    ):
        with pytest.raises(RecipeError, match=message):
            series.describe(recipe(folder, options), data)
    with pytest.raises(RecipeError, match="shorter than 22 days"):
        made(folder, window=16)
    with pytest.raises(RecipeError, match="nobody publishes"):
        series.published(spec)
    with pytest.raises(RecipeError, match="there are: auto, masked, forecast"):
        series.pretext(model, Pretrain(objective="rotate"), data)


def test_every_parameter_is_in_one_stage(folder: Path) -> None:
    model, _ = made(folder)
    staged = [name for _, names in model.stages() for name in names]
    assert sorted(staged) == sorted(name for name, _ in model.backbone.named_parameters())
