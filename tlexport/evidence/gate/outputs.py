"""A gate's result for machines that read it: cases of a JUnit file, GitHub-flavoured markdown, and a tracker's benchmark JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from statistics import median

from tlexport.evidence.junit import Case
from tlexport.results import GateResult, GateVerdict

_MARK = {"pass": "✅ pass", "fail": "❌ fail", "undecided": "❔ undecided"}


def cases(result: GateResult) -> Iterator[Case]:
    """Of a JUnit file: one a verdict."""
    for of in result.verdicts:
        name = f"{of.name} against {of.against}"
        yield Case(f"gate.{of.gate}", name, of.verdict, of.reason, of.model_dump_json(indent=1))


def markdown(result: GateResult) -> str:
    """A heading, a table with a row a verdict, and the machine, for a pull request's comment or a job's summary."""
    lines = ["### tlexport gate", ""]
    if result.verdicts:
        lines += [
            "| | what | against | measured | interval | tolerated | from |",
            "|---|---|---|---:|---:|---:|---|",
            *(_row(verdict) for verdict in result.verdicts),
            "",
            *(f"- {_cell(verdict.reason)}" for verdict in result.verdicts if verdict.verdict != "pass"),
        ]
    if result.saved:
        lines.append(
            f"Recorded as the baseline: {len(result.new_ms)} sessions, median {median(result.new_ms):.4g} ms."
        )
    if result.machine:
        cpu = result.machine.get("cpu")
        lines += [
            "",
            f"Machine: {_cell(str(cpu))}, {result.machine.get('cores')} cores; {result.seconds:.0f} s.",
        ]
    return "\n".join(lines).rstrip() + "\n"


def tracker(result: GateResult) -> str:
    """The array that github-action-benchmark reads as `customSmallerIsBetter`: name, unit, value, range, extra.

    A verdict without a value has no entry, since the reader wants numbers.
    """
    entries = [_entry(verdict) for verdict in result.verdicts if verdict.value is not None]
    if result.new_ms:
        name = result.verdicts[0].name if result.verdicts else result.path
        spread = (max(result.new_ms) - min(result.new_ms)) / 2
        entries.insert(
            0,
            {
                "name": f"{name}: median latency",
                "unit": "ms",
                "value": median(result.new_ms),
                "range": f"± {spread:.3g}",
                "extra": f"medians of {len(result.new_ms)} rounds or sessions",
            },
        )
    return json.dumps(entries, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _entry(verdict: GateVerdict) -> dict[str, object]:
    known = verdict.low is not None and verdict.high is not None
    return {
        "name": f"{verdict.name}: {verdict.measure}",
        "unit": "ratio" if verdict.gate == "latency" else "drop",
        "value": verdict.value,
        "range": f"{verdict.low:.4g} to {verdict.high:.4g}" if known else "",
        "extra": f"{verdict.verdict} against {verdict.against}: {verdict.reason}",
    }


def _row(verdict: GateVerdict) -> str:
    form = ".3f" if verdict.gate == "latency" else ".4f"
    measured = "-" if verdict.value is None else format(verdict.value, form)
    known = verdict.low is not None and verdict.high is not None
    interval = f"{verdict.low:{form}} to {verdict.high:{form}}" if known else "-"
    cells = (
        _MARK[verdict.verdict],
        verdict.name,
        verdict.against,
        measured,
        interval,
        f"{verdict.limit:g}",
        f"{verdict.count} {verdict.unit}",
    )
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor becomes markup."""
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return " ".join(escaped.split())
