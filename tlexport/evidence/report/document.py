"""What a report is made of: the run's files, read, and where each of them stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from tlexport.evidence.accuracy import operating
from tlexport.results import Decision

Array = NDArray[Any]
COMPARED = 3  # variants that are drawn beside the reference


@dataclass(frozen=True)
class Source:
    """A file of the run. `told`: whether its hash is the one that a stage recorded."""

    file: str
    sha256: str
    told: str
    changed: bool = False


@dataclass(frozen=True)
class Answers:
    """Labels of the test split, and what the reference and the variants answered; shapes as in scores.py.

    times datetime64 [n] or None; inputs as the graph takes them, [n, ...], or None where they must not be shown.
    decision: how decisions are made of outputs; None in a regression.
    """

    task: str
    classes: tuple[str, ...]
    labels: Array
    reference: Array
    variants: Mapping[str, Array]
    decision: Decision | None = None
    times: Array | None = None
    inputs: Array | None = None
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    def decided(self, outputs: Array) -> Array:
        """int64 [n] of classes, or 0/1 [n, K] (multilabel)."""
        assert self.decision is not None
        return operating.decide(outputs, self.task, self.decision)


@dataclass(frozen=True)
class Document:
    """Results as the JSON that the stages wrote (results.py); what a run lacks is empty.

    recipe is the run's own; `changed` tells what this build's command line changed of it: `gates.max_drop=0.005`.
    """

    recipe: Mapping[str, Any]
    finetune: Mapping[str, Any]
    verify: Mapping[str, Any]
    bench: Mapping[str, Any]
    changed: Sequence[str] = ()
    baselines: Mapping[str, Any] = field(default_factory=dict)
    quantize: Mapping[str, Any] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    receipts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by variant
    latency_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)  # timed calls by variant
    started_s: Mapping[str, Sequence[float]] = field(default_factory=dict)  # when they started
    chosen: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # target -> variant, why
    losers: Mapping[str, str] = field(default_factory=dict)  # every other variant -> why not
    answers: Answers | None = None
    no_answers: str = ""  # why there are none
    inputs_shown: str = ""  # whether copies of test samples are on the page, and why
    flips: int = 12
    versions: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        """What the reference is called among the timed."""
        return str((self.bench.get("reference") or {}).get("name") or "torch-eager")

    @property
    def references(self) -> list[Mapping[str, Any]]:
        """The reference on each device where it was timed."""
        return [self.bench[key] for key in ("reference", "reference_on_gpu") if self.bench.get(key)]

    @property
    def metric(self) -> str:
        return str(self.finetune.get("metric") or "metric")

    @property
    def variants(self) -> list[Mapping[str, Any]]:
        return list(self.bench.get("variants") or [])

    @property
    def compared(self) -> dict[str, Array]:
        """The variants whose answers are drawn: the chosen ones; if there are none, those with the smallest drop."""
        if self.answers is None:
            return {}
        held = self.answers.variants
        names = [name for name in dict.fromkeys(n for n, _ in self.chosen.values()) if name in held]
        if not names:
            drops = {
                v["name"]: v["drop"] for v in self.variants if v.get("drop") is not None and v["name"] in held
            }
            names = sorted(drops, key=drops.__getitem__)[:1]
        return {name: held[name] for name in names[:COMPARED]}

    @property
    def kinds(self) -> dict[str, str]:
        """The style class of each series: the reference, then what is compared with it."""
        names = list(self.compared) or [name for name, _ in self.chosen.values()]
        drawn = {name: f"s{index}" for index, name in enumerate(dict.fromkeys(names), start=1)}
        return {self.reference: "s0"} | drawn

    def evidence(self, name: str) -> Mapping[str, Any]:
        """What stands behind a variant's verdict; empty where verify wrote none."""
        held = self.verify.get("evidence") or []
        return next((found for found in held if found.get("variant") == name), {})
