"""What the gate measures: rounds of two builds in one process, or sessions, each a process of its own.

`rounds` and `session` run in a child process, which gets all it needs by pickling: a build's `load` must be picklable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from tlexport.evidence.gate.rule import Session
from tlexport.evidence.latency.closed_loop import Call, Schedule, interleave

FEWEST_ROUNDS, MOST_ROUNDS = 8, 40
SHARE = 32  # of the time for all rounds, what one of them may take
# What a candidate gets at most: few, since a round counts once and a session counts once, however many calls it made.
ROUND_SAMPLES, SESSION_SAMPLES = 80, 400
QUICK = Schedule(block=10, settle=2, settle_s=0.001, warmup_s=0.03, drop_ratio=None)
SLOW = Schedule(block=4, settle=1, settle_s=0.0, warmup_s=0.03, drop_ratio=None)
SLOW_S = 0.005  # a call that takes longer
CONTROL_VALUES = 4096
CONTROL = "control"


class Bound(Protocol):
    @property
    def call(self) -> Call: ...


class Runner(Protocol):
    def bind(self, inputs: Mapping[str, np.ndarray]) -> Bound: ...


@dataclass(frozen=True)
class Build:
    """An artifact that can be loaded in another process, and how it is asked there."""

    model: str
    variant: str
    sha256: str
    threads: int
    batch: int
    load: Callable[[int], AbstractContextManager[Any]]  # threads -> Runner
    inputs: Callable[[int], Mapping[str, np.ndarray]]  # batch -> what it is asked

    @property
    def name(self) -> str:
        return f"{self.model} {self.variant} at batch {self.batch}"

    def open(self, stack: ExitStack, inputs: Mapping[str, np.ndarray]) -> Call:
        runner: Runner = stack.enter_context(self.load(self.threads))
        return runner.bind(inputs).call


def rounds(
    old: Build, new: Build, seconds: float, seed: int, report: Callable[[str, float], None]
) -> tuple[list[float], list[float]]:
    """Medians in seconds of each round, old and new: in every one both are loaded anew, in random order, and take turns.

    Two instances of one file differ in where their memory lies, by half a percent for a small graph: within one instance that is
    not seen as noise. `seconds` limits all rounds together, loading included, but for the fewest that a verdict needs.
    """
    rng = np.random.default_rng(seed)
    asked = {"old": old.inputs(old.batch), "new": new.inputs(new.batch)}
    builds = {"old": old, "new": new}
    found: dict[str, list[float]] = {"old": [], "new": []}
    began = time.perf_counter()
    longest = 0.0
    while (done := len(found["old"])) < FEWEST_ROUNDS or (
        done < MOST_ROUNDS and time.perf_counter() - began + longest <= seconds
    ):
        started = time.perf_counter()
        with ExitStack() as stack:
            order = rng.permutation(list(builds))
            calls = {side: builds[side].open(stack, asked[side]) for side in order}
            for side, median in medians(
                calls, ROUND_SAMPLES, seconds / SHARE, int(rng.integers(2**31))
            ).items():
                found[side].append(median)
        longest = max(longest, time.perf_counter() - started)
        report("rounds", min(1.0, (time.perf_counter() - began) / seconds))
    return found["old"], found["new"]


def session(build: Build, seconds: float, seed: int) -> Session:
    """One session: the build, loaded here, and the control take turns for about `seconds`."""
    with ExitStack() as stack:
        calls = {"build": build.open(stack, build.inputs(build.batch)), CONTROL: control()}
        found = medians(calls, SESSION_SAMPLES, seconds, seed)
    return Session(seconds=found["build"], control=found[CONTROL])


def control() -> Call:
    """The fixed workload: 4096 exponentials, as fast as one core is just now, whatever libraries are installed for models.

    It stays in the first-level cache. A model's kernels are vector arithmetic of the same kind; one that waits for memory
    does not share its ups and downs, which the rule finds out by itself (`rule.adjusted`).
    """
    values = np.random.default_rng(0).normal(size=CONTROL_VALUES).astype(np.float32)
    out = np.empty_like(values)

    def call() -> None:
        np.exp(values, out=out)

    return call


def medians(calls: Mapping[str, Call], samples: int, seconds: float, seed: int) -> dict[str, float]:
    """Median seconds of a call of each, timed in turns for at most about `seconds` after a short warm-up."""
    slow = False
    for call in calls.values():
        call()  # may compile
        started = time.perf_counter()
        call()
        slow |= time.perf_counter() - started > SLOW_S
    schedule = (SLOW if slow else QUICK).model_copy(update={"budget_s": max(seconds, 1e-3)})
    timed = interleave(calls, samples=samples, seed=seed, schedule=schedule)
    return {name: float(np.median(times)) for name, times in timed.items()}
