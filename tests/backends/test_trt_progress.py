"""Progress of a build: TensorRT's nested phases as one share, and the real reports of TensorRT-RTX."""

from __future__ import annotations

import threading

import pytest

from tlexport.backends import Options, registry, trt
from tlexport.backends.trt_progress import Phases
from tlexport.errors import CompileError
from tlexport.tensors import Profile

needs_rtx = pytest.mark.skipif(not trt.RTX.availability().installed, reason="tensorrt-rtx is not installed")


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[tuple[str, float]] = []

    def __call__(self, phase: str, share: float) -> None:
        self.reports.append((phase, share))

    @property
    def shares(self) -> list[float]:
        return [share for _, share in self.reports]


@needs_rtx
def test_a_real_build_reports_its_phases_and_goes_to_the_end(graphs, tmp_path) -> None:
    heard = Heard()
    registry.build(
        *("tensorrt_rtx", graphs.paths["fp16"], tmp_path / "m.engine", "sm89", Profile(max=8), {}),
        options=Options(report=heard),
    )
    assert heard.reports[0] == ("reading the graph", 0.0)
    assert heard.shares == sorted(heard.shares) and 0.5 < heard.shares[-2] < 1
    assert heard.reports[-1] == ("reading the log", 1.0)
    assert len({phase for phase, _ in heard.reports}) > 4 and len(heard.reports) < 150


@needs_rtx
def test_a_build_that_is_refused_has_reported_where_it_stood(graphs, tmp_path) -> None:
    heard = Heard()
    with pytest.raises(CompileError, match="FP32 GEMM"):
        registry.build(
            *("tensorrt_rtx", graphs.paths["fp32"], tmp_path / "m.engine", "sm75", Profile(max=8), {}),
            options=Options(report=heard),
        )
    assert heard.reports and heard.shares[-1] < 1


def test_a_phase_fills_the_step_of_its_parent() -> None:
    heard = Heard()
    phases = Phases(heard)
    phases.start("build", None, 4)
    phases.step("build", 0)
    phases.start("time", "build", 2)
    phases.start("one kernel", "time", 5)
    phases.step("one kernel", 4)
    phases.finish("one kernel")
    phases.step("time", 0)
    phases.step("time", 1)
    phases.finish("time")
    phases.step("build", 1)
    phases.finish("build")
    assert heard.reports == [
        ("build", 0.0),
        ("build", 0.25),
        ("time", 0.25),
        ("one kernel", 0.25),
        ("one kernel", 0.375),
        ("time", 0.5),
    ]


def test_the_share_never_falls_and_ten_thousand_steps_are_a_hundred_reports() -> None:
    """A second phase of the same step begins again at nothing, and so does a second whole build."""
    heard = Heard()
    phases = Phases(heard)
    for top in ("first build", "second build"):
        phases.start(top, None, 2)
        for inner in ("a", "b"):
            phases.start(inner, top, 10_000)
            for index in range(10_000):
                phases.step(inner, index)
            phases.finish(inner)
        phases.step(top, 0)
        phases.step(top, 1)
        phases.finish(top)
    assert heard.shares == sorted(heard.shares) and heard.shares[-1] == 1
    assert 50 < len(heard.reports) <= 110


def test_phases_from_threads_and_of_unknown_names_do_no_harm() -> None:
    heard = Heard()
    phases = Phases(heard)
    phases.start("build", None, 0)  # a library that breaks its word: at least one step is promised
    phases.step("nobody", 3)
    phases.finish("nobody")

    def work(name: str) -> None:
        phases.start(name, "build", 500)
        for index in range(500):
            phases.step(name, index)
        phases.finish(name)

    threads = [threading.Thread(target=work, args=(f"branch {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard.shares == sorted(heard.shares) and heard.shares[-1] == 1
    assert {"build", "branch 0", "branch 1", "branch 2", "branch 3"} == {phase for phase, _ in heard.reports}
