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

from tlexport.progress import Step
from tlexport.results import Variant

PLAIN_INTERVAL = 10.0
PIPE_WIDTH = 200


class Terminal:
    """Progress for people: a bar with ETA on a terminal; elsewhere a line when ten seconds have passed."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    @contextmanager
    def bar(self, label: str) -> Iterator[Step]:
        with self._live(label) if self.console.is_terminal else self._plain(label) as step:
            yield step

    @contextmanager
    def _live(self, label: str) -> Iterator[Step]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with RichProgress(*columns, console=self.console, transient=True) as live:
            task = live.add_task(label, total=None)

            def step(done: float, total: int, doing: str = "") -> None:
                shown = f"{label}: {doing}" if doing else label
                live.update(task, completed=done, total=total, description=shown)

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
    reference: Variant, variants: tuple[Variant, ...], metric: str, chosen: dict[str, str]
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
    for variant in (reference, *variants):
        mark = "*" if variant.name in chosen.values() else " "
        style = {"fail": "red", "undecided": "yellow", "refused": "dim"}.get(
            variant.verdict, "green" if mark == "*" else None
        )
        verdict = (
            f"{variant.verdict}: {variant.reason}"
            if variant.verdict in ("fail", "undecided", "refused")
            else variant.verdict
        )
        table.add_row(
            f"{mark} {variant.name}",
            _number(variant.metric, ".4f"),
            _number(variant.drop, "+.4f"),
            _number(variant.drop_high, "+.4f"),
            _milliseconds(variant.p50_ms),
            _milliseconds(variant.p99_ms),
            _number(variant.speedup, ".2f", "x"),
            _number(variant.size_bytes / 1e6 if variant.size_bytes else None, ".1f"),
            verdict.replace("[", r"\["),
            style=style,
        )
    return table


def pairs_table(rows: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for key, value in rows.items():
        table.add_row(key.replace("[", r"\["), value.replace("[", r"\["))
    return table


def rows_table(rows: tuple[dict[str, Any], ...]) -> Table:
    """Rows of the same keys under their names; numbers with four digits."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, first in rows[0].items():
        number = isinstance(first, float)
        table.add_column(heading.replace("[", r"\["), justify="right" if number else "left")
    for row in rows:
        cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    return table


def _milliseconds(value: float | None) -> str:
    """Small models answer in microseconds: below 1 ms with four decimals."""
    return _number(value, ".4f" if value is not None and value < 1 else ".2f")


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
