"""A small table to train on: two numbers and a category, and a label that depends on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tlexport.modalities import tabular
from tlexport.modalities.dataset import Dataset
from tlexport.recipe import Recipe, parse


@pytest.fixture
def table_recipe(tmp_path: Path) -> Recipe:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 500))
    kind = random.choice(["x", "y", "z"], 500)
    label = (a * b + (kind == "y") > 0.3).astype(int)
    pl.DataFrame({"a": a, "b": b, "kind": kind, "label": label}).write_csv(tmp_path / "table.csv")
    sizes = {"members": 4, "width": 16, "depth": 2, "bins": 8, "embedding": 4, "dropout": 0.0}
    document = {
        "name": "table",
        "modality": "tabular",
        "metric": "auc",
        "data": {"path": str(tmp_path / "table.csv"), "table": {"target": "label"}},
        "backbone": {"options": sizes},
        "transfer": {"strategy": "full", "epochs": 6, "batch_size": 50, "lr": 1e-2},
        "pretrain": {"epochs": 4, "batch_size": 50, "lr": 5e-3},
    }
    return parse(document, [])


@pytest.fixture
def table_data(table_recipe: Recipe) -> Dataset:
    return tabular.load(table_recipe.data, task="auto", seed=0, cache=None)
