from __future__ import annotations

import json
from xml.etree import ElementTree

import junit_file
import pytest

from tlexport.evidence import junit
from tlexport.evidence.gate import outputs
from tlexport.results import GateResult, GateVerdict


def verdict(kind: str, **changes: object) -> GateVerdict:
    fields = {
        "gate": "latency",
        "name": "cxr cpu-int8 at batch 1",
        "against": "bench.json",
        "measure": "ratio of median latency, new over old",
        "verdict": kind,
        "value": 1.1,
        "low": 1.08,
        "high": 1.12,
        "confidence": 0.95,
        "tolerance": 0.05,
        "limit": 1.05,
        "count": 10,
        "unit": "sessions",
        "reason": f"{kind} because",
    }
    return GateVerdict.model_validate(fields | changes)


def result(*verdicts: GateVerdict) -> GateResult:
    machine = {"cpu": "Xeon", "cores": 2}
    return GateResult(path="p", verdicts=verdicts, new_ms=(1.0, 1.2, 1.1), machine=machine, seconds=3.0)


HOSTILE = 'a|b <script>alert(1)</script> & "q" \x00\x1b\n`c`'


def test_junit_is_read_by_a_parser_and_counts_right() -> None:
    of = result(
        verdict("pass"),
        verdict("fail", name="new"),
        verdict("undecided", name="unknown"),
        verdict("fail", name=HOSTILE, reason=HOSTILE),
    )
    text = junit.text("gate", list(outputs.cases(of)), 3.0)
    found = junit_file.read(text)
    assert [kind for kind, _ in found.values()] == ["pass", "fail", "undecided", "fail"]
    assert found["new against bench.json"] == ("fail", "fail because")
    assert "<script>" in list(found.values())[3][1], "escaped, not lost"
    suites = ElementTree.fromstring(text.encode())
    assert float(suites.get("time", "")) == 3.0 and suites[0][0].get("classname") == "tlexport.gate.latency"
    assert json.loads(str(suites[0][0].findtext("system-out")))["limit"] == 1.05


def test_markdown_is_a_table_with_as_many_cells_in_every_row() -> None:
    text = outputs.markdown(result(verdict("pass"), verdict("fail", name=HOSTILE, reason=HOSTILE)))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and {row.replace("\\|", "").count("|") for row in rows} == {8}
    assert "<script>" not in text and "✅ pass" in rows[2] and "❌ fail" in rows[3]
    assert "1.080 to 1.120" in rows[2] and "Xeon" in text
    assert "pass because" not in text and "- a" in text, "reasons of what does not pass"


def test_the_tracker_gets_the_fields_it_reads() -> None:
    entries = json.loads(
        outputs.tracker(result(verdict("pass"), verdict("undecided", value=None, low=None, high=None)))
    )
    assert [entry["value"] for entry in entries] == [1.1, 1.1], (
        "median of the sessions, and the one ratio there is"
    )
    for entry in entries:
        assert set(entry) == {"name", "unit", "value", "range", "extra"}
        assert all(isinstance(entry[key], str) for key in ("name", "unit", "range", "extra"))
        assert isinstance(entry["value"], float)
    assert entries[0]["unit"] == "ms" and entries[1]["range"] == "1.08 to 1.12"


def test_a_recorded_baseline_has_no_verdict_and_says_so() -> None:
    saved = result().model_copy(update={"saved": True})
    assert "Recorded as the baseline: 3 sessions" in outputs.markdown(saved)
    assert not list(outputs.cases(saved))
    assert len(json.loads(outputs.tracker(saved))) == 1


@pytest.mark.parametrize("write", [outputs.markdown, outputs.tracker])
def test_what_is_written_ends_with_a_line(write: object) -> None:
    assert write(result(verdict("pass"))).endswith("\n")  # type: ignore[operator]
