"""How far a build is: TensorRT's nested phases as one share of the whole."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """The phases that are open. A phase fills the step of its parent that is under way.

    TensorRT announces neither which phases will come nor how long a step takes, so the share is rough; it never
    falls. `report` is called with the innermost phase and the share whenever a phase of a new name begins and
    whenever the share has gained a whole hundredth: some builds have ten thousand steps.
    """

    def __init__(self, report: Callable[[str, float], None]) -> None:
        self._report = report
        self._open: dict[str, _Phase] = {}
        self._named: set[str] = set()
        self._told = 0.0
        self._lock = threading.Lock()  # TensorRT calls from several threads

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._open[name] = _Phase(parent, max(steps, 1))
            self._tell(name)

    def step(self, name: str, index: int) -> None:
        """Step `index`, counted from 0, is complete."""
        with self._lock:
            if name in self._open:
                self._open[name].done = index + 1
                self._tell(name)

    def finish(self, name: str) -> None:
        with self._lock:
            self._open.pop(name, None)

    def _tell(self, name: str) -> None:
        share = max((self._share(top) for top, phase in self._open.items() if not phase.parent), default=0.0)
        if name not in self._named or int(share * 100) > int(self._told * 100):
            self._named.add(name)
            self._told = max(self._told, share)
            self._report(name, self._told)

    def _share(self, name: str) -> float:
        phase = self._open[name]
        within = max((self._share(n) for n, inner in self._open.items() if inner.parent == name), default=0.0)
        return min((phase.done + within) / phase.steps, 1.0)


def monitor(trt: Any, report: Callable[[str, float], None]) -> Any:
    """An IProgressMonitor that keeps `Phases`. Whoever builds with it must hold it until the build is over."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases = Phases(report)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self.phases.step(phase_name, step)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self.phases.finish(phase_name)

    return Monitor()
