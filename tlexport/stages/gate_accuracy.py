"""gate_accuracy: what a run's targets got held against another run's, on the same samples."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from tlexport.bundle import choice
from tlexport.errors import GateError, RunError
from tlexport.evidence.accuracy.comparison import Rule
from tlexport.evidence.gate import accuracy
from tlexport.modalities import metrics
from tlexport.results import BenchResult, GateResult, GateVerdict
from tlexport.run import Run, digest, read_json


def beside(path: Path, against: Path, *, tolerance: float | None = None) -> GateResult:
    """Hold what a run's targets got against what the same targets got in another run, on the test split that both share.

    `tolerance` is by default the recipe's gates.max_drop. Raises RunError if either has not been verified and benched
    or their test splits differ, GateError if a target of both has no passing variant.
    """
    began = time.monotonic()
    new, old = Run(path), Run(against)
    for name in ("labels.npy", "inputs.npy"):
        if digest(new.require(f"reference/{name}", "finetune")) != digest(
            old.require(f"reference/{name}", "finetune")
        ):
            raise RunError(
                f"{new.path} and {old.path} have different test splits (reference/{name}): their drops cannot be paired; "
                "fine-tune both from the same data, split and seed"
            )
    chosen = {name: _chosen(run) for name, run in (("new", new), ("old", old))}
    shared = [target for target in chosen["new"] if target in chosen["old"]]
    if not shared:
        raise GateError(f"{new.path} and {old.path} have no target in common that passes in both")
    return GateResult(
        path=str(path),
        against=str(against),
        verdicts=tuple(
            _paired(new, old, chosen["new"][target], chosen["old"][target], target, tolerance)
            for target in shared
        ),
        seconds=time.monotonic() - began,
    )


def _paired(
    new: Run, old: Run, variant: str, before: str, target: str, tolerance: float | None
) -> GateVerdict:
    """One target's verdict, by the new run's recipe."""
    recipe = new.recipe
    compared = Rule.of(recipe, metrics.METRICS, metrics.HIGHER_IS_BETTER, metrics.UNBOUNDED)
    labels = np.load(new / "reference/labels.npy", allow_pickle=False)
    groups = new / "reference/groups.npy"
    was, now = _answers(old, before, len(labels)), _answers(new, variant, len(labels))
    old_metric, new_metric = (compared.prepare(labels, answers) for answers in (was, now))
    value = float(old_metric(np.ones((1, len(labels))))[0])
    counts_decisions = recipe.metric == "accuracy" and labels.ndim == 1
    right = [answers.argmax(axis=1) == labels for answers in (was, now)] if counts_decisions else None
    return accuracy.compare(
        old_metric,
        new_metric,
        len(labels),
        name=f"{recipe.name} {variant} for {target}",
        against=f"{before} of {old.path}",
        metric=recipe.metric,
        tolerance=(compared.max_drop if tolerance is None else tolerance)
        * (value if compared.unbounded else 1.0),
        resamples=compared.resamples,
        confidence=compared.confidence,
        seed=compared.seed,
        sign=compared.sign,
        groups=np.load(groups, allow_pickle=False) if groups.is_file() else None,
        mcnemar_p=accuracy.worse(right[0], right[1]) if right else None,
    )


def _chosen(run: Run) -> dict[str, str]:
    """Target -> the variant that it got."""
    measured = BenchResult.model_validate(read_json(run.require("bench.json", "bench")))
    targets = dict.fromkeys(variant.target for variant in measured.variants)
    passing = [t for t in targets if any(v.target == t and choice.passes(v) for v in measured.variants)]
    return {target: choice.choose(target, measured.variants).variant.name for target in passing}


def _answers(run: Run, variant: str, samples: int) -> np.ndarray:
    """float32 [samples, K] that verify got from the variant. Raises RunError if they are gone."""
    path = run / "predictions" / f"{variant}.npy"
    if not path.is_file():
        raise RunError(f"{path} is missing; run: tlexport verify {run.path}")
    answers: np.ndarray = np.load(path, allow_pickle=False)
    if len(answers) != samples:
        raise RunError(
            f"{path} holds {len(answers)} answers to {samples} samples; run: tlexport verify {run.path}"
        )
    return answers
