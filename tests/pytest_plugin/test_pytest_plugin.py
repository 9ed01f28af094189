"""The fixture in a project of its own, run by a pytest of its own, as a user's is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pipeline import Built

ROOT = Path(__file__).parents[2]
PLUGIN = ("-p", "no:cacheprovider")
HEAVY = {"torch", "onnx", "onnxruntime", "numpy", "scipy", "pydantic", "sklearn"}

TESTS = """
def test_beside(tlexport_gate):
    assert tlexport_gate.latency({bundle!r}, against={bundle!r}, tolerance=5).verdicts[0].verdict == "pass"

def test_faster_is_impossible(tlexport_gate):
    tlexport_gate.latency({bundle!r}, against={bundle!r}, tolerance=0)

def test_no_baseline(tlexport_gate):
    tlexport_gate.latency({bundle!r})

def test_accuracy(tlexport_gate):
    tlexport_gate.accuracy({run!r}, against={run!r})

def test_bundle(tlexport_gate):
    tlexport_gate.bundle({bundle!r})

def test_altered(tlexport_gate):
    tlexport_gate.bundle({altered!r})
"""


@pytest.fixture(autouse=True)
def this_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def project(pytester: pytest.Pytester, built: Built, bundle_copy: Path) -> pytest.Pytester:
    (bundle_copy / "golden" / "inputs.npy").write_bytes(b"other")
    pytester.makepyfile(TESTS.format(bundle=str(built.bundle), run=str(built.run), altered=str(bundle_copy)))
    return pytester


def run(project: pytest.Pytester, *words: str) -> pytest.RunResult:
    return project.runpytest_subprocess(*PLUGIN, "--tlexport-seconds", "0.5", *words)


def test_gates_pass_and_fail_with_one_line(project: pytest.Pytester) -> None:
    ended = run(project, "-k", "not impossible", "--tlexport-baseline", "b.json")
    ended.assert_outcomes(passed=3, failed=2)
    text = ended.stdout.str()
    assert (
        "UndecidedError: undecided: no baseline of digits-quickstart" in text and "there are: nothing" in text
    )
    assert "PreflightError: " in text and "inputs.npy was altered" in text
    assert "Traceback" not in text and "stages/gate.py" not in text, "the reason, not the way there"


def test_undecided_is_no_pass(project: pytest.Pytester) -> None:
    """A build is never surely faster than itself: one time in forty by chance, then at zero tolerance it passes."""
    ended = run(project, "-k", "impossible")
    outcomes = ended.parseoutcomes()
    assert outcomes.get("passed", 0) + outcomes.get("failed", 0) == 1
    if "failed" in outcomes:
        assert "times the latency of" in ended.stdout.str() and "tolerated 1" in ended.stdout.str()


def test_the_options_are_listed(pytester: pytest.Pytester) -> None:
    shown = pytester.runpytest_subprocess(*PLUGIN, "--help").stdout.str()
    assert all(
        flag in shown for flag in ("--tlexport-baseline", "--tlexport-tolerance", "--tlexport-seconds")
    )


def test_pytest_starts_as_fast_as_without(pytester: pytest.Pytester) -> None:
    code = "import sys, tlexport.pytest_plugin; print(sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(eval(done.stdout))
    assert "pytest" in done.stdout
