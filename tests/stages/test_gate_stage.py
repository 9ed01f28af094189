"""The gates through the command line, on a real bundle and a real run. Times of a loaded machine decide nothing here: a slow
build is many times slower, and a comparison of a build with itself tolerates a factor of three."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
from pipeline import Built, Ended

from tlexport import flow
from tlexport.errors import GateError, LatencyGateError, RecipeError, RunError, UndecidedError
from tlexport.evidence.gate import sessions, store
from tlexport.progress import Silent
from tlexport.results import GateResult
from tlexport.run import Run, write_json
from tlexport.stages import gate, gate_accuracy

Cli = Callable[..., Ended]
LOOSE = ("--tolerance", "2", "--seconds", "1")


class Sleepy:
    """A runner whose every call takes 5 ms longer."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def bind(self, inputs: Any) -> Sleepy:
        return Sleepy(self.runner.bind(inputs))

    def call(self) -> None:
        import time

        self.runner.call()
        time.sleep(0.005)


@contextmanager
def sleepy(load: Callable[[int], AbstractContextManager[Any]], threads: int) -> Iterator[Sleepy]:
    with load(threads) as runner:
        yield Sleepy(runner)


def build_of(built: Built, *, slow: bool = False) -> sessions.Build:
    made = flow._to_be_timed(built.bundle, "cpu")
    return replace(made, load=partial(sleepy, made.load)) if slow else made


def timed(build: sessions.Build, file: Path, **how: Any) -> GateResult:
    return gate.against_baseline(build, Silent(), path=Path("b"), file=file, seconds=1.0, **how)


@pytest.fixture(scope="module")
def recorded(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a baseline of the bundle."""
    file = tmp_path_factory.mktemp("store") / "bench.json"
    found = gate.save_baseline(build_of(built), Silent(), path=built.bundle, file=file, seconds=1.0)
    assert found.saved and len(found.new_ms) == len(found.new_control_ms) == gate.SESSIONS
    return file


@pytest.fixture
def baseline(recorded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(recorded, tmp_path / "bench.json"))


def test_a_slow_build_fails_side_by_side_and_itself_does_not(built: Built) -> None:
    fast, slow = build_of(built), build_of(built, slow=True)
    ways = {"path": Path("new"), "against": Path("old"), "seconds": 1.0}
    found = gate.beside(slow, fast, Silent(), tolerance=0.05, **ways)
    error = gate.failure(found)
    assert isinstance(error, LatencyGateError) and error.exit_code == 13
    assert "times the latency of old, tolerated 1.05" in str(error) and "\n" not in str(error)
    assert len(found.new_ms) == len(found.old_ms) >= sessions.FEWEST_ROUNDS
    assert min(found.new_ms) > 5 > max(found.old_ms)
    assert gate.failure(gate.beside(fast, fast, Silent(), tolerance=2.0, **ways)) is None
    assert gate.failure(gate.beside(fast, slow, Silent(), tolerance=0.05, **ways)) is None, (
        "faster is no failure"
    )


def test_a_slow_build_fails_against_the_baseline_and_every_run_is_kept(built: Built, baseline: Path) -> None:
    same, slow = timed(build_of(built), baseline, tolerance=2.0), timed(build_of(built, slow=True), baseline)
    verdicts = [found.verdicts[0].verdict for found in (same, slow)]
    # Where a neighbour slows the control meanwhile, undecided is the right answer; what must not be is the other's verdict.
    assert verdicts[0] in ("pass", "undecided") and verdicts[1] in ("fail", "undecided")
    if verdicts[1] == "fail":
        assert isinstance(gate.failure(slow), LatencyGateError)
    kept = store.opened(baseline).records()
    assert [record.kind for record in kept] == ["baseline", "run", "run"]
    assert [record.verdict for record in kept] == ["", *verdicts]
    assert len(slow.old_ms) == len(slow.new_ms) == gate.SESSIONS


def test_without_a_baseline_nothing_is_measured_and_the_command_is_named(
    tlx: Cli, built: Built, tmp_path: Path
) -> None:
    file = tmp_path / "none.json"
    ended = tlx("bench", built.bundle, "--baseline", file, *LOOSE, "--json")
    assert ended.code == UndecidedError.exit_code and "--save-baseline" in ended.err
    assert ended.json["verdicts"][0]["verdict"] == "undecided" and ended.json["new_ms"] == []
    assert not file.exists()


def test_a_baseline_of_another_machine_is_undecided_and_says_what_differs(
    tlx: Cli, built: Built, baseline: Path
) -> None:
    document = json.loads(baseline.read_text())
    document["records"][0]["machine"]["cpu"] = "Z80"
    write_json(baseline, document)
    ended = tlx("bench", built.bundle, "--baseline", baseline, *LOOSE)
    assert ended.code == 14 and "another machine (cpu: Z80, here" in ended.err


def test_a_broken_store_is_an_error_before_anything_is_measured(
    tlx: Cli, built: Built, tmp_path: Path
) -> None:
    file = tmp_path / "b.json"
    file.write_text("{")
    for words in ([], ["--save-baseline"]):
        junit = file.with_name("gate.xml")
        junit.write_text("of an earlier call that passed")
        ended = tlx("bench", built.bundle, "--baseline", file, "--junit", junit, *words, *LOOSE)
        assert ended.code == 7 and "is not JSON" in ended.err
        assert ElementTree.parse(junit).getroot().get("errors") == "1"


def test_the_whole_way_of_the_command(
    tlx: Cli, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = tlx("bench", built.bundle, "--save-baseline", *LOOSE)
    assert saved.code == 0 and "baseline of 10 sessions in .tlexport/baselines.sqlite" in saved.out
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("# before\n")
    files = (
        "--junit",
        "o/gate.xml",
        "--markdown",
        "summary",
        "--tracker",
        "o/tracker.json",
        "--history",
        "o/history.svg",
    )
    ended = tlx("bench", built.bundle, "--baseline", "auto", *files, *LOOSE, "--json")
    assert ended.code in (0, 14), ended.err
    jsonschema.validate(ended.json, tlx("schema", "gate").json)
    assert ElementTree.parse("o/gate.xml").getroot().get("tests") == "1"
    summary = Path("summary.md").read_text()
    assert summary.startswith("# before\n### tlexport gate")
    assert json.loads(Path("o/tracker.json").read_text())[0]["unit"] == "ms"
    drawn = ElementTree.parse("o/history.svg").getroot()
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(drawn.findall(".//{http://www.w3.org/2000/svg}circle")) == 2, "the baseline and one run"


def test_flags_without_their_meaning_are_refused(tlx: Cli, built: Built, tmp_path: Path) -> None:
    for words in (
        ["bench", built.run, "--junit", tmp_path / "x"],
        ["verify", built.run, "--tracker", tmp_path / "x"],
        ["bench", built.run, "--against", built.run, "--baseline", "b.json"],
        ["bench", built.bundle, "--baseline", "b.txt"],
        ["bench", built.bundle, "--against", built.bundle, "--markdown", "summary", *LOOSE],
    ):
        ended = tlx(*words)
        assert ended.code == RecipeError.exit_code and ended.err.startswith("error: "), words


def test_bundle_beside_run(tlx: Cli, built: Built) -> None:
    ended = tlx("bench", built.bundle, "--against", built.run, *LOOSE, "--json")
    assert ended.code == 0 and ended.json["verdicts"][0]["unit"] == "rounds"


def chosen_answers(run: Run) -> Path:
    measured = json.loads((run / "bench.json").read_text())
    name = gate_accuracy._chosen(run)["cpu"]
    assert any(variant["name"] == name for variant in measured["variants"])
    return run / "predictions" / f"{name}.npy"


def test_accuracy_beside_another_run(tlx: Cli, built: Built, run_copy: Run) -> None:
    same = tlx("verify", run_copy.path, "--against", built.run, "--json")
    assert same.code == 0 and {v["verdict"] for v in same.json["verdicts"]} == {"pass"}
    # The planted fault: a third of the answers are another class's.
    path = chosen_answers(run_copy)
    answers = np.load(path)
    answers[::3] = np.roll(answers[::3], 1, axis=1)
    np.save(path, answers)
    worse = tlx("verify", run_copy.path, "--against", built.run, "--max-drop", "0.02")
    assert worse.code == GateError.exit_code and "drop 0." in worse.err and "tolerated 0.02" in worse.err
    better = tlx("verify", built.run, "--against", run_copy.path, "--max-drop", "0.02")
    assert better.code == 0


def test_runs_that_cannot_be_paired_are_refused(built: Built, run_copy: Run) -> None:
    path = chosen_answers(run_copy)
    np.save(path, np.load(path)[:-1])
    with pytest.raises(RunError, match="answers to"):
        gate_accuracy.beside(run_copy.path, built.run)
    path.unlink()
    with pytest.raises(RunError, match="tlexport verify"):
        gate_accuracy.beside(run_copy.path, built.run)
    labels = run_copy / "reference" / "labels.npy"
    np.save(labels, np.roll(np.load(labels), 1))
    with pytest.raises(RunError, match="different test splits"):
        gate_accuracy.beside(run_copy.path, built.run)
