"""What the measuring programs share: arguments, the machine and versions beside every number, ratios, JSON, tables.

Every result file holds the keys of HEAD (`idle`: whether others left the machine alone when it began) and, beside
these, what the program itself promises in its docstring. A goal is `{what, value, low, high, limit, at_least, met, sure}`: `met` judges
the value, `sure` says whether the whole interval stands on the same side of the limit (null where there is none).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tlexport.evidence import machine
from tlexport.evidence.latency.closed_loop import MIN_BLOCKS
from tlexport.evidence.latency.quantiles import bounds_of
from tlexport.run import versions, write_text

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("TLEXPORT_SHARED", ROOT.parent / "shared")) / "data"
# A recipe's changes that make it small enough for a smoke test; says nothing about accuracy.
SMOKE = {
    "backbone.name": "timm/test_resnet",
    "backbone.weights": "none",
    "backbone.dropout": 0,
    "data.image_size": 32,
    "data.limit": 40,
    "transfer.strategy": "full",
    "transfer.epochs": 1,
    "verify.resamples": 200,
    "calibration.samples": 16,
}
RESULTS = ROOT / "bench" / "results"
HEAD = (
    "program", "command", "date", "quick", "git", "machine", "versions", "busy_percent", "idle", "seconds", "steal_s", "goals",
)  # fmt: skip
BUSY = 10.0  # percent of all cores, while this program waits
NOT_REPRODUCED = ("out", "work")  # where things are written; says nothing about how they were measured


def arguments(program: str, description: str) -> argparse.ArgumentParser:
    """A parser with `--quick` and `--out`."""
    parser = argparse.ArgumentParser(
        prog=f"bench/{program}.py", description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny settings: shows that the program works")
    parser.add_argument(
        "--out", type=Path, help="result file; default bench/results/, with --quick a temporary one"
    )
    return parser


def destination(program: str, options: argparse.Namespace) -> Path:
    """The result file. Numbers of a quick run never land among the committed ones by default."""
    folder = Path(tempfile.gettempdir()) / "tlexport-bench" if options.quick else RESULTS
    out: Path = options.out or folder / f"{program}.json"
    return out.resolve()


def stamp(program: str, parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """The head of a result: what was run, on what, when; says so on standard error if others use the machine."""
    described = machine.describe()
    busy = machine.busy_percent(1.0)
    if busy > BUSY:
        say(f"others use {busy:g}% of this machine: timings are only worth something on an idle one")
    return {
        "program": program,
        "command": command(program, parser, options),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": options.quick,
        "git": revision(),
        "machine": described.model_dump(mode="json"),
        "versions": versions(),
        "busy_percent": busy,
        "idle": busy <= BUSY,
    }


def finish(document: dict[str, Any], goals: list[dict[str, Any]], out: Path, started: float) -> None:
    """Complete the document and write it whole or not at all."""
    document["seconds"] = round(time.monotonic() - started, 1)
    document["steal_s"] = _difference(machine.steal_seconds(), document["machine"]["steal_s"])
    document["goals"] = goals
    write_text(out, to_json(document))
    for found in goals:
        verdict = ("met" if found["met"] else "MISSED") + ("" if found["sure"] is not False else ", not sure")
        say(f"{verdict}: {found['what']}: {found['value']:.4g} {_range(found)}, limit {found['limit']:g}")
    say(f"written: {out}")


def command(program: str, parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """How to repeat this call; folders of this machine are named by placeholders."""
    words = ["python", f"bench/{program}.py"]
    for key, value in vars(options).items():
        if key in NOT_REPRODUCED or value == parser.get_default(key):
            continue
        words.append(f"--{key.replace('_', '-')}")
        if isinstance(value, Path):
            words.append(key.upper())
        elif value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    return " ".join(words)


def revision() -> dict[str, Any] | None:
    """The commit that was measured, and whether the measured files differ from it; None outside a repository."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git("status", "--porcelain", "--", "tlexport", "recipes", "bench/*.py")
    return {"commit": commit, "changed": bool(changed)}


def goal(what: str, found: float | dict[str, Any], limit: float, *, at_least: bool) -> dict[str, Any]:
    """A number, or a ratio with its interval, held against its limit."""
    ratio = found if isinstance(found, dict) else {"ratio": found, "low": None, "high": None}
    ends = (ratio["ratio"], ratio["low"], ratio["high"])
    held = [None if x is None else bool(x >= limit if at_least else x <= limit) for x in ends]
    return {
        "what": what,
        "value": ratio["ratio"],
        "low": ratio["low"],
        "high": ratio["high"],
        "limit": limit,
        "at_least": at_least,
        "met": held[0],
        "sure": None if None in held else len(set(held)) == 1,
    }


def pair_ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, Any]:
    """The median of slow/fast over pairs measured one after the other.

    The 95% interval is the order statistics' (no distribution assumed); null below six pairs.
    """
    ratios = np.array(slow, dtype=np.float64) / np.array(fast, dtype=np.float64)
    bounds = bounds_of(ratios, 0.5, 0.95) if len(ratios) >= 6 else None
    low, high = bounds or (None, None)
    return {
        "ratio": float(np.median(ratios)),
        "low": low,
        "high": high,
        "pairs": [round(float(r), 4) for r in ratios],
    }


def best_ratio_draws(
    rivals: Sequence[Sequence[float]],
    own: Sequence[float],
    *,
    block: int,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, np.ndarray]:
    """min over rivals of the median time, over the own median: the value, and one per resample of whole rounds.

    All times are from one interleaved timing, so that the same rounds of `block` calls are drawn for all, and which rival
    is best is decided anew in each resample. No resamples [0] below MIN_BLOCKS rounds.
    """
    count = min(len(times) for times in (*rivals, own))
    table = np.array([times[:count] for times in (*rivals, own)], dtype=np.float64)
    rounds = [np.arange(start, min(start + block, count)) for start in range(0, count, block)]
    if len(rounds) < MIN_BLOCKS:
        return float(_best_over_own(table)), np.empty(0)
    rows = np.random.default_rng(seed).integers(len(rounds), size=(resamples, len(rounds)))
    drawn = [_best_over_own(table[:, np.concatenate([rounds[i] for i in row])]) for row in rows]
    return float(_best_over_own(table)), np.array(drawn)


def interval(value: float, draws: np.ndarray) -> dict[str, float | None]:
    """The value with the central 95% of its resamples."""
    low, high = (float(x) for x in np.quantile(draws, (0.025, 0.975))) if len(draws) else (None, None)
    return {"ratio": value, "low": low, "high": high}


def smooth_images(count: int, size: int, seed: int) -> np.ndarray:
    """Random images with the smoothness of photographs, uint8 [count,3,size,size]: a coarse random grid, enlarged."""
    import torch
    from torch.nn.functional import interpolate

    coarse = torch.rand((count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    fine = interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def tlexport(
    words: Sequence[str], *, cwd: Path, timeout: float, accept: Sequence[int] = (0,)
) -> dict[str, Any]:
    """Run a command of the real command line with --json and return its object; its progress goes to standard error.

    Ends the program with what was said if the exit code is not in `accept` or there is no object.
    """
    line = [sys.executable, "-m", "tlexport", *words, "--json"]
    say("$ tlexport " + " ".join(words))
    try:
        done = subprocess.run(line, cwd=cwd, stdout=subprocess.PIPE, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"tlexport {words[0]} did not end within {timeout:g} s and was stopped") from None
    if done.returncode not in accept:
        raise SystemExit(f"tlexport {words[0]} ended with exit code {done.returncode}: {done.stdout[-2000:]}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def overrides(values: dict[str, Any]) -> list[str]:
    """`key.path=value` words of a command line."""
    return [f"{key}={value}" for key, value in values.items()]


def to_json(document: dict[str, Any]) -> str:
    """Indented JSON with every list of plain numbers on one line."""
    text = json.dumps(document, indent=1, allow_nan=False)
    return re.sub(r"\[[-\d.,e+\s]+\]", lambda found: " ".join(found[0].split()), text) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns on standard output, numbers and names alike as text."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        sys.stdout.write(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n"
        )
    sys.stdout.flush()


def shown(found: dict[str, Any]) -> str:
    """`1.83 (1.80-1.86)`."""
    return f"{found['ratio']:.2f} {_range(found)}".rstrip()


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _range(found: dict[str, Any]) -> str:
    return (
        ""
        if found["low"] is None or found["high"] is None
        else f"({found['low']:.4g} to {found['high']:.4g})"
    )


def _best_over_own(times: np.ndarray) -> float:
    medians = np.median(times, axis=1)
    return float(medians[:-1].min() / medians[-1])


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else round(after - before, 2)


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
