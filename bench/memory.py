"""Peak memory of `tlexport build` on EfficientNet-Lite0 at 224 px: INT8 calibration, targets cpu and sm89.

A probe on scikit-learn's digits makes the run; then the build is watched every 50 ms, the whole tree of its processes.
The gates are open, so that every variant is loaded at once in the bench stage. At most 40 minutes, usually six.
Result: `peak` {judged_mb, tree_pss_mb, tree_rss_mb, largest_process_mb, at_s, stage}, `timeline_mb` (highest of each
second), `build` {seconds per stage, variants} and `settings`. Judged is the larger of the tree's proportional set size
(pages that processes share count once) and the largest single process, which the kernel records without gaps.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from common import arguments, destination, finish, goal, overrides, say, stamp, table, tlexport

# No torch in this process: a child's recorded maximum starts from what its parent held.

INTERVAL = 0.05
LIMIT_MB = 3000.0
TIMEOUT = 1200.0
FULL = {"data.image_size": 224, "data.limit": 300, "transfer.strategy": "probe", "transfer.epochs": 1}
BUILD = {"gates.max_drop": 1, "bench.samples": 50}
TINY = {
    "data.image_size": 64,
    "data.limit": 24,
    "backbone.name": "timm/test_resnet",
    "backbone.weights": "none",
}
TINY_BUILD = {"bench.samples": 10, "bench.batch_sizes": "[1]", "calibration.samples": 16}


@dataclass
class Usage:
    """Bytes, and seconds since the start."""

    pss: int = 0
    rss: int = 0
    at: float = 0.0
    largest: int = 0
    timeline: list[float] = field(default_factory=list)
    stdout: str = ""


def tree(root: psutil.Process) -> tuple[int, int]:
    """Proportional and resident bytes of a process and all below it; where the first cannot be read, the second."""
    pss = rss = 0
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            resident = process.memory_info().rss
            try:
                proportional = process.memory_full_info().pss
            except (psutil.AccessDenied, AttributeError):
                proportional = resident
            pss, rss = pss + proportional, rss + resident
    return pss, rss


def watch(line: list[str], cwd: Path) -> Usage:
    """Run a command to its end. Ends the program if it fails or takes longer than TIMEOUT."""
    found, started = Usage(), time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(line, cwd=cwd, stdout=output)
        root = psutil.Process(process.pid)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        while not ended:
            now = time.monotonic() - started
            if now > TIMEOUT:
                for child in [*root.children(recursive=True), root]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                process.wait()
                raise SystemExit(f"the build did not end within {TIMEOUT:g} s and was stopped")
            with contextlib.suppress(psutil.NoSuchProcess):
                note(found, *tree(root), now)
            time.sleep(INTERVAL)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        found.largest = usage.ru_maxrss * 1024
        output.seek(0)
        found.stdout = output.read()
    if process.returncode:
        raise SystemExit(
            f"{' '.join(line[1:4])} ended with exit code {process.returncode}: {found.stdout[-2000:]}"
        )
    return found


def note(found: Usage, pss: int, rss: int, now: float) -> None:
    if pss > found.pss:
        found.pss, found.at = pss, now
    found.rss = max(found.rss, rss)
    found.timeline += [0.0] * (int(now) + 1 - len(found.timeline))
    found.timeline[int(now)] = max(found.timeline[int(now)], round(pss / 1e6, 1))


def stage_at(when: float, seconds: dict[str, float], total: float) -> str:
    """The stage that ran then. What comes before the first is start-up; the clock is the watcher's, so it is about."""
    begin = max(total - sum(seconds.values()), 0.0)
    for name, took in seconds.items():
        if when < begin:
            return f"before {name}"
        begin += took
        if when < begin:
            return name
    return "after the last stage"


def main() -> None:
    parser = arguments("memory", __doc__ or "")
    parser.add_argument("--targets", nargs="+", default=["cpu", "sm89"])
    options = parser.parse_args()
    started, document = time.monotonic(), stamp("memory", parser, options)
    made = FULL | (TINY | {"transfer.strategy": "full"} if options.quick else {})
    built = BUILD | (TINY_BUILD if options.quick else {})
    with tempfile.TemporaryDirectory(prefix="tlexport-memory-") as folder:
        work = Path(folder)
        tlexport(
            ["finetune", "digits-quickstart", *overrides(made), "--out", "run"], cwd=work, timeout=TIMEOUT
        )
        words = [
            "build",
            "run",
            *overrides(built),
            "--out",
            "bundle",
            *(w for t in options.targets for w in ("--target", t)),
        ]
        say("$ tlexport " + " ".join(words))
        began = time.monotonic()
        used = watch([sys.executable, "-m", "tlexport", *words, "--json"], work)
        took = time.monotonic() - began
    result: dict[str, Any] = json.loads(used.stdout)
    peak = {
        "judged_mb": round(max(used.pss, used.largest) / 1e6, 1),
        "tree_pss_mb": round(used.pss / 1e6, 1),
        "tree_rss_mb": round(used.rss / 1e6, 1),
        "largest_process_mb": round(used.largest / 1e6, 1),
        "at_s": round(used.at, 1),
        "stage": stage_at(used.at, result["seconds"], took),
    }
    variants = {
        v["name"]: {"verdict": v["verdict"], "size_bytes": v["size_bytes"]} for v in result["variants"]
    }
    document |= {
        "peak": peak,
        "timeline_mb": used.timeline,
        "build": {"seconds": result["seconds"], "variants": variants},
        "settings": {
            "recipe": "digits-quickstart",
            "finetune": made,
            "build": built,
            "targets": options.targets,
        },
    }
    table(["what", "value"], [[name, value] for name, value in peak.items()])
    goals = [goal("peak memory of build, MB", peak["judged_mb"], LIMIT_MB, at_least=False)]
    finish(document, goals, destination("memory", options), started)


if __name__ == "__main__":
    main()
