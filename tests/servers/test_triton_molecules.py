"""Molecules on a real tritonserver: the ensemble takes SMILES, and answers what predict does."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from pipeline import Ended
from processes import missing
from small_molecules import TINY, write
from test_triton import client
from triton_server import triton

pytestmark = pytest.mark.server

SMALL = (
    *TINY,
    "backbone.weights=none",
    "data.molecule.target=y",
    "data.split.by=random",
    "compile.backends=[onnxruntime]",
    "baselines=[]",
)
ASKED = ("c1ccccc1C(=O)O", "OC1CC1", "C1CCNC1CCN")


@pytest.fixture
def bundle(tlx: Callable[..., Ended], tmp_path: Path) -> Path:
    table = write(tmp_path / "t.csv")
    for command in (
        ("finetune", "drug-property", f"data.path={table}", *SMALL, "--out", tmp_path / "run"),
        ("build", tmp_path / "run", "--target", "cpu", "--out", tmp_path / "bundle"),
    ):
        done = tlx(*command)
        assert done.code == 0, done.err
    return tmp_path / "bundle"


def test_smiles_are_answered_as_predict_does(
    triton_python: Path, bundle: Path, tlx: Callable[..., Ended], tmp_path: Path
) -> None:
    if subprocess.run([triton_python, "-c", "import rdkit"], capture_output=True, check=False).returncode:
        missing("needs RDKit in .venv-triton; make test-server puts it there")
    place = tmp_path / "models"
    done = tlx("deploy", bundle, "--to", f"triton-python:{place}", "--name", "mol", "--raw", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["models"] == ["mol-prepare", "mol", "mol-raw"]
    pl.DataFrame({"smiles": ASKED}).write_csv(tmp_path / "asked.csv")
    done = tlx("predict", bundle, tmp_path / "asked.csv", "--out", tmp_path / "told.csv")
    assert done.code == 0, done.err
    told = pl.read_csv(tmp_path / "told.csv")
    files = []
    for number, smiles in enumerate((*ASKED, "c1ccccc1(")):
        files.append(tmp_path / f"{number}.smi")
        files[-1].write_text(smiles)
    with triton(triton_python, place, tmp_path / "scratch") as server:
        server.load("mol-raw")
        answers = client(triton_python, "raw", server.http, "mol-raw", *files)["answers"]
    assert "no valid SMILES" in answers.pop()
    np.testing.assert_allclose(np.ravel(answers), told["y"].to_numpy(), rtol=1e-6)
