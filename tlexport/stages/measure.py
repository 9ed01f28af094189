"""measure: one variant of a run or a bundle, timed as its clients see it: in turns, at an arrival rate, at its capacity.

Nothing is written into the run or the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from tlexport import cores, tensors
from tlexport.backends import Bound, Options, Runner, Tensors, registry
from tlexport.bundle import choice, golden, manifest, preflight
from tlexport.bundle.preflight import NOBODY, Trust
from tlexport.errors import BundleError, RecipeError
from tlexport.evidence import machine
from tlexport.evidence.latency import capacity, closed_loop, limits, open_loop
from tlexport.evidence.latency.watch import Watcher
from tlexport.graph import inspect, trace
from tlexport.progress import Progress
from tlexport.results import BenchResult, MeasureResult, Variant
from tlexport.run import Run, read_json, replacing, write_json
from tlexport.timings import CurvePoint, LargestRate, Memory, OpenLoop, Percentile, Watch

POINT_S = 1.0  # of one point of the curve
PARTS_CALLS = 50
SETTLE = 10  # calls before an open loop


@dataclass(frozen=True)
class Subject:
    """A variant that can be loaded here, and samples to ask it."""

    path: Path
    model: str  # the recipe's name
    variant: Variant
    artifact: Path
    options: Options
    largest: int  # batch that its profile allows
    max_p99_ms: float | None  # the recipe's gate
    batch: Callable[[int], Tensors]  # samples -> input name -> contiguous array [samples, ...]
    load: Callable[[int], AbstractContextManager[Runner]]  # threads -> the artifact, loaded

    @property
    def name(self) -> str:
        return self.variant.name


class Ask(BaseModel):
    """What is to be measured beside the closed loop."""

    model_config = ConfigDict(frozen=True)

    rate: float | None = Field(None, gt=0, description="requests a second: an open loop")
    seconds: float = Field(10.0, gt=0, description="of an open loop, and at most of the closed one")
    arrivals: open_loop.Arrivals = "poisson"
    concurrency: int = Field(1, ge=1, description="workers, each with the artifact loaded for itself")
    max_p99_ms: float | None = Field(None, gt=0)
    batches: tuple[int, ...] = Field((), description="sizes of the throughput curve; empty: none is measured")
    samples: int = Field(2000, ge=1, description="of the closed loop")
    threads: int | None = Field(
        None, ge=1, description="of a worker; default: as the variant was timed, if there are so many"
    )
    seed: int = Field(0, ge=0)
    out: Path | None = Field(None, description="JSON file; every timed call goes beside it")


def subject(path: Path, target: str | None, trust: Trust = NOBODY) -> Subject:
    """The variant that `target` (default: the CPU, or the only one) got in a bundle or a finished run.

    A bundle goes through preflight before anything is loaded, and its golden samples are asked; of a run it is the test split.
    Raises PreflightError if a bundle may not be trusted or cannot run here, BundleError if `path` is neither, RecipeError for
    a target it does not hold, GateError if none passes in a run, NotInstalledError or CompileError if the variant of a run
    cannot run here.
    """
    if (path / "recipe.yaml").is_file() and not manifest.stands_in(path):
        return _of_run(Run(path), target)
    if (path / manifest.NAME).is_file():
        return _of_bundle(path, target, trust)
    raise BundleError(f"{path} is neither a bundle (manifest.json) nor a run (recipe.yaml)")


def _of_bundle(bundle: Path, target: str | None, trust: Trust) -> Subject:
    document, chosen = preflight.for_target(bundle, target, trust=trust)
    entry = document.targets[chosen]
    names = tuple(spec.name for spec in document.inputs)
    artifact, options = bundle / entry.file, Options(cuda_graphs=True)
    return Subject(
        path=bundle,
        model=document.name,
        variant=entry.variant,
        artifact=artifact,
        options=options,
        largest=document.batch.max,
        max_p99_ms=document.gates.get("max_p99_ms"),
        batch=partial(tensors.first, bundle / golden.INPUTS, names),
        load=registry.loader(entry.variant.backend, artifact, entry.variant.target, options),
    )


def _of_run(run: Run, target: str | None) -> Subject:
    measured = BenchResult.model_validate(read_json(run.require("bench.json", "bench")))
    held = list(dict.fromkeys(variant.target for variant in measured.variants))
    wanted = target or ("cpu" if "cpu" in held else held[0])
    variant = choice.choose(wanted, measured.variants).variant
    assert variant.file is not None
    names = tuple(spec.name for spec in inspect.io(trace.load(run.require("graphs/fp32.onnx", "export")))[0])
    artifact, options = (
        run / variant.file,
        Options(run.recipe.tensorrt.placed(run / "cache"), cuda_graphs=run.recipe.bench.cuda_graphs),
    )
    return Subject(
        path=run.path,
        model=run.recipe.name,
        variant=variant,
        artifact=artifact,
        options=options,
        largest=run.recipe.export.batch.max,
        max_p99_ms=run.recipe.gates.max_p99_ms,
        batch=partial(tensors.first, run.require("reference/inputs.npy", "finetune"), names),
        load=registry.loader(variant.backend, artifact, variant.target, options),
    )


def run(subject: Subject, ask: Ask, progress: Progress) -> MeasureResult:
    """Closed loop always; open loop, largest rate and throughput curve where `ask` names them.

    Raises RecipeError for a batch beyond the variant's profile, and what loading the variant raises.
    """
    _check(subject, ask)
    threads = ask.threads or _fitting(subject.variant.threads, ask.concurrency)
    memory = registry.memory(
        subject.variant.backend, subject.artifact, subject.batch(max(ask.batches, default=1)),
        target=subject.variant.target, threads=threads, options=subject.options,
    )  # fmt: skip
    with ExitStack() as stack:
        runners = [stack.enter_context(subject.load(threads)) for _ in range(ask.concurrency)]
        with Watcher() as watcher:
            asked = _Asked(subject, ask, runners, progress, watcher)
            closed = asked.closed()
            found = _Found(
                provider=runners[0].provider,
                threads=threads,
                memory=memory,
                closed=closed,
                parts=asked.parts(),
                curve=asked.curve(),
                served=asked.open(),
                largest=asked.largest(closed),
            )
    result = _result(subject, ask, found, watcher.record())
    if ask.out:
        _write(ask.out, result, closed, found.served)
    return result


@dataclass(frozen=True)
class _Found:
    """What was measured; None where it was not asked for or cannot be told."""

    provider: str
    threads: int
    memory: Memory
    closed: closed_loop.Timed
    parts: dict[str, float] | None
    curve: tuple[CurvePoint, ...]
    served: open_loop.Served | None
    largest: LargestRate | None


def _result(subject: Subject, ask: Ask, found: _Found, watch: Watch) -> MeasureResult:
    latency = closed_loop.summary(found.closed["it"])
    opened = open_loop.summary(found.served, ask.arrivals, ask.rate) if found.served and ask.rate else None
    limit = ask.max_p99_ms if ask.max_p99_ms is not None else subject.max_p99_ms
    verdict, reason = _verdict(limit, latency.p99, ask, found)
    alone = {point.batch: point.items_per_s for point in found.curve if point.concurrency == 1}
    smallest = min(alone, default=1)
    workers = {point.concurrency: point.items_per_s for point in found.curve if point.batch == smallest}
    return MeasureResult(
        path=str(subject.path),
        model=subject.model,
        variant=subject.name,
        backend=subject.variant.backend,
        target=subject.variant.target,
        precision=subject.variant.precision,
        provider=found.provider,
        threads=found.threads,
        concurrency=ask.concurrency,
        closed=latency,
        calls_per_sample=found.closed.calls_per_sample["it"],
        unsettled=bool(found.closed.unsettled),
        parts_ms=found.parts,
        open=opened,
        largest=found.largest,
        curve=found.curve,
        knee_batch=capacity.knee(alone) if len(alone) > 1 else None,
        knee_concurrency=capacity.knee(workers) if len(workers) > 1 else None,
        memory=found.memory,
        machine=machine.describe().model_dump(mode="json"),
        watch=watch,
        limit_ms=limit,
        verdict=verdict,
        reason=reason,
        notes=_notes(subject, found.closed, latency.drift, opened, watch.warnings),
        raw=str(ask.out.with_suffix(".npz")) if ask.out else None,
    )


class _Asked:
    """One subject, loaded once for each worker, asked in several ways one after the other."""

    def __init__(
        self, subject: Subject, ask: Ask, runners: Sequence[Runner], progress: Progress, watcher: Watcher
    ) -> None:
        self.subject, self.ask, self.runners = subject, ask, runners
        self.progress, self.watcher = progress, watcher

    def bound(self, workers: int, size: int) -> list[Bound]:
        """A binding of `size` samples for each worker; it holds until the next one of that worker."""
        inputs = self.subject.batch(size)
        return [runner.bind(inputs) for runner in self.runners[:workers]]

    def closed(self) -> closed_loop.Timed:
        (one,) = self.bound(1, 1)
        if one.note:
            self.progress.say(f"{self.subject.name}: {one.note}")
        with self.progress.bar("closed loop", still=True) as step:

            def between(done: int, total: int) -> None:
                step(done, total)
                self.watcher.look()

            return closed_loop.interleave(
                {"it": one.call},
                samples=self.ask.samples,
                seed=self.ask.seed,
                progress=between,
                schedule=closed_loop.Schedule(budget_s=self.ask.seconds),
            )

    def parts(self) -> dict[str, float] | None:
        """Median milliseconds of each part of a call; None where the backend cannot tell them apart."""
        (one,) = self.bound(1, 1)
        if one.timed_parts is None:
            return None
        calls = [one.timed_parts() for _ in range(PARTS_CALLS)]
        return {name: float(np.median([call[name] for call in calls])) for name in calls[0]}

    def curve(self) -> tuple[CurvePoint, ...]:
        """Every batch size with 1, 2, 4 ... workers."""
        workers = [count for count in (2**power for power in range(16)) if count < self.ask.concurrency]
        grid = [(size, count) for size in self.ask.batches for count in (*workers, self.ask.concurrency)]
        points = []
        with self.progress.bar("throughput", still=True) as step:
            for done, (size, count) in enumerate(grid, start=1):
                calls = [bound.call for bound in self.bound(count, size)]
                points.append(capacity.saturated(calls, size, POINT_S))
                self.watcher.look()
                step(done, len(grid))
        return tuple(points)

    def open(self) -> open_loop.Served | None:
        if self.ask.rate is None:
            return None
        # Nothing is drawn meanwhile: it would be timed, too.
        self.progress.say(f"open loop: {self.ask.rate:g}/s for {self.ask.seconds:g} s")
        return self._ask(self.ask.rate, self.ask.seconds, self.ask.seed)

    def largest(self, closed: closed_loop.Timed) -> LargestRate | None:
        """Only where a limit was given and no rate; a recipe's gate alone asks for no search."""
        if self.ask.max_p99_ms is None or self.ask.rate is not None:
            return None
        with self.progress.bar("largest rate", still=True) as step:
            return capacity.largest_rate(
                self._ask,
                self.ask.max_p99_ms,
                service_s=float(np.median(closed["it"])),
                workers=self.ask.concurrency,
                seed=self.ask.seed,
                least_s=min(2.0, self.ask.seconds),
                most_s=self.ask.seconds,
                progress=lambda done, doing: step(100 * done, 100, doing),
            )

    def _ask(self, rate: float, seconds: float, seed: int) -> open_loop.Served:
        calls = [bound.call for bound in self.bound(self.ask.concurrency, 1)]
        for call in calls * SETTLE:
            call()
        served = open_loop.run(calls, open_loop.schedule(rate, seconds, self.ask.arrivals, seed))
        self.watcher.look()
        return served


def _check(subject: Subject, ask: Ask) -> None:
    if ask.batches and max(ask.batches) > subject.largest:
        raise RecipeError(
            f"batch {max(ask.batches)} is beyond the variant's largest, {subject.largest} (export.batch.max); "
            "leave it out, or build with a larger one"
        )
    if ask.rate is not None and round(ask.rate * ask.seconds) < 1:
        raise RecipeError(f"{ask.rate:g}/s for {ask.seconds:g} s is not one request; ask for more --seconds")


def _fitting(threads: int | None, workers: int) -> int:
    """Threads of a worker: as the variant was timed, but no more than the cores there are for each."""
    return max(1, min(threads or cores.usable(), cores.usable() // workers))


def _verdict(
    limit: float | None, closed: Percentile, ask: Ask, found: _Found
) -> tuple[Literal["pass", "fail", "undecided"] | None, str]:
    """Whether the p99 is within the limit: of the open loop if there was one, else of the closed one and at some rate."""
    if limit is None:
        return None, ""
    if found.served is not None and ask.rate is not None:
        probe = capacity.judged(found.served, ask.rate, ask.seconds, limit)
        p99, on = probe.p99, probe.verdict
        reason = f"at {ask.rate:g}/s: {probe.reason}, limit {limit:g} ms"
    else:
        p99, on = closed, limits.side(closed, limit)
        reason = f"in a closed loop: {limits.told(closed)}, limit {limit:g} ms"
    if on == "over":
        return "fail", reason
    if on == "undecided":
        return "undecided", f"{reason}: undecided, {limits.needs(p99, limit)}"
    if found.largest is not None and found.largest.rate_per_s is None:
        slowest = min(found.largest.probes, key=lambda probe: probe.rate_per_s)
        return "fail" if slowest.verdict == "over" else "undecided", found.largest.note
    return "pass", reason


def _notes(
    subject: Subject, closed: closed_loop.Timed, drift: str, opened: OpenLoop | None, warnings: Sequence[str]
) -> tuple[str, ...]:
    """How the times came about, and what to doubt."""
    several = closed.calls_per_sample["it"]
    said = [
        f"the session was timed: {registry.get(subject.variant.backend).BOUND}",
        f"closed-loop percentiles are of means of {several} calls, since reading the clock takes {closed.clock_ns:.0f} ns"
        if several > 1
        else "",
        "not settled when the warm-up's time was up" if closed.unsettled else "",
        f"closed loop: {drift}" if drift else "",
        *((opened.generator, opened.overload) if opened else ()),
        f"open loop: {opened.service.drift}" if opened and opened.service.drift else "",
        *warnings,
    ]
    return tuple(text for text in said if text)


def _write(
    out: Path, result: MeasureResult, closed: closed_loop.Timed, served: open_loop.Served | None
) -> None:
    """The result as JSON, and every timed call in seconds beside it."""
    raw: dict[str, Any] = {"closed": closed["it"], "closed_started": closed.started["it"]}
    if served is not None:
        raw |= {
            "open_scheduled": served.scheduled,
            "open_started": served.started,
            "open_done": served.done,
            "open_unserved": served.waiting,
        }
    with replacing(out.with_suffix(".npz")) as beside, beside.open("wb") as handle:
        np.savez(handle, allow_pickle=False, **raw)
    write_json(out, json.loads(result.model_dump_json()))
