"""INT8 graphs of the same fine-tuned networks by several makers, from the same calibration samples, judged on the same test split.

tlexport searches under --max-drop 0.005 on validation samples; beside it stand ONNX Runtime's quantize_static, NVIDIA's
modelopt (calibration by entropy, its default, and by max) and NNCF (basic, and with its accuracy control). `cpu` graphs run in
ONNX Runtime at its full optimisation, `trt` graphs at the basic level, which keeps what a GPU would compute. Makers other than
ONNX Runtime run in the interpreter that --competitors names; one that is missing there says so in its row.

The rule for a tie, fixed before any result: tlexport is not behind a maker if its drop is at most the maker's plus 1/n, what
one of n flipped test samples is worth in accuracy. An AUC takes the same 1/n by convention; where every maker's drop is below
it, as on an easy data set, it tells none of them apart.

Goals: a drop within 0.005, as it was measured and at its interval's unfavourable end; at least 80% of the multiply-accumulates
in INT8; never behind.

With --work the runs and graphs are kept, and a call that was stopped resumes: a fine-tuned run is taken as it stands, a rival's
graph if it was made from the same FP32 graph and samples, tlexport's own if the commit is the same. Results of several calls
(--only) are merged. At most 20 minutes a case, usually five; two hours for all.

Result: `cases` {name: {recipe, overrides, weights, data, backbone, metric, samples, one_flip, reference, fp32_bytes, test,
finetune_seconds, graphs [{maker, flavour, metric, drop, drop_low, drop_high, flips, int8_macs, size_bytes, seconds, settings,
reason, beyond}], rival_versions, date, git, machine, versions}}. `seconds` are the maker's own calls, without imports and export;
tlexport's are of its one command for both flavours. `int8_macs` counts a product whose factors both come straight from 8-bit
integers, so one that NNCF feeds through a pooling or concatenation is not counted. `beyond` {ratio, low, high}: tlexport's drop minus this
maker's, paired.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from common import (
    DATA,
    ROOT,
    arguments,
    destination,
    finish,
    goal,
    overrides,
    revision,
    say,
    stamp,
    table,
    tlexport,
)
from quantize_cases import CASES, TINY, Case
from quantize_judge import OURS, Judge, Made
from quantize_training import fine_tuned, training_words

from tlexport.evidence import machine
from tlexport.recipe import load
from tlexport.run import Run, digest, write_json

TIMEOUT = 3000.0  # of one command
MAX_DROP, MIN_SHARE = 0.005, 0.8
TARGETS = ("cpu", "sm89")
RIVALS = (
    ("onnxruntime", "cpu"),
    ("nncf", "cpu"),
    ("nncf-accuracy", "cpu"),
    ("onnxruntime", "trt"),
    ("modelopt", "trt"),
    ("modelopt-max", "trt"),
)
SEARCHED_BY = ("calibration", "search")  # sections that quantise takes as they are shipped today


def measured(name: str, case: Case, options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Fine-tune, quantise by every maker, judge."""
    words, weights = training_words(name, case, options)
    run, tuned = fine_tuned(name, case, words, work)
    made = [*ours(name, run, case, words, work)]
    made += [rival(maker, flavour, run, options, work / "made" / name) for maker, flavour in RIVALS]
    judge = Judge(run)
    return {
        "recipe": case.recipe,
        "overrides": overrides(case.change | (TINY if options.quick else {})),
        "weights": weights,
        "data": case.data,
        "backbone": tuned["backbone"],
        "metric": tuned["metric"],
        "samples": tuned["samples"],
        "one_flip": judge.one_flip,
        "reference": judge.reference.value,
        "fp32_bytes": (run / "graphs/fp32.onnx").stat().st_size,
        "test": tuned["metrics"]["test"],
        "finetune_seconds": tuned["seconds"],
        "graphs": list(judge.judged(made)),
        "rival_versions": {key: value for one in made for key, value in one.versions.items()},
    }


def ours(name: str, run: Run, case: Case, words: list[str], work: Path) -> Iterator[Made]:
    """tlexport's two graphs, made anew unless this very commit made them."""
    record = work / "made" / name / f"{OURS}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    code = revision()
    held = json.loads(record.read_text()) if record.is_file() else None
    if held is None or held["git"] != code or code is None or code["changed"]:
        for graph in (run / "graphs").glob("*.onnx"):
            graph.unlink()
        tlexport(["export", str(run.path)], cwd=work, timeout=TIMEOUT)
        today = load(case.recipe, words).model_dump(mode="json", include=set(SEARCHED_BY))
        changed = [f"{part}.{key}={json.dumps(v)}" for part in SEARCHED_BY for key, v in today[part].items()]
        asked = [word for target in TARGETS for word in ("--target", target)]
        line = ["quantize", str(run.path), *asked, f"gates.max_drop={MAX_DROP}", *changed]
        said = tlexport(line, cwd=work, timeout=TIMEOUT)
        seconds = run.manifest["stages"]["quantize"]["seconds"]
        held = {"git": code, "seconds": seconds, "said": said, "settings": today | {"max_drop": MAX_DROP}}
        write_json(record, held)
    searched = {found["graph"]: found for found in held["said"]["searches"]}
    for flavour in ("cpu", "trt"):
        name, graph = f"int8-{flavour}", run / f"graphs/int8-{flavour}.onnx"
        search = searched.get(name, {})
        settings = held["settings"] | {key: search.get(key) for key in ("kept", "evaluations", "note")}
        if graph.is_file():
            yield Made(OURS, flavour, graph, held["seconds"], settings, {})
        else:
            reason = held["said"]["refused"].get(name, "no graph was made")
            yield Made(OURS, flavour, None, held["seconds"], settings, {}, reason)


def rival(maker: str, flavour: str, run: Run, options: argparse.Namespace, folder: Path) -> Made:
    """A maker's graph from the run's FP32 graph and calibration samples, in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = folder / f"{maker}-{flavour}.onnx"
    report = graph.with_suffix(".json")
    inputs = {
        "fp32": run / "graphs/fp32.onnx",
        "calibration": run / "reference/calibration.npy",
        "validation": run / "reference/validation",
    }
    script = ROOT / "bench/quantize_rivals.py"
    interpreter = sys.executable if maker == "onnxruntime" else str(options.competitors or sys.executable)
    key = {name: digest(path) for name, path in (inputs | {"script": script}).items()}
    key["fp32"] = computation(inputs["fp32"])
    found = json.loads(report.read_text()) if report.is_file() else {}
    if found.get("key") != key or "missing" in found:
        graph.unlink(missing_ok=True)
        report.unlink(missing_ok=True)
        # A copy: modelopt writes the shapes that it infers into the file it is given.
        copy = graph.with_suffix(".fp32.onnx")
        shutil.copyfile(inputs["fp32"], copy)
        inputs["fp32"] = copy
        line = [interpreter, str(script), maker, flavour, "--metric", run.recipe.metric, "--out", str(graph)]
        line += [word for name, path in inputs.items() for word in (f"--{name}", str(path.resolve()))]
        line += ["--max-drop", str(MAX_DROP), *(["--vnni"] if machine.has_vnni() else [])]
        say(f"$ {maker} ({flavour})")
        found = finished(line, folder, report) | {"key": key}
        write_json(report, found)
        copy.unlink()
    reason = found.get("missing") or found.get("failed") or ""
    made = graph if graph.is_file() and not reason else None
    return Made(
        maker,
        flavour,
        made,
        found.get("seconds"),
        found.get("settings", {}),
        found.get("versions", {}),
        reason,
    )


def computation(graph: Path) -> str:
    """SHA-256 of what a graph computes: a newer tlexport may write other notes beside the same nodes."""
    model = onnx.load(graph)
    del model.graph.value_info[:]
    for entry in (model, model.graph, *model.graph.node):
        entry.ClearField("metadata_props")
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def finished(line: list[str], folder: Path, report: Path) -> dict[str, Any]:
    """The rival's report; `failed` with its last words where it ended without one."""
    try:
        done = subprocess.run(
            line, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"did not end within {TIMEOUT:g} s and was stopped"}
    if done.returncode or not report.is_file():
        said = [text.strip() for text in done.stderr.splitlines() if text.strip()]
        return {"failed": f"exit code {done.returncode}: {said[-1][:300] if said else 'nothing was said'}"}
    document: dict[str, Any] = json.loads(report.read_text())
    return document


def merged(cases: dict[str, Any], out: Path) -> dict[str, Any]:
    """This call's cases and those that the file already holds, in CASES' order."""
    held: dict[str, Any] = json.loads(out.read_text())["cases"] if out.is_file() else {}
    every = held | cases
    return {name: every[name] for name in CASES if name in every}


def goals_of(cases: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of tlexport's graphs, and of each rival that has one to compare with."""
    found = []
    for name, case in cases.items():
        for row in case["graphs"]:
            what = f"{name}: INT8 {row['flavour']}"
            if row["maker"] != OURS:
                if row["beyond"] is not None:
                    # One flip of n is 1 / n, and the difference of two means a rounding more.
                    limit = round(case["one_flip"], 12)
                    beyond = {end: round(value, 12) for end, value in row["beyond"].items()}
                    found.append(goal(f"{what} drop beyond {row['maker']}'s", beyond, limit, at_least=False))
            elif row["drop"] is None:  # no graph: nothing runs in INT8
                found.append(goal(f"{what} share of operations", 0.0, MIN_SHARE, at_least=True))
            else:
                drop = {"ratio": row["drop"], "low": row["drop_low"], "high": row["drop_high"]}
                found.append(goal(f"{what} drop", drop, MAX_DROP, at_least=False))
                found.append(goal(f"{what} drop at worst", row["drop_high"], MAX_DROP, at_least=False))
                found.append(goal(f"{what} share of operations", row["int8_macs"], MIN_SHARE, at_least=True))
    return found


def show(cases: dict[str, Any]) -> None:
    rows = []
    for name, case in cases.items():
        for row in case["graphs"]:
            numbers = ["-"] * 5 if row["drop"] is None else [
                f"{row['drop']:+.4f} ({row['drop_low']:+.4f} to {row['drop_high']:+.4f})",
                row["flips"],
                f"{row['int8_macs']:.1%}",
                f"{row['size_bytes'] / 1e6:.1f}",
                f"{row['beyond']['ratio']:+.4f}" if row["beyond"] else "-",
            ]  # fmt: skip
            seconds = "-" if row["seconds"] is None else f"{row['seconds']:.1f}"
            reference = f"{case['metric']} {case['reference']:.4f}"
            rows.append(
                [name, reference, row["flavour"], row["maker"], *numbers, seconds, row["reason"] or "-"]
            )
    table(
        [
            "case",
            "fp32",
            "flavour",
            "maker",
            "drop",
            "flips",
            "INT8",
            "MB",
            "tlexport beyond",
            "seconds",
            "note",
        ],
        rows,
    )


def main() -> None:
    parser = arguments("quantize", __doc__ or "")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder that holds the data sets; weights/ beside it"
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(CASES), help="some of the cases; results are merged"
    )
    parser.add_argument(
        "--work", type=Path, help="keep runs and graphs here (default: a temporary directory)"
    )
    parser.add_argument(
        "--competitors", type=Path, help="interpreter that has modelopt and nncf (default: this one)"
    )
    options = parser.parse_args()
    started, document = time.monotonic(), stamp("quantize", parser, options)
    out = destination("quantize", options)
    same = {key: document[key] for key in ("date", "git", "machine", "versions", "quick")}
    with tempfile.TemporaryDirectory(prefix="tlexport-quantize-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for name in options.only or CASES:
            say(f"{name}:")
            result = measured(name, CASES[name], options, work)
            document["cases"] = merged({name: result | same}, out)
            # What is done stays if a later case fails.
            finish(document, goals_of(document["cases"]), out, started)
    show(document["cases"])


if __name__ == "__main__":
    main()
