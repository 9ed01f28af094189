"""The reference's side of every comparison on one set of samples, read once: how much worse is a candidate, and how surely."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.evidence.accuracy import bootstrap
from tlexport.recipe import Recipe

Prepare = Callable[
    [NDArray[Any], NDArray[Any]], bootstrap.Metric
]  # labels, outputs -> the metric of resamples


@dataclass(frozen=True)
class Rule:
    """How a drop is measured and limited. `unbounded`: an error without an upper limit, limited as a share of the reference's."""

    prepare: Prepare
    higher_is_better: bool
    unbounded: bool
    max_drop: float
    confidence: float
    resamples: int
    seed: int

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        metrics: Mapping[str, Prepare],
        higher: Mapping[str, bool],
        unbounded: Container[str],
    ) -> Rule:
        """The recipe's metric by these tables (modalities.metrics), its gate and its interval."""
        return cls(
            metrics[recipe.metric],
            higher[recipe.metric],
            recipe.metric in unbounded,
            recipe.gates.max_drop,
            recipe.verify.confidence,
            recipe.verify.resamples,
            recipe.seed,
        )

    @property
    def sign(self) -> float:
        return 1.0 if self.higher_is_better else -1.0


@dataclass(frozen=True)
class Comparison:
    """labels as in dataset.Split, outputs float32 [n, K] of the reference, groups int64 [n] where samples depend on others."""

    rule: Rule
    labels: NDArray[Any]
    outputs: NDArray[Any]
    groups: NDArray[Any] | None

    @classmethod
    def read(cls, folder: Path, rule: Rule) -> Comparison:
        """From labels.npy, outputs.npy and, if it is there, groups.npy."""
        groups = folder / "groups.npy"
        return cls(
            rule,
            np.load(folder / "labels.npy", allow_pickle=False),
            np.load(folder / "outputs.npy", allow_pickle=False),
            np.load(groups, allow_pickle=False) if groups.is_file() else None,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _prepared(self) -> bootstrap.Metric:
        return self.rule.prepare(self.labels, self.outputs)

    @cached_property
    def value(self) -> float:
        """The reference's metric."""
        return float(self._prepared(np.ones((1, len(self.labels))))[0])

    @property
    def limit(self) -> float:
        """The largest drop allowed, in the metric's own unit."""
        return self.rule.max_drop * (self.value if self.rule.unbounded else 1.0)

    def drop(self, outputs: NDArray[Any]) -> bootstrap.Interval:
        """Reference minus candidate on the same resamples; whole groups are drawn where there are groups."""
        return bootstrap.paired_bootstrap(
            self._prepared,
            self.rule.prepare(self.labels, outputs),
            len(self.labels),
            resamples=self.rule.resamples,
            confidence=self.rule.confidence,
            seed=self.rule.seed,
            sign=self.rule.sign,
            groups=self.groups,
            limit=self.limit,
        )

    def part(self, mask: NDArray[np.bool_]) -> Comparison:
        """The comparison on some of the samples: mask bool [n]."""
        groups = None if self.groups is None else self.groups[mask]
        return Comparison(self.rule, self.labels[mask], self.outputs[mask], groups)

    def within(self, drop: bootstrap.Interval) -> bool:
        """Non-inferiority: the interval's unfavourable end is within the limit.

        Five of a thousand samples are a drop of 0.005, and the difference of two means a rounding more.
        """
        return drop.high <= self.limit + bootstrap.ROUNDING
