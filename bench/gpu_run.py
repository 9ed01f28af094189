"""What bench/gpu.py does: which cells, in which order, within which time; each group in a process of its own (gpu_group.py)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, arguments, destination, finish, say, stamp, table, to_json
from gpu_cases import BACKENDS, MODELS, PRECISIONS, refusal
from latency_cases import QUICK_IMAGES

from tlexport.run import write_text

REFERENCE = ("eager", "fp32")
GROUP_S = 900.0  # what making and loading a group may take, besides timing
QUICK = {"models": [*QUICK_IMAGES], "batches": [1], "seconds_per_cell": 0.3, "samples": 40}
CRASHES = 6  # of a group's process, each of which costs one cell


def main(description: str) -> None:
    parser = arguments("gpu", description)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *QUICK_IMAGES], default=list(MODELS))
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds; no group is begun after them")
    parser.add_argument("--seconds-per-cell", type=float, default=5.0, help="of timing")
    parser.add_argument("--samples", type=int, default=1000, help="timed calls of a cell at most")
    parser.add_argument("--resume", action="store_true", help="keep what the result file holds")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and stop")
    options = parser.parse_args()
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args()
    target, out = placed(options)
    if options.dry_run:
        foretell(options, target)
        return
    started, document = time.monotonic(), stamp("gpu", parser, options)
    document |= {"device": options.device, "target": target, "settings": settings(options)}
    document |= {"cells": {}, "groups": {}, "left": []}
    if options.resume and out.is_file():
        document |= resumed(json.loads(out.read_text()), document)
    with tempfile.TemporaryDirectory(prefix="tlexport-gpu-") as work:
        run(options, document, out, Path(work), started)
    show(document["cells"])
    finish(document, [], out, started)


def placed(options: argparse.Namespace) -> tuple[str, Path]:
    """The target and the result file. Ends the program where a result would not be what its place says."""
    from tlexport import hardware

    out = destination("gpu", options)
    if options.device == "cpu":
        if not options.dry_run and (out.parent == RESULTS or (options.out is None and not options.quick)):
            raise SystemExit("--device cpu measures no GPU: name another file with --out")
        return "cpu", out
    if not (target := hardware.capability()):
        raise SystemExit("no NVIDIA GPU here; --device cpu --out FILE runs the same program on the CPU")
    return target, out


def settings(options: argparse.Namespace) -> dict[str, Any]:
    return {"seconds_per_cell": options.seconds_per_cell, "samples": options.samples, "tf32": False}


def cells_of(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(backend, precision), the reference first: every speed-up is over it."""
    asked = [(backend, precision) for backend in options.backends for precision in options.precisions]
    return [REFERENCE, *(cell for cell in asked if cell != REFERENCE)]


def foretell(options: argparse.Namespace, target: str) -> None:
    rows = [[f"{b}-{p}", refusal(b, p, target) or "to be tried"] for b, p in cells_of(options)]
    table(["cell", f"on {target}"], rows)
    groups, tried = len(options.models) * len(options.batches), sum(row[1] == "to be tried" for row in rows)
    timing = groups * tried * options.seconds_per_cell / 60
    say(f"{groups} groups of {tried} cells: {timing:.0f} minutes of timing at most, and the building")


def resumed(held: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call found. Ends the program if that was not on this machine with these settings and versions."""
    for key in ("device", "target", "settings", "versions"):
        if held[key] != document[key]:
            raise SystemExit(f"--resume: the file's {key} are {held[key]}, these are {document[key]}")
    return {"cells": held["cells"], "groups": held["groups"]}


def run(options: argparse.Namespace, document: dict[str, Any], out: Path, work: Path, started: float) -> None:
    """Every group that is not known yet, while there is time; the document is written after each."""
    names = [f"{backend}-{precision}" for backend, precision in cells_of(options)]
    groups = [(model, batch) for model in options.models for batch in options.batches]
    pending = [
        (model, batch)
        for model, batch in groups
        if any(f"{model}/{batch}/{name}" not in document["cells"] for name in names)
    ]
    for done, (model, batch) in enumerate(pending):
        spent = time.monotonic() - started
        document["left"] = [f"{m}/{b}/{name}" for m, b in pending[done:] for name in names]
        if spent > options.budget:
            say(
                f"the budget of {options.budget:g} s is spent; --resume goes on with {len(pending) - done} groups"
            )
            return
        eta = f", about {spent / done * (len(pending) - done) / 60:.0f} min left" if done else ""
        say(f"[{done + 1}/{len(pending)}] {model}, batch {batch}{eta}")
        began = time.monotonic()
        found = measured(options, document["target"], model, batch, work)
        document["cells"] |= {f"{model}/{batch}/{name}": cell for name, cell in found["cells"].items()}
        document["groups"][f"{model}/{batch}"] = found["around"] | {
            "seconds": round(time.monotonic() - began, 1),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "git": document["git"],
        }
        write_text(out, to_json(document | {"goals": []}))
    document["left"] = []


def measured(options: argparse.Namespace, target: str, model: str, batch: int, work: Path) -> dict[str, Any]:
    """The record of a group. A process that dies is started anew without the cell that it died of."""
    folder = work / model
    folder.mkdir(exist_ok=True)
    cells = cells_of(options)
    names = [f"{backend}-{precision}" for backend, precision in cells]
    known: dict[str, str] = {}
    for _ in range(CRASHES):
        job = {
            "model": model, "batch": batch, "device": options.device, "target": target, "cells": cells, "known": known,
            "seconds": options.seconds_per_cell, "samples": options.samples, "quick": options.quick,
            "work": str(folder), "out": str(folder / "record.json"),
        }  # fmt: skip
        Path(job["out"]).unlink(missing_ok=True)
        death = process(job, GROUP_S + options.seconds_per_cell * len(cells))
        record: dict[str, Any] = {"doing": "starting", "cells": {}, "around": {}}
        if Path(job["out"]).is_file():
            record = json.loads(Path(job["out"]).read_text())
        if not death:
            return record
        say(f"  {death} at {record['doing']}")
        if record["doing"] not in names or record["doing"] == "-".join(REFERENCE):
            break
        said = {"reason": f"{death} while it was made or loaded"}
        known[record["doing"]] = record["cells"].get(record["doing"], said)["reason"]
    for name in names:
        record["cells"].setdefault(name, {"state": "refused", "reason": f"{death} at {record['doing']}"})
    return record


def process(job: dict[str, Any], limit: float) -> str:
    """Measure a group; empty, or how its process ended."""
    path = Path(job["work"]) / "job.json"
    path.write_text(json.dumps(job))
    line = [sys.executable, str(Path(__file__).with_name("gpu_group.py")), str(path)]
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(line, env=os.environ | {"PYTHONPATH": places}, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"the process took more than {limit:g} s"
    if done.returncode < 0:
        return f"the process was killed by signal {-done.returncode}"
    return f"the process ended with exit code {done.returncode}" if done.returncode else ""


def show(cells: dict[str, dict[str, Any]]) -> None:
    rows = []
    for name, cell in cells.items():
        if cell["state"] == "refused":
            rows.append([name, "-", "-", "-", f"refused: {cell['reason'][:90]}"])
            continue
        p50, parts, speedup = cell["latency"]["p50"]["value_ms"], cell["parts"], cell["speedup"]["ratio"]
        on_gpu = "-" if parts is None else f"{parts['compute']['value_ms']:.3g}"
        rows.append([name, "-" if p50 is None else f"{p50:.3g}", on_gpu, f"{speedup:.2f}", cell["note"]])
    table(["cell", "p50 ms", "of it computing", "over eager FP32", ""], rows)
