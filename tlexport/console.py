"""What a person sees: progress with ETA on a terminal, plain lines elsewhere, and tables. Everything goes to stderr but results."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from tlexport.progress import Step, printable
from tlexport.results import MeasureResult, Variant, VerifyResult
from tlexport.timings import Latency

PLAIN_INTERVAL = 10.0
PIPE_WIDTH = 200


class Terminal:
    """Progress for people: a bar with ETA on a terminal; elsewhere a line when ten seconds have passed."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(printable(text), markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {printable(text)}", style="yellow", markup=False)

    @contextmanager
    def bar(self, label: str, *, still: bool = False) -> Iterator[Step]:
        with self._live(label, still) if self.console.is_terminal else self._plain(label) as step:
            yield step

    @contextmanager
    def _live(self, label: str, still: bool) -> Iterator[Step]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self.console, transient=True, auto_refresh=not still) as live:
            task = live.add_task(label, total=None)

            def step(done: float, total: int, doing: str = "") -> None:
                shown = f"{label}: {doing}" if doing else label
                live.update(task, completed=done, total=total, description=shown, refresh=still)

            yield step

    @contextmanager
    def _plain(self, label: str) -> Iterator[Step]:
        started = last = time.monotonic()

        def step(done: float, total: int, doing: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= PLAIN_INTERVAL and done:
                last = now
                left = (now - started) / done * (total - done)
                self.say(f"{label}: {int(done)}/{total}, {left:.0f} s left{f', {doing}' if doing else ''}")

        yield step


def results() -> Console:
    """The console for a command's result: standard output. A file or a pipe gets lines as long as they need to be."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, highlight=False, width=width)


def variants_table(
    references: tuple[Variant, ...], variants: tuple[Variant, ...], metric: str, chosen: dict[str, str]
) -> Table:
    """One row a variant: accuracy, drop, latency, size, verdict. `*` marks what was chosen."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, side in (
        ("variant", "left"),
        (metric, "right"),
        ("drop", "right"),
        ("at worst", "right"),
        ("p50 ms", "right"),
        ("p99 ms", "right"),
        ("speed-up", "right"),
        ("size MB", "right"),
        ("verdict", "left"),
    ):
        table.add_column(heading, justify=side, no_wrap=heading != "verdict")  # type: ignore[arg-type]
    for variant in (*references, *variants):
        mark = "*" if variant.name in chosen.values() else " "
        style = {"fail": "red", "undecided": "yellow", "refused": "dim"}.get(
            variant.verdict, "green" if mark == "*" else None
        )
        verdict = variant.verdict
        if verdict in ("fail", "refused"):
            verdict = f"{verdict}: {variant.reason}"
        elif verdict == "undecided":
            verdict = variant.reason  # it says so itself
        table.add_row(
            _plain(f"{mark} {variant.name}"),
            _number(variant.metric, ".4f"),
            _number(variant.drop, "+.4f"),
            _number(variant.drop_high, "+.4f"),
            _milliseconds(variant.p50_ms),
            _milliseconds(variant.p99_ms),
            _number(variant.speedup, ".2f", "x"),
            _number(variant.size_bytes / 1e6 if variant.size_bytes else None, ".1f"),
            _plain(verdict),
            style=style,
        )
    return table


def measured_rows(found: MeasureResult) -> dict[str, str]:
    """What was timed of one variant, a line each."""
    rows = {
        "timed": f"{found.variant} on {found.provider}, {found.concurrency} x {found.threads} threads",
        "closed loop": f"{_latency(found.closed)}, {found.closed.throughput_per_s:.4g}/s",
    }
    if found.parts_ms:
        rows["parts"] = ", ".join(f"{name} {_milliseconds(ms)} ms" for name, ms in found.parts_ms.items())
    if found.open:
        rows |= {
            "open loop": f"{found.open.rate_per_s:g}/s {found.open.arrivals}: {_latency(found.open.latency)}",
            "  its service": _latency(found.open.service),
            "  utilisation": f"{found.open.utilisation:.0%}, answered {found.open.completed_per_s:.4g}/s",
        }
    if found.largest:
        rate = found.largest.rate_per_s
        rows["largest rate"] = (
            f"{rate:.4g}/s with p99 within {found.largest.limit_ms:g} ms, by {len(found.largest.probes)} probes"
            if rate
            else found.largest.note
        )
    for point in found.curve:
        spread = "" if point.low is None else f" ({point.low:.4g} to {point.high:.4g})"
        rows[f"batch {point.batch} x {point.concurrency}"] = f"{point.items_per_s:.4g} samples/s{spread}"
    for name, knee in (("batch", found.knee_batch), ("workers", found.knee_concurrency)):
        if knee:
            beyond = "" if knee.passed else ", or beyond what was measured"
            rows[f"knee, {name}"] = f"{knee.at}{beyond}: {knee.share:.0%} of the best throughput"
    if found.memory and found.memory.host_peak_mib is not None:
        rows["memory"] = f"{found.memory.host_peak_mib:.1f} MiB at its peak"
    if found.verdict:
        rows["limit"] = f"{found.verdict}: {found.reason}"
    return rows | {f"note {number}": text for number, text in enumerate(found.notes, start=1)}


def _latency(of: Latency) -> str:
    return ", ".join(
        f"p{100 * p.q:g} {'withheld' if p.value_ms is None else _milliseconds(p.value_ms) + ' ms'}"
        + ("" if p.high_ms is None else f" (to {_milliseconds(p.high_ms)})")
        for p in (of.p50, of.p90, of.p99)
    )


def evidence_rows(result: VerifyResult) -> dict[str, str]:
    """What stands behind each verdict, a line a variant, and how decisions are made."""
    rows = {}
    if result.decision is not None:
        rows["decided by"] = result.decision.in_words()
    for own in result.evidence:
        parts = [
            f"p {own.p_adjusted:.2g} of a drop at the limit" if own.p_adjusted is not None else "",
            f"{own.flips.count} flips, {own.flips.harmful} harmful (McNemar p {own.flips.mcnemar_p:.2g})"
            if own.flips
            else "",
            f"calibration error {own.calibration.ece_drift:+.4f} ({own.calibration.ece_drift_low:+.4f} to "
            f"{own.calibration.ece_drift_high:+.4f})"
            if own.calibration
            else "",
            f"{own.forecast.loss} {own.forecast.mean_difference:+.3g} (Diebold-Mariano p {own.forecast.p:.2g})"
            if own.forecast
            else "",
            f"worst slice {own.worst_slice}" if own.worst_slice else "",
        ]
        rows[own.variant] = "; ".join(part for part in parts if part)
    return rows


def pairs_table(rows: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for key, value in rows.items():
        table.add_row(_plain(key), _plain(value))
    return table


def rows_table(rows: tuple[dict[str, Any], ...]) -> Table:
    """Rows of the same keys under their names; numbers with four digits."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, first in rows[0].items():
        number = isinstance(first, float)
        table.add_column(_plain(heading), justify="right" if number else "left")
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        table.add_row(*map(_plain, cells))
    return table


def _plain(text: str) -> Text:
    """As it is: brackets are no markup, and nothing in it is obeyed."""
    return Text(printable(text))


def _milliseconds(value: float | None) -> str:
    """Small models answer in microseconds: below 1 ms with four decimals."""
    return _number(value, ".4f" if value is not None and value < 1 else ".2f")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
