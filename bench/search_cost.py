"""What `tlexport build` with its search costs in time beside the same targets by hand: EfficientNet-Lite0 for cpu and sm89.

By hand (bench/by_hand.py) means torch.onnx.export, ONNX Runtime's quantize_static once for each target and TensorRT-RTX's
compiler: nothing is searched, judged, timed or bundled. Both ways start as processes of their own, in turns, each time in a
fresh copy of one fine-tuned run. At most 90 minutes, usually half an hour.

Result: `build_s` and `by_hand_s` [s], `ratio` {ratio, low, high, pairs} of the two, `making` (the same without verify, bench
and package, which nobody does by hand), `stages_s` (medians of the build's stages), `settings`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    DATA,
    ROOT,
    arguments,
    destination,
    finish,
    goal,
    pair_ratio,
    say,
    shown,
    stamp,
    table,
    tlexport,
)
from quantize_cases import CASES
from quantize_training import fine_tuned, training_words

LIMIT = 3.0
MAX_DROP = 0.005
TIMEOUT = 1800.0  # of one command
GATE_EXIT = 10  # build's, where a target has no passing variant: the time is spent all the same
JUDGED = ("verify", "bench", "package")
KEPT = ("recipe.yaml", "manifest.json", "checkpoint", "reference")


def fresh(run: Path, folder: Path) -> Path:
    """A copy that holds what fine-tuning left and nothing of a build."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in KEPT:
        source = run / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


def built(run: Path, work: Path, options: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """Wall seconds of one build, and those of its stages."""
    quick = ["bench.samples=10", "bench.batch_sizes=[1]"] if options.quick else []
    asked = [word for target in options.targets for word in ("--target", target)]
    folder = fresh(run, work / "build")
    words = ["build", str(folder), *quick, *asked, "--max-drop", str(MAX_DROP), "--out", str(work / "bundle")]
    shutil.rmtree(work / "bundle", ignore_errors=True)
    started = time.monotonic()
    said = tlexport(words, cwd=work, timeout=TIMEOUT, accept=(0, GATE_EXIT))
    return time.monotonic() - started, said["seconds"]


def by_hand(run: Path, work: Path, options: argparse.Namespace) -> float:
    """Wall seconds of the hand-written way. Raises SystemExit with its last words."""
    shutil.rmtree(work / "by-hand", ignore_errors=True)
    line = [sys.executable, str(ROOT / "bench/by_hand.py"), str(run), str(work / "by-hand"), *options.targets]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        line, cwd=work, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    if done.returncode:
        raise SystemExit(f"bench/by_hand.py ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    return time.monotonic() - started


def measured(run: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both ways, in turns, the one or the other first."""
    build_s, hand_s, stages = [], [], []
    for index in range(2 if options.quick else options.pairs):
        for ours in (True, False) if index % 2 == 0 else (False, True):
            if ours:
                seconds, of = built(run, work, options)
                build_s.append(round(seconds, 2))
                stages.append(of)
            else:
                hand_s.append(round(by_hand(run, work, options), 2))
        say(f"pair {index + 1}: build {build_s[-1]:.1f} s, by hand {hand_s[-1]:.1f} s")
    making = [whole - sum(of[name] for name in JUDGED) for whole, of in zip(build_s, stages, strict=True)]
    return {
        "build_s": build_s,
        "by_hand_s": hand_s,
        "ratio": pair_ratio(build_s, hand_s),
        "making": pair_ratio(making, hand_s),
        "stages_s": {name: float(np.median([of[name] for of in stages])) for name in stages[0]},
    }


def main() -> None:
    parser = arguments("search_cost", __doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds the data sets")
    parser.add_argument("--case", choices=list(CASES), default="lite0-pathology", help="of bench/quantize.py")
    parser.add_argument("--targets", nargs="+", choices=("cpu", "sm89"), default=["cpu", "sm89"])
    parser.add_argument("--pairs", type=int, default=6, help="below six there is no interval")
    parser.add_argument(
        "--work", type=Path, help="where bench/quantize.py kept its run (default: trained anew)"
    )
    options = parser.parse_args()
    started, document = time.monotonic(), stamp("search_cost", parser, options)
    with tempfile.TemporaryDirectory(prefix="tlexport-search-cost-") as temporary:
        scratch = Path(temporary)
        case = CASES[options.case]
        words, _ = training_words(options.case, case, options)
        run, tuned = fine_tuned(options.case, case, words, (options.work or scratch).resolve())
        document |= measured(run.path, scratch, options)
    document["settings"] = {
        "case": options.case,
        "backbone": tuned["backbone"],
        "samples": tuned["samples"],
        "targets": options.targets,
        "max_drop": MAX_DROP,
    }
    goals = [
        goal("tlexport build with search over the same by hand", document["ratio"], LIMIT, at_least=False)
    ]
    finish(document, goals, destination("search_cost", options), started)
    rows = [
        ["tlexport build", f"{np.median(document['build_s']):.1f}", shown(document["ratio"])],
        ["its making alone", "-", shown(document["making"])],
        ["by hand", f"{np.median(document['by_hand_s']):.1f}", "1"],
    ]
    table(["way", "seconds", "times by hand"], rows)


if __name__ == "__main__":
    main()
