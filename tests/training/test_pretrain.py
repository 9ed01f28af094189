"""Pretraining goes on where it was stopped, keeps its best epoch, and fine-tuning can tell what it has seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tlexport.errors import TrainingError
from tlexport.modalities.dataset import Dataset
from tlexport.models import tabular
from tlexport.progress import Silent
from tlexport.recipe import Recipe
from tlexport.training import leakage, pretrain


def network(recipe: Recipe, data: Dataset) -> tabular.TabM:
    torch.manual_seed(0)
    made = tabular.create(tabular.describe(recipe, data))
    tabular.prepare(made, data)
    return made


def pretrained(recipe: Recipe, data: Dataset, folder: Path) -> tuple[tabular.TabM, pretrain.Pretrained]:
    model = network(recipe, data)
    task = tabular.pretext(model, recipe.pretrain, data)
    return model, pretrain.pretrain(model, task, data, recipe, folder=folder, progress=Silent())


class Stopped(Silent):
    """Ends the training after its second epoch, as Ctrl-C would."""

    def say(self, text: str) -> None:
        if text.startswith("epoch 2/"):
            raise KeyboardInterrupt


def test_it_learns_and_a_stopped_one_ends_alike(
    table_recipe: Recipe, table_data: Dataset, tmp_path: Path
) -> None:
    whole, found = pretrained(table_recipe, table_data, tmp_path / "whole")
    assert found.history[found.best_epoch - 1]["val_loss"] < found.first_loss
    assert found.history[found.best_epoch - 1]["val_loss"] == min(e["val_loss"] for e in found.history)
    model = network(table_recipe, table_data)
    task = tabular.pretext(model, table_recipe.pretrain, table_data)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(model, task, table_data, table_recipe, folder=tmp_path / "cut", progress=Stopped())
    again, rest = pretrained(table_recipe, table_data, tmp_path / "cut")
    assert rest.resumed_from == 2
    for name, tensor in whole.backbone.state_dict().items():
        assert torch.equal(tensor, again.backbone.state_dict()[name]), name


def test_a_diverging_one_is_an_error(table_recipe: Recipe, table_data: Dataset, tmp_path: Path) -> None:
    config = table_recipe.pretrain.model_copy(update={"lr": 1e30})
    with pytest.raises(TrainingError, match=r"lower pretrain\.lr"):
        pretrained(table_recipe.model_copy(update={"pretrain": config}), table_data, tmp_path)


def test_what_was_seen_is_told_from_what_was_not(table_data: Dataset, tmp_path: Path) -> None:
    assert leakage.read(tmp_path) is None
    leakage.write(tmp_path, table_data.train, table_data.val)
    seen = leakage.read(tmp_path)
    assert seen is not None
    assert seen.shared(table_data.train).all()
    assert not seen.shared(table_data.test).any()
    mixed = replace(
        table_data.test,
        inputs=np.concatenate([table_data.test.inputs[:3], table_data.train.inputs[:2]]),
        labels=table_data.test.labels[:5],
    )
    assert seen.shared(mixed).tolist() == [False, False, False, True, True]


def test_a_sample_from_before_the_last_moment_seen_counts_as_seen(
    table_data: Dataset, tmp_path: Path
) -> None:
    days = np.datetime64("2024-01-01") + np.arange(len(table_data.train))
    leakage.write(tmp_path, replace(table_data.train, times=days))
    seen = leakage.read(tmp_path)
    assert seen is not None
    around = days[-1] + np.arange(len(table_data.test)) - 2
    shared = seen.shared(replace(table_data.test, times=around))
    assert shared[:4].tolist() == [True, True, True, False] and not shared[3:].any()
