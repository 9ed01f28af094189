"""Molecules through the command line: pretrained, then tuned from it, with what pretraining saw told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pipeline import Ended
from small_molecules import TINY, write

pytest.importorskip("rdkit")

Cli = Callable[..., Ended]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write(tmp_path / "t.csv")


def test_pretrained_then_tuned_with_what_was_seen(tlx: Cli, table: Path, tmp_path: Path) -> None:
    words = (f"data.path={table}", *TINY, "data.split.test=0.3")
    # The draw puts molecules of what is later the test split into train.
    seen = ("data.split.by=random", "pretrain.epochs=2", "pretrain.batch_size=32")
    done = tlx("pretrain", "molecule-pretrain", *words, *seen, "--out", tmp_path / "pre", "--json")
    assert done.code == 0, done.err
    target = ("data.molecule.target=y", f"backbone.weights={tmp_path / 'pre'}")
    done = tlx("finetune", "drug-property", *words, *target, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    tuned = done.json
    assert 0 < tuned["weights"]["matched"] == tuned["weights"]["total"]
    assert "test samples were seen in pretraining" in tuned["leaks"][0]
    assert [b["name"] for b in tuned["baselines"]] == ["forest"] and tuned["baselines"][0]["run"]
    refused = tlx(
        "finetune",
        "drug-property",
        *words,
        *target,
        "data.duplicates=fail",
        "--out",
        tmp_path / "no",
        "--json",
    )
    assert refused.json["kind"] == "LeakageError"
    groups = np.load(tmp_path / "run/reference/groups.npy")
    assert len(groups) == tuned["samples"]["test"]
    inputs = np.load(tmp_path / "run/reference/inputs.npy")
    assert inputs.dtype.names == ("tokens", "fingerprint", "descriptors")
