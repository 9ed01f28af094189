"""All that is said of one variant's answers on the test split: the drop, and the tests that stand behind its verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError
from tlexport.evidence.accuracy import (
    bootstrap,
    calibration,
    delong,
    flips,
    forecasts,
    noninferiority,
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
    SliceDrop,
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
        parts = slices.drops(
            self.reference,
            outputs,
            self._masks,
            minimum=self.question.least,
            decision=self.question.decision,
        )
        found: dict[str, Any] = {}
        notes = []
        for name, test in (
            ("flips", self._flips),
            ("auc", self._auc),
            ("calibration", self._calibration),
            ("forecast", self._forecast),
            ("tails", self._tails),
        ):
            try:
                found[name] = test(outputs)
            except DataError as error:
                notes.append(f"{name}: {error}")
        evidence = AccuracyEvidence(
            variant=variant, p=drop.p, slices=parts, worst_slice=_told(parts), notes=tuple(notes), **found
        )
        return Assessed(drop, evidence)

    def _drop(self, outputs: NDArray[Any]) -> bootstrap.Interval:
        """The bootstrap's interval, widened for a metric of decisions by what so few flips leave open.

        Where a handful of decisions changes the bootstrap sees too little spread, and none where none does. The score test
        of paired proportions holds there; and where no decision changed because every answer is nearly the reference's,
        the density of answers near the cut-off bounds what was not seen (flips.unseen).
        """
        drop = self.reference.drop(outputs)
        if self.question.metric not in DECIDED or not 0 < self.reference.limit < 1:
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
        if self.question.task == "regression":
            return None
        found = delong.delong_macro(
            self.reference.labels,
            self.reference.outputs,
            outputs,
            self.question.task,
            self.reference.rule.confidence,
            names=self.question.class_names,
            groups=self.reference.groups,
        )
        return AucTest.model_validate(found.model_dump(exclude={"se"}))

    def _calibration(self, outputs: NDArray[Any]) -> CalibrationDrift | None:
        if self.question.task == "regression":
            return None
        rule = self.reference.rule
        return calibration.drift(
            self.reference.labels,
            self.reference.outputs,
            outputs,
            self.question.task,
            resamples=rule.resamples,
            confidence=rule.confidence,
            seed=rule.seed,
            groups=self.reference.groups,
        )

    def _forecast(self, outputs: NDArray[Any]) -> ForecastTest | None:
        """Only of samples that have a time."""
        if self.times is None:
            return None
        before, after = (self._losses(of) for of in (self.reference.outputs, outputs))
        name = {"regression": "qlike" if self.question.metric == "qlike" else "squared error"}
        loss = name.get(self.question.task, "brier")
        return forecasts.diebold_mariano(before, after, self.times, self.question.horizon, loss)

    def _losses(self, outputs: NDArray[Any]) -> NDArray[np.float64]:
        """[n]: QLIKE or squared error of a forecast, the squared error of a probability."""
        labels, values = self.reference.labels, outputs.astype(np.float64)
        if self.question.task != "regression":
            truth = np.eye(values.shape[1])[labels] if labels.ndim == 1 else labels
            return np.asarray(np.square(values - truth).mean(axis=1))
        if self.question.metric == "qlike":
            ratio = labels / values
            return np.asarray((ratio - np.log(ratio) - 1).mean(axis=1))
        return np.asarray(np.square(values - labels).mean(axis=1))

    def _tails(self, outputs: NDArray[Any]) -> Tails | None:
        if self.question.task != "regression":
            return None
        return forecasts.tails(self.reference.labels, self.reference.outputs, outputs)

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
    p = noninferiority.holm({name: own.drop.p or 0.0 for name, own in found.items()})
    return {
        name: replace(own, evidence=own.evidence.model_copy(update={"p_adjusted": p[name]}))
        for name, own in found.items()
    }


def _told(parts: tuple[SliceDrop, ...]) -> str:
    worst = slices.worst(parts)
    if worst is None or worst.drop is None:
        return ""
    return f"{worst.slice}: drop {worst.drop:.4g} ({worst.drop_low:.4g} to {worst.drop_high:.4g}, {worst.samples} samples)"
