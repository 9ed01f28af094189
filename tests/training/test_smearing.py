"""A network fitted to logarithms answers without bias in the label's own unit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import prices
import pytest
import torch

from tlexport.modalities import series as modality
from tlexport.models import series
from tlexport.models.network import ServingModel
from tlexport.progress import Silent
from tlexport.recipe import Recipe, parse
from tlexport.training import finetune, smearing


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = prices.folder(tmp_path_factory.mktemp("prices"), assets=3, days=260)
    document = {
        "name": "x",
        "modality": "series",
        "metric": "qlike",
        "data": {"path": str(folder), "series": {"window": 32}, "split": {"val": 0.2, "test": 0.2}},
        "backbone": {"options": {"width": 8, "summary": 16, "depth": 1}},
        "transfer": {"strategy": "scratch", "epochs": 2, "batch_size": 64},
    }
    return parse(document, [])


@pytest.mark.parametrize("strategy", ["scratch", "probe"])
@pytest.mark.parametrize("loss", ["auto", "huber", "qlike"])
def test_the_mean_ratio_over_train_is_one(recipe: Recipe, strategy: str, loss: str, tmp_path: Path) -> None:
    data = modality.load(recipe.data, task="auto", seed=0, cache=None)
    transfer = recipe.transfer.model_copy(update={"loss": loss, "strategy": strategy})
    asked = recipe.model_copy(update={"transfer": transfer})
    torch.manual_seed(0)
    model = series.create(series.describe(asked, data))
    series.prepare(model, data)
    fitted = finetune.finetune(
        model, data, asked, folder=tmp_path, cache=tmp_path / "cache", progress=Silent()
    )
    served = finetune.served(model, data.train, torch.device("cpu"))
    ratio = float(np.mean(data.train.labels / served))
    if loss == "qlike":
        assert not smearing.needed(model.spec, transfer)
    else:
        assert ratio == pytest.approx(1.0, abs=1e-3)
        # What chose the epoch is what is served in the end.
        from tlexport.modalities import metrics

        val = metrics.evaluate(
            data.val.labels, finetune.served(model, data.val, torch.device("cpu")), data.task
        )
        assert val["qlike"] == pytest.approx(fitted.history[fitted.best_epoch - 1]["val"]["qlike"], rel=1e-3)


def test_folding_multiplies_what_is_served(recipe: Recipe) -> None:
    data = modality.load(recipe.data, task="auto", seed=0, cache=None)
    torch.manual_seed(0)
    model = series.create(series.describe(recipe, data)).eval()
    x = torch.from_numpy(data.val.batch(np.arange(8)))
    with torch.no_grad():
        before = ServingModel(model)(x)
        smearing.fold(model, np.array([1.7]))
        torch.testing.assert_close(ServingModel(model)(x), before * 1.7, rtol=1e-4, atol=0)
