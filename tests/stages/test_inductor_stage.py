"""A build that asks for AOTInductor alone: compiled from the checkpoint, judged, timed, chosen, packaged, and it predicts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from pipeline import Built

import tlexport
from tlexport import tensors
from tlexport.backends import inductor
from tlexport.bundle import manifest, preflight
from tlexport.bundle.preflight import Trust
from tlexport.errors import BundleError, CompileError, GateError, NoCompilerError, PreflightError
from tlexport.modalities import MODALITIES
from tlexport.models.checkpoint import load_checkpoint
from tlexport.models.network import ServingModel
from tlexport.progress import Silent
from tlexport.recipe import parse, with_overrides
from tlexport.results import CompileResult
from tlexport.run import Run
from tlexport.stages import bench, compile, package, verify

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(not inductor.availability().builds, reason="no C++ compiler")
ALONE = ["compile.backends=[inductor]", "precision=[fp32]", "targets=[cpu]"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, built: Built) -> Run:
    """The small image network's run after bench, with AOTInductor as its only backend."""
    if not inductor.availability().builds:
        pytest.skip("no C++ compiler")
    run = Run(shutil.copytree(built.before["compile"], tmp_path_factory.mktemp("alone") / "run"))
    recipe = with_overrides(run.recipe, ALONE)
    for stage in (compile, verify, bench):
        stage.run(run, recipe, Silent())
    return run


def test_it_is_judged_timed_and_chosen(alone: Run, tmp_path: Path) -> None:
    recipe = with_overrides(alone.recipe, ALONE)
    measured = bench.load(alone)
    (variant,) = measured.variants
    assert (variant.name, variant.verdict, variant.backend) == ("cpu-inductor-fp32", "pass", "inductor")
    assert variant.max_abs_error is not None and variant.max_abs_error < 1e-5
    assert variant.p50_ms and variant.receipt == "fp32 x 18"
    assert any("inductor: input tensors" in note for note in measured.notes)
    packaged = package.run(alone, recipe, Silent(), out=tmp_path / "bundle")
    assert packaged.chosen == {"cpu": "cpu-inductor-fp32"}
    with pytest.raises(PreflightError, match="is code that would run as you"):
        preflight.check(tmp_path / "bundle", target="cpu")
    trusted = preflight.check(tmp_path / "bundle", target="cpu", trust=Trust(unsigned=True))
    entry = trusted.targets["cpu"]
    assert entry.file.endswith(".pt2")
    artifact = tmp_path / "bundle" / entry.file
    artifact.write_bytes(artifact.read_bytes() + b"\0")
    with pytest.raises(BundleError, match=r"model\.pt2"):
        preflight.check(tmp_path / "bundle")


def test_an_artifact_that_was_changed_is_neither_judged_nor_packaged(alone: Run, tmp_path: Path) -> None:
    recipe = with_overrides(alone.recipe, ALONE)
    run = Run(shutil.copytree(alone.path, tmp_path / "run"))
    (variant,) = run.result("compile", CompileResult).variants
    assert variant.file is not None
    artifact = run / variant.file
    artifact.write_bytes(artifact.read_bytes() + b"\0")
    with pytest.raises(GateError, match="not the file that was verified"):
        package.run(run, recipe, Silent(), out=tmp_path / "bundle")
    (judged,) = verify.run(run, recipe, Silent()).variants
    assert judged.verdict == "fail" and "changed after it was compiled" in judged.reason


@needs_compiler
def test_a_table_with_missing_values_all_the_way(tmp_path: Path) -> None:
    """Raw rows to a bundle to a prediction, which is the reference's own answer to these rows."""
    random, n = np.random.default_rng(0), 300
    score = random.normal(size=n)
    rows = pl.DataFrame(
        {
            "score": np.where(random.random(n) < 0.1, None, score).tolist(),
            "kind": random.choice(["x", "y", "z"], n),
            "bad": np.where(score + random.normal(0, 0.3, n) > 0, "yes", "no"),
        },
        schema_overrides={"score": pl.Float64},
    )
    rows.write_csv(tmp_path / "table.csv")
    document = {
        "name": "table",
        "modality": "tabular",
        "data": {"path": str(tmp_path / "table.csv"), "table": {"target": "bad"}},
        "backbone": {"options": {"members": 4, "width": 16, "depth": 2, "bins": 8, "embedding": 4}},
        "transfer": {"epochs": 3, "batch_size": 50, "lr": 1e-2},
        "verify": {"resamples": 200},
        "gates": {"max_drop": 1},
        "bench": {"samples": 10, "batch_sizes": [1]},
        "precision": ["fp32"],
        "compile": {"backends": ["inductor"]},
        "baselines": [],
    }
    (tmp_path / "table.yaml").write_text(parse(document, []).to_yaml())
    run = tlexport.finetune(tmp_path / "table.yaml", out=tmp_path / "run")
    made = tlexport.build(run, bundle=tmp_path / "bundle")
    assert made.failed == {} and made.chosen == {"cpu": "cpu-inductor-fp32"}
    (variant,) = made.variants
    assert variant.max_abs_error is not None and variant.max_abs_error < 1e-5
    asked = {"bundle": tmp_path / "bundle", "data": tmp_path / "table.csv", "out": tmp_path / "answers.csv"}
    with pytest.raises(PreflightError, match="--trust-unsigned"):
        tlexport.predict(**asked)
    answered = tlexport.predict(**asked, trust_unsigned=True)
    assert "AOTInductor" in answered.provider and answered.samples == n
    document = manifest.read(tmp_path / "bundle")
    _, inputs = MODALITIES["tabular"].samples(str(tmp_path / "table.csv"), document.preprocessing)
    serving = ServingModel(load_checkpoint(run / "checkpoint")[0]).eval()
    named = tensors.named(inputs, serving.model.INPUTS)
    with torch.inference_mode():
        expected = serving(*(torch.from_numpy(array.copy()) for array in named.values())).numpy()
    found = pl.read_csv(tmp_path / "answers.csv").select(document.classes).to_numpy()
    assert expected.std() > 0.02
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_backend_that_is_named_and_cannot_be_used_ends_the_build(
    run_copy: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    recipe = with_overrides(run_copy.recipe, ["compile.backends=[auto, inductor]"], targets=["cpu"])
    with pytest.raises(NoCompilerError, match=r"g\+\+"):
        compile.run(run_copy, recipe, Silent())
    only = with_overrides(run_copy.recipe, ["compile.backends=[onnxruntime]"], targets=["sm89"])
    with pytest.raises(CompileError, match="no backend of onnxruntime can compile for sm89"):
        compile.run(run_copy, only, Silent())


def test_auto_leaves_it_out(built: Built) -> None:
    variants = Run(built.run).result("compile", CompileResult).variants
    assert variants and "inductor" not in {variant.backend for variant in variants}
