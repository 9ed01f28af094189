"""What every modality hands on: three splits of prepared inputs with labels, and what was found in the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from tlexport.progress import Progress

UNKNOWN = -1  # a label of a multi-label sample that nobody measured


SplitT = TypeVar("SplitT", bound="Split")


class DataWarning(UserWarning):
    """What `samples` has to tell of data that it could read: `warnings.warn(text, DataWarning)`."""


class Preparation(Protocol):
    """How raw data becomes the graph's inputs: what a client must repeat."""

    def describe(self) -> dict[str, Any]:
        """As JSON, for the manifest: exact enough to repeat without this package."""
        ...


@dataclass(frozen=True)
class Split:
    """Samples of one split, in a fixed order.

    inputs   [n, ...] of the graph's only input, or [n] structured with a field for each of its inputs
    labels   int64 [n] of class indices; int8 [n, K] of 0, 1 and UNKNOWN (multilabel); float32 [n, K] (regression)
    groups   str [n]: samples of one group are not independent (a patient, a day, a scaffold); None: all are
    names    what a person calls each sample
    times    datetime64[D] [n] of the last moment a sample's inputs know of; None where there is no time
    keys     what makes each sample itself where its inputs depend on others (a molecule's SMILES, while tokens are
             numbered by a vocabulary); None: the inputs
    slices   column -> str [n]: the part that each sample belongs to, where drops are told apart by it
    """

    inputs: NDArray[Any]
    labels: NDArray[Any]
    groups: NDArray[np.str_] | None
    names: tuple[str, ...]
    times: NDArray[np.datetime64] | None = None
    keys: tuple[str, ...] | None = None
    slices: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def part(self: SplitT, rows: NDArray[np.integer[Any]]) -> SplitT:
        """The split of these rows alone."""
        return replace(
            self,
            inputs=self.inputs[rows],
            labels=self.labels[rows],
            groups=None if self.groups is None else self.groups[rows],
            names=tuple(self.names[row] for row in rows),
            times=None if self.times is None else self.times[rows],
            keys=None if self.keys is None else tuple(self.keys[row] for row in rows),
            slices={name: of[rows] for name, of in self.slices.items()},
        )

    def batch(self, rows: NDArray[np.intp]) -> NDArray[Any]:
        """The inputs of these rows as the graph takes them."""
        rows_of: NDArray[Any] = self.inputs[rows]
        return rows_of


class Corrupt(BaseModel):
    """A sample that could not be read, and why."""

    model_config = ConfigDict(frozen=True)

    name: str
    reason: str


class Duplicate(BaseModel):
    """A sample of val or test whose inputs are also in train."""

    model_config = ConfigDict(frozen=True)

    split: str
    name: str
    train: str


class DataReport(BaseModel):
    """What was found and what was done with it. Names and counts, never a sample's contents."""

    model_config = ConfigDict(frozen=True)

    source: str
    samples: dict[str, int]  # by split
    counts: dict[
        str, dict[str, int]
    ]  # split -> class -> samples (positives if multilabel; empty for regression)
    split_origin: dict[str, str]  # split -> given, or how it was drawn
    groups: dict[str, int] | None  # groups in each split
    corrupt: tuple[Corrupt, ...] = ()  # samples left out because they cannot be read
    duplicates: tuple[Duplicate, ...] = ()  # the first 1000
    problems: tuple[
        str, ...
    ] = ()  # what was left out or changed, and how much of it; the first of each kind named
    leaks: tuple[str, ...] = ()  # columns that give the label away, samples on both sides
    sha256: str  # of the inputs, label and group of every sample, in order
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """A data set that is ready to train on. `class_names` are the values' names in a regression."""

    train: Split
    val: Split
    test: Split
    task: str  # binary, multiclass, multilabel, regression
    class_names: tuple[str, ...]
    preprocessing: Any  # a Preparation
    report: DataReport


def tell(data: Dataset, progress: Progress) -> None:
    """Say what the data holds, and everything about it that a careful person would want to know before training."""
    report = data.report
    counts = ", ".join(
        f"{name} {count} ({report.split_origin[name]})" for name, count in report.samples.items()
    )
    what = {"regression": "values", "multilabel": "labels"}.get(data.task, "classes")
    kind = f"{data.task}, {len(data.class_names)} {what}" if data.class_names else "unlabelled"
    progress.say(f"data: {kind}; {counts}")
    for text in (*report.problems, *report.leaks):
        progress.warn(text)
    for note in report.notes:
        progress.say(note)
