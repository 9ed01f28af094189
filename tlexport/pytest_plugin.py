"""A pytest fixture that gates a project's own models: installed with tlexport, nothing heavy is imported before it is used.

    def test_latency(tlexport_gate):
        tlexport_gate.latency("bundles/cxr")                             # against --tlexport-baseline's file
        tlexport_gate.latency("bundles/cxr", against="bundles/released") # side by side

    def test_accuracy(tlexport_gate):
        tlexport_gate.accuracy("runs/cxr", against="runs/released")

A gate that fails and one that cannot be decided both fail the test, with the one-line reason: neither may pass unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from tlexport.errors import TlexportError
    from tlexport.results import GateResult, ReplayResult

T = TypeVar("T")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tlexport", "gates of models (fixture tlexport_gate)")
    group.addoption(
        "--tlexport-baseline",
        metavar="FILE",
        default=None,
        help="file of baselines, .json or .sqlite; default .tlexport/baselines.sqlite",
    )
    group.addoption(
        "--tlexport-tolerance",
        type=float,
        metavar="SHARE",
        default=None,
        help="share by which a build may be slower; default 0.05",
    )
    group.addoption(
        "--tlexport-seconds",
        type=float,
        metavar="S",
        default=None,
        help="seconds that a latency gate measures; default 30",
    )


@pytest.fixture(scope="session")
def tlexport_gate(pytestconfig: pytest.Config) -> Gate:
    """Gates for this project's models; see `Gate`."""
    return Gate(
        baseline=pytestconfig.getoption("--tlexport-baseline"),
        tolerance=pytestconfig.getoption("--tlexport-tolerance"),
        seconds=pytestconfig.getoption("--tlexport-seconds"),
    )


class Gate:
    """Each method fails the test with the gate's reason, or returns what was measured."""

    def __init__(self, *, baseline: str | None, tolerance: float | None, seconds: float | None) -> None:
        self.baseline = Path(baseline) if baseline else None
        self.tolerance = tolerance
        self.seconds = seconds

    def latency(
        self,
        path: str | Path,
        *,
        against: str | Path | None = None,
        target: str | None = None,
        tolerance: float | None = None,
    ) -> GateResult:
        """What `target` got in a run or bundle is not slower than in `against`, or than the stored baseline."""
        from tlexport import flow
        from tlexport.progress import Silent

        return _passed(
            lambda: flow.latency_gate(
                Path(path),
                Silent(),
                against=Path(against) if against else None,
                baseline=None if against else self.baseline,
                target=target,
                tolerance=self.tolerance if tolerance is None else tolerance,
                seconds=self.seconds,
            )
        )

    def accuracy(self, run: str | Path, *, against: str | Path, tolerance: float | None = None) -> GateResult:
        """What a run's targets got is no less accurate than in the run `against`, on the test split that both share."""
        from tlexport.stages import gate_accuracy

        return _passed(lambda: gate_accuracy.beside(Path(run), Path(against), tolerance=tolerance))

    def bundle(self, path: str | Path) -> ReplayResult:
        """The bundle is whole and unaltered, and what runs here answers its golden samples as the reference did."""
        from tlexport.progress import Silent
        from tlexport.stages import replay

        result = _passing(lambda: replay.run(Path(path), Silent()))
        _failed(replay.failure(result))
        return result


def _passing(measure: Callable[[], T]) -> T:
    """What `measure` returns; its errors are the test's, in one line."""
    from tlexport.errors import TlexportError

    try:
        return measure()
    except TlexportError as error:
        _failed(error)
        raise


def _passed(measure: Callable[[], GateResult]) -> GateResult:
    from tlexport.stages import gate

    result = _passing(measure)
    _failed(gate.failure(result))
    return result


def _failed(error: TlexportError | None) -> None:
    if error:
        pytest.fail(f"{type(error).__name__}: {error}", pytrace=False)
