"""pass, fail or undecided: planted faults, and how many samples would tell."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from pipeline import Ended

from tlexport.progress import Silent
from tlexport.recipe import with_overrides
from tlexport.results import Variant, VerifyResult
from tlexport.run import Run
from tlexport.stages import compile, verify

Cli = Callable[..., Ended]


def judged(run: Run, *overrides: str) -> VerifyResult:
    recipe = with_overrides(run.recipe, [*overrides], targets=["cpu"])
    compile.run(run, recipe, Silent())
    return verify.run(run, recipe, Silent())


def of(result: VerifyResult, precision: str) -> Variant:
    return next(v for v in result.variants if v.precision == precision and v.backend == "onnxruntime")


def test_few_samples_decide_for_fp32_and_not_for_int8(run_copy: Run, tlx: Cli) -> None:
    """Some forty test samples cannot show that INT8 costs at most 0.2 points; FP32 differs by rounding alone."""
    result = judged(run_copy, "gates.max_drop=0.002")
    assert of(result, "fp32").verdict == "pass"
    int8 = of(result, "int8")
    assert int8.verdict == "undecided", int8
    assert re.search(r"undecided, needs about [\d ,]+ samples \(has \d+\)", int8.reason), int8.reason
    evidence = next(e for e in result.evidence if e.variant == int8.name)
    assert evidence.needed is not None and evidence.needed > result.samples
    assert evidence.p_adjusted is not None and evidence.p_adjusted > 0.025
    told = tlx("verify", run_copy.path, "--max-drop", "0.002")
    assert told.code == 0 and "undecided" in told.out and "decided by" in told.out


def test_undecided_is_not_a_pass(run_copy: Run, tlx: Cli) -> None:
    judged(run_copy, "gates.max_drop=0.002", "precision=[int8]")
    done = tlx("verify", run_copy.path, "--max-drop", "0.002", "--json")
    assert done.code == 14 and "needs about" in done.err
    assert {v["verdict"] for v in done.json["variants"]} == {"undecided"}


def test_worse_beyond_doubt_fails(run_copy: Run, tlx: Cli) -> None:
    """Planted: the kept answers of the reference are always right, so that every variant is far behind."""
    labels = np.load(run_copy / "reference/labels.npy")
    perfect = np.eye(10, dtype=np.float32)[labels]
    np.save(run_copy / "reference/outputs.npy", perfect)
    done = tlx("verify", run_copy.path, "--max-drop", "0.01", "--json")
    verdicts = {v["verdict"] for v in done.json["variants"] if v["metric"] is not None}
    assert verdicts == {"fail"} and done.code == 10
    assert all(
        "over" in v["reason"] or "against" in v["reason"]
        for v in done.json["variants"]
        if v["metric"] is not None
    )


def test_the_slice_gate_fails_what_the_whole_hides(run_copy: Run) -> None:
    """Planted: for a tenth of the samples the kept answers of the reference are better than any variant's."""
    labels = np.load(run_copy / "reference/labels.npy")
    outputs = np.load(run_copy / "reference/outputs.npy")
    outputs[:] = np.eye(10, dtype=np.float32)[labels]
    rng = np.random.default_rng(0)
    site = np.where(rng.random(len(labels)) < 0.5, "a", "b")
    np.save(run_copy / "reference/outputs.npy", outputs)
    np.savez(run_copy / "reference/slices.npz", site=site)
    loose = ["gates.max_drop=1", "verify.least_samples=5"]
    assert of(judged(run_copy, *loose), "fp32").verdict == "pass"
    result = judged(run_copy, *loose, "gates.max_slice_drop=0.05")
    assert of(result, "fp32").verdict == "fail" and "max_slice_drop 0.05" in of(result, "fp32").reason
    assert any(part.slice.startswith("site=") for part in result.evidence[0].slices)


def test_the_calibration_gate(run_copy: Run) -> None:
    """Planted: the kept answers of the reference are calibrated on the test split by construction, the variants' are not."""
    labels = np.load(run_copy / "reference/labels.npy")
    outputs = np.full((len(labels), 10), 0.2 / 9, np.float32)
    outputs[np.arange(len(labels)), labels] = 0.8
    wrong = np.arange(len(labels)) % 5 == 0
    outputs[wrong] = np.roll(outputs[wrong], 1, axis=1)
    np.save(run_copy / "reference/outputs.npy", outputs)
    result = judged(run_copy, "gates.max_drop=1", "gates.max_ece_drift=0.0001")
    drift = result.evidence[0].calibration
    assert drift is not None and drift.ece_drift_high > 0.0001
    assert of(result, "fp32").verdict == "fail" and "max_ece_drift" in of(result, "fp32").reason


def test_a_cut_off_needs_a_task_that_has_one(run_copy: Run, tlx: Cli) -> None:
    done = tlx("verify", run_copy.path, "decision.rule=sensitivity", "decision.value=0.9")
    assert done.code == 3 and "most probable" in done.err
    done = tlx("verify", run_copy.path, "decision.rule=sensitivity")
    assert done.code == 2 and "needs a value" in done.err


def test_the_decision_is_frozen_in_the_bundle(tmp_path: Path, tlx: Cli) -> None:
    """Chosen on validation samples, packed, and used by predict."""
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    quick = ("--set", "quick", "baselines=[]", "decision.rule=sensitivity", "decision.value=0.99")
    assert tlx("finetune", "breast-cancer", "data.path=sklearn/breast_cancer", *quick, "--out", run).code == 0
    built = tlx("build", run, "-t", "cpu", "-p", "fp32", "--out", bundle, "--json")
    assert built.code == 0, built.err
    manifest = json.loads((bundle / "manifest.json").read_text())
    (cut,) = manifest["decision"]["thresholds"]
    labels = np.load(run / "reference/validation/labels.npy")
    scores = np.load(run / "reference/validation/outputs.npy")[:, 1]
    assert cut != 0.5 and (scores[labels == 1] >= cut).mean() >= 0.99
    assert manifest["decision"]["samples"] == len(labels)
    assert "sensitivity" in tlx("inspect", bundle).out
