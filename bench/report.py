"""How large the report of a full image run is, and how long Chromium takes to open it.

Runs are fine-tuned and built through the real command line from real data in --data; with --work they are kept. That takes 20 to
40 minutes on two cores, the pages themselves one. Each page is opened from its file ten times with an empty cache, and every
request that the browser makes is counted.
Result: `cases` {name: {recipe, bytes, sections, images, drawings, requests, console, seconds [...], load_ms [...],
median {ratio, low, high}}}. `seconds`: from the call to the load event as the driver sees it; the median's interval is the
order statistics' at 95%.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from chromium import Browser, missing
from common import DATA, SMOKE, arguments, destination, finish, goal, overrides, say, stamp, table, tlexport

from tlexport.evidence.latency.quantiles import bounds_of

CASES = {  # recipe -> its data in --data; the photographs are the largest images
    "insects": "hymenoptera",
    "chest-xray": "pneumoniamnist/pneumoniamnist.npz",
}
SMALL = ("digits-quickstart", SMOKE | {"transfer.epochs": 2, "gates.max_drop": 1, "bench.samples": 20})
TIMEOUT = 3000.0  # of one command
GATE_EXIT = 10  # build's, where a target has no passing variant: it has a report, too
OPENS = 10
LARGEST, LONGEST = 5e6, 2.0


def built(recipe: str, change: list[str], work: Path) -> Path:
    """The report of a run that is fine-tuned and built in `work`, or taken up where it was left."""
    tlexport(["finetune", recipe, *change, "--out", f"runs/{recipe}"], cwd=work, timeout=TIMEOUT)
    words = ["build", f"runs/{recipe}", "--out", f"bundles/{recipe}"]
    tlexport(words, cwd=work, timeout=TIMEOUT, accept=(0, GATE_EXIT))
    return work / "runs" / recipe / "report.html"


def measured(page: Path, recipe: str, opens: int) -> dict[str, Any]:
    """The page opened so many times, each with an empty cache; the first open, which also starts the renderer, counts."""
    with Browser() as browser:
        visits = [browser.open(page) for _ in range(opens)]
    seconds = [visit.seconds for visit in visits]
    low, high = bounds_of(np.array(seconds), 0.5, 0.95) or (None, None)
    return {
        "recipe": recipe,
        "bytes": page.stat().st_size,
        "sections": len(visits[0].layout["headings"]) - 1,
        "images": len(visits[0].layout["images"]),
        "drawings": len(visits[0].layout["drawings"]),
        "requests": sum(len(visit.requests) for visit in visits),
        "console": sum(len(visit.console) for visit in visits),
        "seconds": [round(s, 4) for s in seconds],
        "load_ms": [round(visit.load_ms, 1) for visit in visits],
        "median": {"ratio": float(np.median(seconds)), "low": low, "high": high},
    }


def goals_of(cases: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, case in cases.items():
        found += [
            goal(f"report of {name}: MB", case["bytes"] / 1e6, LARGEST / 1e6, at_least=False),
            goal(f"report of {name}: seconds to open, median of {len(case['seconds'])}", case["median"], LONGEST, at_least=False),
            goal(f"report of {name}: network requests", float(case["requests"]), 0.0, at_least=False),
        ]  # fmt: skip
    return found


def main() -> None:
    parser = arguments("report", __doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds the data sets")
    parser.add_argument(
        "--work", type=Path, help="keep runs and bundles here (default: a temporary directory)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(CASES), default=list(CASES), help="some of the cases"
    )
    options = parser.parse_args()
    if why := missing():
        raise SystemExit(f"bench/report.py {why}")
    started, document = time.monotonic(), stamp("report", parser, options)
    out, cases = destination("report", options), {}
    with tempfile.TemporaryDirectory(prefix="tlexport-report-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for recipe, change in {SMALL[0]: overrides(SMALL[1])}.items() if options.quick else real(options):
            say(f"{recipe}:")
            cases[recipe] = measured(built(recipe, change, work), recipe, 3 if options.quick else OPENS)
            document["cases"] = cases
            finish(document, goals_of(cases), out, started)  # what is done stays
    rows = [
        [
            name,
            f"{c['bytes'] / 1e6:.2f}",
            c["images"],
            c["drawings"],
            f"{c['median']['ratio']:.3f}",
            c["requests"],
        ]
        for name, c in cases.items()
    ]
    table(["report of", "MB", "images", "drawings", "s to open", "requests"], rows)


def real(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Recipe and its data, for each case that was asked for; ends the program where the data are not there."""
    for recipe in options.only:
        where = options.data.resolve() / CASES[recipe]
        if not where.exists():
            raise SystemExit(f"{CASES[recipe]} is not in the folder that --data names ({options.data})")
        yield recipe, [f"data.path={where}"]


if __name__ == "__main__":
    main()
