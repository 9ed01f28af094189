"""The fastest typed graph that keeps a budget on the metric: plain, then with better quantisation, then with layers left in FP32.

Each step is taken only if the one before misses the budget, and a better quantisation is kept only if it measurably brings
the scores nearer to FP32's. The caller judges a graph on samples of its own; here every trial is written down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import onnx

from tlexport.errors import ExportError, GateError
from tlexport.graph import cost, search, splice
from tlexport.graph.sensitivity import Answers, sensitivities
from tlexport.progress import Progress
from tlexport.results import LayerCost, SearchTrial

GAIN = 0.05  # of the noise: a smaller improvement is not told from chance on a few samples
ROUNDING = 1e-12  # of a difference of two means: 0.865 - 0.86 is more than 0.005
NEGLIGIBLE = 1e-4  # of the scores' variance (40 dB): where decisions are lost to that, verify still says so


class Verdict(NamedTuple):
    """A graph's drop of the metric with its interval, and the largest drop allowed."""

    drop: float
    low: float
    high: float
    limit: float

    @property
    def within(self) -> bool:
        """Non-inferiority: the unfavourable end keeps the limit."""
        return self.high <= self.limit + ROUNDING

    @property
    def undecided(self) -> bool:
        """The estimate keeps the limit and the interval's end does not: more samples would tell."""
        return self.drop <= self.limit + ROUNDING < self.high


Judge = Callable[[onnx.ModelProto], Verdict | None]  # None: the graph's outputs are not finite


class Lowerable(Protocol):
    """What typed graphs are made from."""

    @property
    def base(self) -> onnx.ModelProto:
        """Computes exactly what the network does."""
        ...

    def make(self, kept: Collection[str]) -> onnx.ModelProto:
        """The typed graph with these layers in FP32."""
        ...

    def alone(self) -> onnx.ModelProto:
        """The typed graph of which a single layer's cost may be asked: nothing in it is adjusted to other layers' errors."""
        ...


L = TypeVar("L", bound=Lowerable)


@dataclass(frozen=True)
class Cast:
    """A typed graph that is made from the FP32 one in one step."""

    base: onnx.ModelProto
    makes: Callable[[Collection[str]], onnx.ModelProto]

    def make(self, kept: Collection[str]) -> onnx.ModelProto:
        return self.makes(kept)

    def alone(self) -> onnx.ModelProto:
        return self.makes(())


@dataclass(frozen=True)
class Improvement(Generic[L]):
    """A better quantisation, described in words. `of` raises ExportError where it has nothing to work on."""

    words: str
    of: Callable[[L], L]


@dataclass(frozen=True)
class Effort:
    """`samples` is how many judge a graph, the unit of one evaluation; `report` asks every layer in any case.

    `least` is the share of the operations that stays in low precision: with less a typed graph has no point.
    """

    samples: int
    evaluations: int
    least: float
    report: bool


@dataclass(frozen=True)
class Found:
    """`kept` are the layers left in FP32, `layers` what each group costs: empty where that was not asked.

    `note` says so where the samples do not decide whether the budget is kept.
    """

    graph: onnx.ModelProto
    base: onnx.ModelProto
    kept: tuple[str, ...] = ()
    layers: tuple[LayerCost, ...] = ()
    note: str = ""


@dataclass
class Hunt:
    """One search, and its record in `trials`. `answers` are the FP32 graph's scores on a few samples."""

    name: str
    judge: Judge
    answers: Answers
    machine: cost.Machine
    effort: Effort
    progress: Progress
    trials: list[SearchTrial] = field(default_factory=list)
    evaluations: float = 0.0
    closest: tuple[Verdict, Lowerable, tuple[str, ...]] | None = None

    def fastest(self, plain: L, rounds: Sequence[Sequence[Improvement[L]]]) -> Found:
        """The first graph that keeps the budget; a later round of improvements is for what the earlier ones do not mend.

        Where none keeps it at its interval's end, the closest whose estimate does, with a note. Raises GateError naming the
        closest one where no estimate does.
        """
        now, graph = plain, plain.make(())
        noise = self._noise(graph)
        if noise < NEGLIGIBLE:
            return self._with_report(now, graph)
        kept = self._keeps(now, graph, "plain", ())
        if kept and self._shown_by_the_samples():
            return self._with_report(now, graph)
        for improvements in rounds[:1] if kept else rounds:
            better, left, words = self._improved(now, noise, improvements)
            if not words:
                continue
            found = better.make(())
            if self._keeps(better, found, words, ()):
                return self._with_report(better, found)
            now, noise, graph = (now, noise, graph) if kept else (better, left, found)
        return self._with_report(now, graph) if kept else self._promoted(now, graph)

    def _shown_by_the_samples(self) -> bool:
        """Whether so many samples without a loss show that the budget is kept.

        Where none of n is lost, 3 / n may still be, at 95% (rule of three): then quick improvements are taken all the same.
        """
        return self.closest is not None and 3 / self.effort.samples <= self.closest[0].limit

    def _improved(self, now: L, noise: float, improvements: Sequence[Improvement[L]]) -> tuple[L, float, str]:
        """Every improvement that takes at least GAIN off the noise, on top of those before it; what is left; their names."""
        words = []
        for improvement in improvements:
            try:
                better = improvement.of(now)
                left = self._noise(better.make(()))
            except ExportError as error:
                self.progress.say(f"search {self.name}: not {improvement.words}: {error}")
                continue
            kept = left <= (1 - GAIN) * noise
            self.progress.say(
                f"search {self.name}: {improvement.words}: noise {noise:.3g} -> {left:.3g}{'' if kept else ', left out'}"
            )
            if kept:
                now, noise = better, left
                words.append(improvement.words)
        return now, noise, ", ".join(words)

    def _promoted(self, now: Lowerable, graph: onnx.ModelProto) -> Found:
        groups = splice.groups(now.base, graph)
        noise, macs = self._sensitivities(now, groups), self._macs(now, groups)
        layers = self._layers(groups, noise, macs)

        def keeps(promoted: frozenset[int]) -> bool:
            kept = _members(groups, promoted)
            return self._keeps(now, now.make(kept), "layers left in FP32", kept)

        order = _affordable(noise, macs, 1 - self.effort.least - cost.share(graph, "fp32"))
        left = max(1, int(self.effort.evaluations - self.evaluations))
        found = search.fewest_promotions(order, keeps, evaluations=left, gain=macs)
        if found.groups is not None:
            kept = _members(groups, found.groups)
            return Found(now.make(kept), now.base, kept, _marked(layers, kept))
        if self.closest is None or not self.closest[0].undecided:
            raise GateError(self._out_of_reach())
        verdict, best, kept = self.closest
        return Found(best.make(kept), best.base, kept, _marked(layers, kept), self._undecided(verdict))

    def _undecided(self, verdict: Verdict) -> str:
        """The interval's half width falls with the root of the number of samples."""
        wanted = (
            self.effort.samples
            * ((verdict.high - verdict.drop) / max(verdict.limit - verdict.drop, 1e-9)) ** 2
        )
        return (
            f"undecided: the drop is {verdict.drop:.4g} and at worst {verdict.high:.4g}, over the {verdict.limit:.4g} allowed; "
            f"about {wanted:.2g} samples would tell, {self.effort.samples} do not"
        )

    def _with_report(self, now: Lowerable, graph: onnx.ModelProto) -> Found:
        """The graph as it is; with `report`, what each layer costs beside it."""
        if not self.effort.report:
            return Found(graph, now.base)
        groups = splice.groups(now.base, graph)
        noise = self._sensitivities(now, groups)
        return Found(graph, now.base, (), self._layers(groups, noise, self._macs(now, groups)))

    def _keeps(self, made_by: Lowerable, graph: onnx.ModelProto, step: str, kept: tuple[str, ...]) -> bool:
        """Whether the graph keeps the budget; the trial is written down."""
        verdict = self.judge(graph)
        self.evaluations += 1
        if verdict is not None and (self.closest is None or verdict.high < self.closest[0].high):
            self.closest = verdict, made_by, kept
        trial = SearchTrial(
            step=step,
            kept=kept,
            drop=verdict.drop if verdict else None,
            drop_low=verdict.low if verdict else None,
            drop_high=verdict.high if verdict else None,
            low_macs=1 - cost.share(graph, "fp32"),
            size_bytes=graph.ByteSize(),
            cost_ms=1e3 * cost.seconds(graph, self.machine),
            within=verdict is not None and verdict.within,
        )
        self.trials.append(trial)
        self.progress.say(f"search {self.name}: {told(trial)}")
        return trial.within

    def _noise(self, graph: onnx.ModelProto) -> float:
        self.evaluations += len(self.answers) / self.effort.samples
        return self.answers.noise(graph)

    def _sensitivities(self, now: Lowerable, groups: Sequence[splice.Group]) -> list[float]:
        self.evaluations += len(groups) * len(self.answers) / self.effort.samples
        with self.progress.bar(f"asking {len(groups)} layers of {self.name}") as step:
            return sensitivities(self.answers, now.base, now.alone(), groups, step)

    def _macs(self, now: Lowerable, groups: Sequence[splice.Group]) -> list[float]:
        counted = cost.macs(now.base)
        total = max(sum(counted.values()), 1)
        return [sum(counted[name] for name in group) / total for group in groups]

    def _layers(
        self,
        groups: Sequence[splice.Group],
        noise: Sequence[float],
        macs: Sequence[float],
    ) -> tuple[LayerCost, ...]:
        """Most harmful first."""
        found = [
            LayerCost(
                layers=group,
                noise=noise[number] if math.isfinite(noise[number]) else None,
                macs=macs[number],
                kept=False,
            )
            for number, group in enumerate(groups)
        ]
        return tuple(
            sorted(found, key=lambda layer: math.inf if layer.noise is None else layer.noise, reverse=True)
        )

    def _out_of_reach(self) -> str:
        closest = min(self.trials, key=lambda t: math.inf if t.drop_high is None else t.drop_high)
        return (
            f"no {self.name} graph keeps the budget on the validation samples; the closest of {len(self.trials)} tried is "
            f"{told(closest)}; raise gates.max_drop, allow more layers in FP32 (search.least), or use a higher precision"
        )


def told(trial: SearchTrial) -> str:
    """One line of the search's record."""
    layers = f"{trial.step}: " if not trial.kept else f"{len(trial.kept)} {trial.step}: "
    if trial.drop is None or trial.drop_high is None:
        return f"{layers}its outputs are not finite"
    return (
        f"{layers}drop {trial.drop:.4g}, at worst {trial.drop_high:.4g}{'' if trial.within else ' (over the budget)'}, "
        f"{trial.low_macs:.0%} of the operations in low precision"
    )


def _affordable(noise: Sequence[float], macs: Sequence[float], share: float) -> list[int]:
    """Groups by noise, the largest first, as long as their operations together are within `share`; others are passed over."""
    order, spent = [], 0.0
    for group in sorted(range(len(noise)), key=noise.__getitem__, reverse=True):
        if spent + macs[group] <= share:
            order.append(group)
            spent += macs[group]
    return order


def _marked(layers: Sequence[LayerCost], kept: Collection[str]) -> tuple[LayerCost, ...]:
    return tuple(layer.model_copy(update={"kept": layer.layers[0] in kept}) for layer in layers)


def _members(groups: Sequence[splice.Group], chosen: Collection[int]) -> tuple[str, ...]:
    return tuple(name for number in sorted(chosen) for name in groups[number])
