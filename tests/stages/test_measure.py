"""measure: a bundle or run timed as its clients see it, on a real bundle and with planted faults."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from pipeline import Built, Ended

from tlexport.backends import Bound
from tlexport.errors import BundleError, RecipeError
from tlexport.evidence.latency import histogram
from tlexport.progress import Silent
from tlexport.results import MeasureResult
from tlexport.run import Run
from tlexport.stages import measure
from tlexport.stages.measure import Ask, Subject

Cli = Callable[..., Ended]


@pytest.fixture
def subject(built: Built) -> Subject:
    return measure.subject(built.bundle, "cpu")


def answered_by(subject: Subject, call: Callable[[], object]) -> Subject:
    """The subject with its every call replaced: a fault that no real model shows on demand."""

    class Planted:
        provider = "planted"

        def bind(self, inputs: object) -> Bound:
            return Bound(call, dict)

    @contextmanager
    def load(threads: int) -> Iterator[Planted]:
        yield Planted()

    return replace(subject, load=load)  # type: ignore[arg-type]


def test_a_bundle_is_timed_in_all_ways_and_written(subject: Subject, tmp_path: Path) -> None:
    ask = Ask(rate=100, seconds=1.0, batches=(1, 2, 4), concurrency=2, samples=320, out=tmp_path / "m.json")
    before = sorted(path.name for path in subject.path.rglob("*"))
    found = measure.run(subject, ask, Silent())
    assert found.closed.count <= 320 and found.closed.p50.value_ms > 0
    assert found.open.requests == 100 and found.open.workers == 2 and found.open.arrivals == "poisson"
    assert found.open.latency.min_ms >= 0 and histogram.decode(found.open.latency.histogram)[1].sum() == 100
    assert found.open.latency.p50.value_ms is not None and found.open.latency.p99.value_ms is None, (
        "100 are too few"
    )
    grid = [(point.batch, point.concurrency) for point in found.curve]
    assert grid == [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)]
    assert found.knee_batch.at in (1, 2, 4) and found.knee_concurrency.at in (1, 2)
    assert found.parts_ms is None and found.largest is None and found.verdict is None
    assert found.watch.readings >= 2 and found.machine["usable_cores"] >= 1 and found.memory is not None
    assert MeasureResult.model_validate_json((tmp_path / "m.json").read_text()) == found
    with np.load(tmp_path / "m.npz", allow_pickle=False) as raw:
        latency = raw["open_done"] - raw["open_scheduled"]
        assert len(raw["open_scheduled"]) + len(raw["open_unserved"]) == 100
        assert 1e3 * latency.max() == pytest.approx(found.open.latency.max_ms) or found.open.unserved
        assert len(raw["closed"]) == found.closed.count
    assert sorted(path.name for path in subject.path.rglob("*")) == before, "nothing is written into a bundle"


def test_a_run_and_its_bundle_hold_the_same_subject(built: Built) -> None:
    of_run, of_bundle = measure.subject(built.run, None), measure.subject(built.bundle, None)
    assert of_run.name == of_bundle.name and of_run.largest == of_bundle.largest == 4
    assert of_run.artifact.read_bytes() == of_bundle.artifact.read_bytes()
    with pytest.raises(BundleError, match="neither a bundle"):
        measure.subject(built.run / "graphs", None)


def test_a_stall_shows_in_the_open_loop_and_not_in_the_closed_one(subject: Subject) -> None:
    """One call of 0.4 s among calls of 1 ms, once in each loop: at 100/s forty requests of 400 are due meanwhile."""
    stalls = count()

    def call() -> None:
        time.sleep(0.4 if next(stalls) in (200, 700) else 0.001)

    found = measure.run(
        answered_by(subject, call), Ask(rate=100, seconds=4, arrivals="fixed", samples=400), Silent()
    )
    assert found.open.latency.p99.value_ms > 200
    assert found.closed.p99.value_ms < 100


def test_a_limit_on_the_p99_passes_fails_or_is_undecided(subject: Subject) -> None:
    slow = answered_by(subject, lambda: time.sleep(0.002))
    ask = Ask(samples=400, seconds=5)
    failed = measure.run(slow, ask.model_copy(update={"max_p99_ms": 1.0, "rate": 100.0}), Silent())
    assert (
        failed.verdict == "fail"
        and failed.reason.startswith("at 100/s: p99")
        and "limit 1 ms" in failed.reason
    )
    passed = measure.run(replace(slow, max_p99_ms=10_000.0), ask, Silent())
    assert (passed.verdict, passed.limit_ms) == ("pass", 10_000.0), "the recipe's gate"
    few = measure.run(replace(slow, max_p99_ms=10_000.0), ask.model_copy(update={"samples": 100}), Silent())
    assert few.verdict == "undecided" and "p99 needs 299" in few.reason


def test_the_largest_rate_is_searched_for(subject: Subject) -> None:
    """On a machine whose other work holds the generator up no rate may be found; what that means is then told."""
    slow = answered_by(subject, lambda: time.sleep(0.005))
    found = measure.run(slow, Ask(max_p99_ms=5000, samples=300, seconds=3), Silent())
    assert found.largest.probes[0].rate_per_s <= 110, "half of what 5 ms a request allow at most"
    if found.largest.rate_per_s is None:
        assert found.verdict != "pass" and found.largest.note
    else:
        assert found.largest.rate_per_s <= 450 and found.verdict in ("pass", "undecided")
        assert any(
            p.rate_per_s == found.largest.rate_per_s and p.verdict == "within" for p in found.largest.probes
        )


def test_parts_of_a_call_are_told_where_the_backend_can(subject: Subject) -> None:
    """Stands in for a GPU backend, whose bindings have `timed_parts`."""

    class Planted:
        provider = "planted"

        def bind(self, inputs: object) -> Bound:
            parts = {"enqueue": 0.1, "compute": 0.5}
            return Bound(lambda: time.sleep(0.001), dict, timed_parts=lambda: parts)

    @contextmanager
    def load(threads: int) -> Iterator[Planted]:
        yield Planted()

    found = measure.run(replace(subject, load=load), Ask(samples=20), Silent())  # type: ignore[arg-type]
    assert found.parts_ms == {"enqueue": 0.1, "compute": 0.5}


def test_mistaken_requests_are_refused_before_anything_is_loaded(subject: Subject) -> None:
    with pytest.raises(RecipeError, match="batch 64 is beyond the variant's largest, 4"):
        measure.run(subject, Ask(batches=(1, 64)), Silent())
    with pytest.raises(RecipeError, match="not one request"):
        measure.run(subject, Ask(rate=0.01, seconds=1), Silent())


def test_the_command_line_measures_bundles_and_runs(tlx: Cli, built: Built, tmp_path: Path) -> None:
    out = tmp_path / "m.json"
    ended = tlx(
        "bench", built.bundle, "--rate", 100, "--seconds", 1, "--arrivals", "fixed", "--out", out, "--json"
    )
    assert ended.code == 0, ended.err
    jsonschema.validate(ended.json, tlx("schema", "bench-bundle").json)
    assert ended.json == json.loads(out.read_text()) and ended.json["open"]["arrivals"] == "fixed"
    shown = tlx("bench", built.run, "--target", "cpu", "--seconds", 1)
    assert shown.code == 0 and "closed loop" in shown.out and "MiB at its peak" in shown.out
    slow = tlx("bench", built.bundle, "--rate", 400, "--seconds", 1, "--max-p99", 1e-5)
    assert slow.code == 13 and "limit 1e-05 ms" in slow.err
    assert tlx("bench", built.bundle, "--seconds", 0.5, "--max-p99", 1e-5).code == 13


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--arrivals", "bursts"), "choose poisson or fixed"),
        (("--batches", "1,x"), "sizes and commas"),
        (("bench.samples=5", "--rate", "5"), "bench.samples=5: recipe values change a run's whole bench"),
        (("--target", "sm999"), "sm999"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    tlx: Cli, built: Built, words: tuple[str, ...], said: str
) -> None:
    ended = tlx("bench", built.bundle, *words)
    assert ended.code == 2 and said in ended.err


def test_only_latency_missed_is_exit_13_and_anything_else_10(tlx: Cli, run_copy: Run) -> None:
    assert tlx("bench", run_copy.path, "gates.max_p99_ms=1e-6", "bench.samples=300").code == 13
    verified = json.loads((run_copy / "verify.json").read_text())
    assert tlx("verify", run_copy.path, "gates.max_size_mb=1e-6").code == 10
    assert tlx("bench", run_copy.path, "gates.max_p99_ms=1e-6", "gates.max_size_mb=1e-6").code == 10
    assert verified["variants"]
