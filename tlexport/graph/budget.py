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
NEGLIGIBLE = 1e-4  # of the scores' variance (40 dB): where decisions are lost to that, verify still says so


class Verdict(NamedTuple):
    """A graph's drop of the metric with its interval, and whether the unfavourable end is within the budget."""

    drop: float
    low: float
    high: float
    within: bool


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


L = TypeVar("L", bound=Lowerable)


@dataclass(frozen=True)
class Cast:
    """A typed graph that is made from the FP32 one in one step."""

    base: onnx.ModelProto
    makes: Callable[[Collection[str]], onnx.ModelProto]

    def make(self, kept: Collection[str]) -> onnx.ModelProto:
        return self.makes(kept)


@dataclass(frozen=True)
class Improvement(Generic[L]):
    """A better quantisation, described in words. `of` raises ExportError where it has nothing to work on."""

    words: str
    of: Callable[[L], L]


@dataclass(frozen=True)
class Effort:
    """`samples` is how many judge a graph, the unit of one evaluation; `report` asks every layer in any case."""

    samples: int
    evaluations: int
    report: bool


@dataclass(frozen=True)
class Found:
    """`kept` are the layers left in FP32, `layers` what each group costs: empty where that was not asked."""

    graph: onnx.ModelProto
    base: onnx.ModelProto
    kept: tuple[str, ...] = ()
    layers: tuple[LayerCost, ...] = ()


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

    def fastest(self, plain: L, rounds: Sequence[Sequence[Improvement[L]]]) -> Found:
        """The first graph that keeps the budget; a later round of improvements is for what the earlier ones do not mend.

        Raises GateError naming the closest one where none does.
        """
        now, graph = plain, plain.make(())
        noise = self._noise(graph)
        if noise < NEGLIGIBLE or self._keeps(graph, "plain", ()):
            return self._with_report(now, graph)
        for improvements in rounds:
            better, left, words = self._improved(now, noise, improvements)
            if not words:
                continue
            now, noise, graph = better, left, better.make(())
            if self._keeps(graph, words, ()):
                return self._with_report(now, graph)
        return self._promoted(now, graph)

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
        noise = self._sensitivities(now, graph, groups)
        order = sorted(range(len(groups)), key=noise.__getitem__, reverse=True)
        macs = self._macs(now, groups)

        def keeps(promoted: frozenset[int]) -> bool:
            kept = _members(groups, promoted)
            return self._keeps(now.make(kept), "layers left in FP32", kept)

        left = max(1, int(self.effort.evaluations - self.evaluations))
        found = search.fewest_promotions(order, keeps, evaluations=left, gain=macs)
        if found.groups is None:
            raise GateError(self._out_of_reach())
        kept = _members(groups, found.groups)
        return Found(now.make(kept), now.base, kept, self._layers(groups, noise, macs, kept))

    def _with_report(self, now: Lowerable, graph: onnx.ModelProto) -> Found:
        """The graph as it is; with `report`, what each layer costs beside it."""
        if not self.effort.report:
            return Found(graph, now.base)
        groups = splice.groups(now.base, graph)
        noise = self._sensitivities(now, graph, groups)
        return Found(graph, now.base, (), self._layers(groups, noise, self._macs(now, groups), ()))

    def _keeps(self, graph: onnx.ModelProto, step: str, kept: tuple[str, ...]) -> bool:
        """Whether the graph keeps the budget; the trial is written down."""
        verdict = self.judge(graph)
        self.evaluations += 1
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

    def _sensitivities(
        self, now: Lowerable, graph: onnx.ModelProto, groups: Sequence[splice.Group]
    ) -> list[float]:
        self.evaluations += len(groups) * len(self.answers) / self.effort.samples
        with self.progress.bar(f"asking {len(groups)} layers of {self.name}") as step:
            return sensitivities(self.answers, now.base, graph, groups, step)

    def _macs(self, now: Lowerable, groups: Sequence[splice.Group]) -> list[float]:
        counted = cost.macs(now.base)
        total = max(sum(counted.values()), 1)
        return [sum(counted[name] for name in group) / total for group in groups]

    def _layers(
        self,
        groups: Sequence[splice.Group],
        noise: Sequence[float],
        macs: Sequence[float],
        kept: Collection[str],
    ) -> tuple[LayerCost, ...]:
        """Most harmful first."""
        found = [
            LayerCost(
                layers=group,
                noise=noise[number] if math.isfinite(noise[number]) else None,
                macs=macs[number],
                kept=group[0] in kept,
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
            f"{told(closest)}; raise gates.max_drop, or use a higher precision"
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


def _members(groups: Sequence[splice.Group], chosen: Collection[int]) -> tuple[str, ...]:
    return tuple(name for number in sorted(chosen) for name in groups[number])
