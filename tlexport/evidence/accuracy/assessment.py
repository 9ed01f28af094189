"""All that is said of one variant's answers on the test split: the drop, and the tests that stand behind its verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.evidence.accuracy import (
    bootstrap,
    calibration,
    delong,
    flips,
    forecasts,
    operating,
    proportions,
    slices,
)
from tlexport.evidence.accuracy.comparison import Comparison, Rule
from tlexport.results import (
    AccuracyEvidence,
    AucTest,
    CalibrationDrift,
    Decision,
    FlipCount,
    ForecastTest,
    Tails,
)

DECIDED = ("accuracy", "balanced_accuracy", "f1", "mcc")  # metrics that see decisions alone


@dataclass(frozen=True)
class Question:
    """What is asked of the samples. `horizon`: periods ahead of a forecast; `least`: samples of a slice that is stated."""

    metric: str
    task: str
    class_names: tuple[str, ...]
    decision: Decision | None
    horizon: int
    least: int


@dataclass(frozen=True)
class Assessed:
    drop: bootstrap.Interval
    evidence: AccuracyEvidence


class Assessor:
    """The reference's side of every assessment on the samples of `folder` (see modalities/reference.py), read once."""

    def __init__(self, folder: Path, rule: Rule, question: Question) -> None:
        self.reference = Comparison.read(folder, rule)
        self.question = question
        times, columns = folder / "times.npy", folder / "slices.npz"
        self.times = np.load(times, allow_pickle=False) if times.is_file() else None
        self.columns: Mapping[str, NDArray[Any]] = {}
        if columns.is_file():
            with np.load(columns, allow_pickle=False) as kept:
                self.columns = {name: kept[name] for name in kept.files}

    def assess(self, variant: str, outputs: NDArray[Any]) -> Assessed:
        """outputs: float32 [n, K] of the variant for the same samples. Raises DataError where the metric is undefined."""
        drop = self._drop(outputs)
        parts = slices.drops(self.reference, outputs, self._masks, minimum=self.question.least)
        evidence = AccuracyEvidence(
            variant=variant,
            p=drop.p,
            flips=self._flips(outputs),
            auc=self._auc(outputs),
            calibration=self._calibration(outputs),
            forecast=self._forecast(outputs),
            tails=self._tails(outputs),
            slices=parts,
            worst_slice=slices.worst(parts),
        )
        return Assessed(drop, evidence)

    def _drop(self, outputs: NDArray[Any]) -> bootstrap.Interval:
        """The bootstrap's interval, widened for a metric of decisions by what so few flips leave open.

        Where a handful of decisions changes the bootstrap sees too little spread, and none where none does. The score test
        of paired proportions holds there; and where no decision changed because every answer is nearly the reference's,
        the density of answers near the cut-off bounds what was not seen (flips.unseen).
        """
        drop = self.reference.drop(outputs)
        if self.question.metric not in DECIDED:
            return drop
        plain, n, weight = self._decided(outputs, None), len(self.reference), self._weight
        low, high = (
            weight * end for end in proportions.interval(plain.harmful, plain.mended, n, drop.confidence)
        )
        p = proportions.p_value(plain.harmful, plain.mended, n, self.reference.limit / weight)
        if not plain.count:
            unseen = weight * flips.unseen(
                self.reference.outputs, outputs, self.question.task, 0, n, (1 + drop.confidence) / 2
            )
            if unseen < high:
                low, high, p = -unseen, unseen, 0.0 if unseen < self.reference.limit else p
        return drop.model_copy(
            update={"low": min(drop.low, low), "high": max(drop.high, high), "p": max(drop.p or 0.0, p)}
        )

    @cached_property
    def _weight(self) -> float:
        """How much one flip can move the metric, in shares of the samples: 1 for accuracy; where classes count alike, of the rarest."""
        if self.question.metric == "accuracy":
            return 1.0
        labels = self.reference.labels
        classes = self.reference.outputs.shape[1]
        counts = (labels > 0).sum(axis=0) if labels.ndim == 2 else np.bincount(labels, minlength=classes)
        return len(labels) / (len(counts) * max(1, int(counts[counts > 0].min())))

    def _decided(self, outputs: NDArray[Any], decision: Decision | None) -> flips.Flips:
        before, after = (
            operating.decide(of, self.question.task, decision) for of in (self.reference.outputs, outputs)
        )
        return flips.between(before, after, self.reference.labels, confidence=self.reference.rule.confidence)

    def _flips(self, outputs: NDArray[Any]) -> FlipCount | None:
        if self.question.decision is None:
            return None
        found = self._decided(outputs, self.question.decision)
        return FlipCount(
            count=found.count,
            harmful=found.harmful,
            harmless=found.harmless,
            share=found.share,
            upper=found.upper,
            mcnemar_p=flips.mcnemar(found.harmful, found.mended),
        )

    def _auc(self, outputs: NDArray[Any]) -> AucTest | None:
        """None in a regression, and where a class has no positive or no negative sample."""
        if self.question.task == "regression":
            return None
        found = delong.delong_macro(
            self.reference.labels,
            self.reference.outputs,
            outputs,
            self.question.task,
            self.reference.rule.confidence,
        )
        return None if found is None else AucTest.model_validate(found.model_dump(exclude={"se"}))

    def _calibration(self, outputs: NDArray[Any]) -> CalibrationDrift | None:
        if self.question.task == "regression":
            return None
        rule = self.reference.rule
        found = calibration.drift(
            self.reference.labels,
            self.reference.outputs,
            outputs,
            self.question.task,
            resamples=rule.resamples,
            confidence=rule.confidence,
            seed=rule.seed,
            groups=self.reference.groups,
        )
        return CalibrationDrift.model_validate(found.model_dump())

    def _forecast(self, outputs: NDArray[Any]) -> ForecastTest | None:
        """Only of samples that have a time."""
        if self.times is None:
            return None
        of, name = forecasts.loss_of(self.question.metric, self.question.task)
        labels = self.reference.labels
        found = forecasts.diebold_mariano(
            of(labels, self.reference.outputs),
            of(labels, outputs),
            self.times,
            horizon=self.question.horizon,
            loss=name,
        )
        return ForecastTest.model_validate(found.model_dump())

    def _tails(self, outputs: NDArray[Any]) -> Tails | None:
        if self.question.task != "regression":
            return None
        found = forecasts.tails(self.reference.labels, self.reference.outputs, outputs)
        return Tails.model_validate(found.model_dump())

    @cached_property
    def _masks(self) -> dict[str, NDArray[np.bool_]]:
        return slices.slices(
            self.reference.labels,
            self.question.task,
            self.question.class_names,
            self.reference.groups,
            self.columns,
        )


def adjusted(found: Mapping[str, Assessed]) -> dict[str, Assessed]:
    """The same with Holm's correction over them: each is one chance to pass wrongly."""
    from tlexport.evidence.accuracy.noninferiority import holm

    p = holm({name: own.drop.p for name, own in found.items() if own.drop.p is not None})
    return {
        name: replace(own, evidence=own.evidence.model_copy(update={"p_adjusted": p.get(name)}))
        for name, own in found.items()
    }
