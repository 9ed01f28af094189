"""A plain model beside the fine-tuned one, where there is too little to compare them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
from pipeline import Ended

from tlexport.recipe import parse


def test_two_test_rows_are_too_few_to_compare_and_no_reason_to_fail(
    tlx: Callable[..., Ended], tmp_path: Path
) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 10))
    pl.DataFrame({"a": a, "b": b, "y": ["yes", "no"] * 5}).write_csv(tmp_path / "ten.csv")
    document = {
        "name": "ten",
        "modality": "tabular",
        "metric": "auc",
        "data": {"path": str(tmp_path / "ten.csv"), "table": {"target": "y"}},
        "backbone": {"options": {"members": 2, "width": 8, "depth": 1, "bins": 4, "embedding": 2}},
        "transfer": {"epochs": 1},
        "verify": {"resamples": 200},
        "baselines": ["linear"],
    }
    (tmp_path / "ten.yaml").write_text(parse(document, []).to_yaml())
    done = tlx("finetune", tmp_path / "ten.yaml", "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    (plain,) = done.json["baselines"]
    assert plain["lead"] is None and plain["verdict"].startswith("not compared: the metric is undefined in")
    assert done.json["headline"] == "" and "cannot be compared" in done.err
    # Whether a variant is as good cannot be said either, and there the build ends.
    done = tlx("build", tmp_path / "run", "--out", tmp_path / "bundle", "--json")
    assert done.code == 3 and "larger test split" in done.json["error"]
    assert not (tmp_path / "bundle").exists()
