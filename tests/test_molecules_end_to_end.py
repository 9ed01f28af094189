"""Molecules through the command line: pretrained, then tuned from it, with what pretraining saw told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pipeline import Ended

pytest.importorskip("rdkit")

Cli = Callable[..., Ended]
RINGS = ("c1ccccc1", "C1CCCCC1", "c1ccoc1", "c1ccsc1", "C1CCNC1", "C1CC1", "C1CCC1", "C1CCOC1")
TAILS = ("", "C", "CC", "O", "N", "CO", "C(=O)O", "C#N", "Cl", "CCN", "S", "CS")
TINY = (
    "backbone.options={tokens: 16, layers: 1, fingerprint: 16, members: 2, width: 16, depth: 1}",
    "data.molecule.max_length=32",
    "transfer.epochs=3",
    "data.split.test=0.3",
    "verify.resamples=200",
)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    smiles = [ring + tail for ring in RINGS for tail in TAILS]
    pl.DataFrame({"smiles": smiles, "y": [float(len(one)) for one in smiles]}).write_csv(tmp_path / "t.csv")
    return tmp_path / "t.csv"


def test_pretrained_then_tuned_with_what_was_seen(tlx: Cli, table: Path, tmp_path: Path) -> None:
    words = (f"data.path={table}", *TINY)
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
