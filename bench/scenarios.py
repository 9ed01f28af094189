"""Every scenario on real data, through the real command line, beside its plain baselines.

Each scenario is fine-tuned once a seed (or once a fold of the published split); the first run is built for cpu and sm89.
Data stand in --data (credit/, market_ohlcv/, molecules/ ...); other sets come with packages. Results of several calls (--only) are
merged into one file; with --work the runs are kept, and a call that was stopped resumes.

Result: `cases` {name: {recipe, data, metric, runs [{seed, fold, val, test, seconds, baselines {name: test}, headline}],
mean {metric: {ratio, low, high}}, baselines {name: {metric: mean}}, lead of the best baseline, chosen, variants, ...}}.
The interval of a mean over several runs is Student's t over the runs; of a single run it is null.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, arguments, destination, finish, goal, overrides, say, stamp, table, tlexport

from tlexport.modalities.metrics import HIGHER_IS_BETTER

TARGETS = ("cpu", "sm89")
TIMEOUT = 3000.0  # of one command
GATE_EXIT = 10  # build's, where a target has no passing variant: a result, too
DATA = Path(os.environ.get("TLEXPORT_SHARED", ROOT.parent / "shared")) / "data"
KEPT = (
    "name",
    "target",
    "precision",
    "metric",
    "drop",
    "drop_low",
    "drop_high",
    "flips",
    "p50_ms",
    "speedup",
)


@dataclass(frozen=True)
class Case:
    """A recipe on a data set. `folds` and `seeds` multiply; `limits`: metric -> (limit, at least)."""

    recipe: str
    data: str = ""  # in the folder --data; empty: the recipe's own
    change: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    folds: int | None = None
    pretrain: str = ""  # recipe that is run first, on `pretrain_data`, and fine-tuned from
    pretrain_data: str = ""
    limits: dict[str, tuple[float, bool]] = field(default_factory=dict)
    beats: tuple[str, ...] = ()  # baselines that must not be better on the mean
    packaged: bool = False  # `data` names a set that comes with a package


MARKET = "market_ohlcv"
CASES = {
    "credit-uci": Case(
        "credit-scoring",
        "credit/uci_credit_card_default.csv",
        folds=5,
        limits={"auc": (0.779, True)},
    ),
    "credit-german": Case("credit-german", seeds=(0, 1, 2, 3, 4)),
    "breast-cancer": Case("breast-cancer", seeds=(0, 1, 2, 3, 4), limits={"auc": (0.99, True)}),
    "volatility": Case(
        "volatility",
        MARKET,
        seeds=(0, 1, 2),
        pretrain="market-pretrain",
        pretrain_data=MARKET,
        limits={"qlike": (0.350, False)},
        beats=("har", "ewma", "garch"),
    ),
    "volatility-week": Case("volatility-week", MARKET, seeds=(0, 1, 2), beats=("har", "ewma", "garch")),
    "volatility-sp500": Case("volatility", "arch/sp500", {"transfer.epochs": 12}, packaged=True),
    "price-direction": Case("price-direction", MARKET, seeds=(0, 1, 2)),
    "risk-drawdown": Case("risk-events", MARKET, seeds=(0, 1, 2), beats=("har_logistic",)),
    "risk-spike": Case(
        "risk-events",
        MARKET,
        {"data.series.target": "spike", "data.series.threshold": 2, "data.series.horizon": 5},
        beats=("har_logistic",),
    ),
    "drug-bace": Case("drug-activity", "molecules/bace.csv", seeds=(0, 1, 2, 3, 4), beats=("forest",)),
    "drug-tox21": Case("drug-tox21", "molecules/tox21.csv", beats=("forest",)),
    "drug-esol": Case(
        "drug-property",
        "molecules/delaney-processed.csv",
        seeds=(0, 1, 2, 3, 4),
        limits={"rmse": (1.05, False)},
        beats=("forest",),
    ),
    "chest-xray": Case("chest-xray", "pneumoniamnist/pneumoniamnist.npz"),
    "pathology": Case("pathology", "blood_cells/blood_cells.npz"),
    "cifar10": Case("cifar10-resnet50", "cifar10_subset/cifar10_subset.npz"),
    "gi-lesion": Case("gi-lesion", "hymenoptera"),
}


def measured(name: str, data: Path, work: Path, targets: list[str], quick: bool) -> dict[str, Any]:
    """All runs of one case, and the build of the first."""
    case = CASES[name]
    sets = ["--set", "quick"] if quick else []
    start = pretrained(case, data, work, sets)
    runs, tuned = [], {}
    for seed in case.seeds[:1] if quick else case.seeds:
        for fold in range(case.folds) if case.folds and not quick else [None]:
            label = f"{name}-{seed}" + ("" if fold is None else f"-{fold}")
            split = {} if fold is None else {"data.split.folds": case.folds, "data.split.fold": fold}
            change = overrides(case.change | split) + source(case, data) + start
            words = ["finetune", case.recipe, *change, *sets, "--seed", str(seed), "--out", f"runs/{label}"]
            tuned = tlexport(words, cwd=work, timeout=TIMEOUT)
            runs.append(
                {
                    "seed": seed,
                    "fold": fold,
                    "val": tuned["metrics"]["val"],
                    "test": tuned["metrics"]["test"],
                    "seconds": tuned["seconds"],
                    "strategy": tuned["strategy"],
                    "baselines": {b["name"]: b["metrics"]["test"] for b in tuned["baselines"]},
                    "leads": {
                        b["name"]: [b["lead"], b["lead_low"], b["lead_high"]] for b in tuned["baselines"]
                    },
                    "headline": tuned["headline"],
                }
            )
    first = f"{name}-{case.seeds[0]}" + ("-0" if case.folds and not quick else "")
    asked = [word for target in targets for word in ("--target", target)]
    words = ["build", f"runs/{first}", *asked, "--out", f"bundles/{name}"]
    built = tlexport(words, cwd=work, timeout=TIMEOUT, accept=(0, GATE_EXIT))
    if "variants" not in built:
        raise SystemExit(f"build of {name} gave no variants: {json.dumps(built)[:1000]}")
    plain = sorted({baseline for run in runs for baseline in run["baselines"]})
    return {
        "recipe": case.recipe,
        "data": case.data or "the recipe's own",
        "metric": tuned["metric"],
        "task": tuned["task"],
        "samples": tuned["samples"],
        "pretrained": bool(case.pretrain) or None,
        "runs": runs,
        "mean": means([run["test"] for run in runs]),
        "baselines": {
            b: means([run["baselines"][b] for run in runs if b in run["baselines"]]) for b in plain
        },
        "build_seconds": round(sum(built["seconds"].values()), 1),
        "reference": {key: built["reference"][key] for key in ("metric", "p50_ms", "size_bytes")},
        "chosen": built["chosen"],
        "failed": built["failed"],
        "notes": built.get("notes", []),
        "variants": [{key: v[key] for key in (*KEPT, "verdict", "reason")} for v in built["variants"]],
    }


def source(case: Case, data: Path) -> list[str]:
    return [f"data.path={case.data}"] if case.packaged else where(data, case.data)


def where(data: Path, name: str) -> list[str]:
    if not name:
        return []
    if not (data / name).exists():
        raise SystemExit(
            f"{name} is not in the folder that --data names ({data}); leave the case out with --only"
        )
    return [f"data.path={data / name}"]


def pretrained(case: Case, data: Path, work: Path, sets: list[str]) -> list[str]:
    """The override that starts from the case's pretrained run, which is made if it is not there."""
    if not case.pretrain:
        return []
    out = f"runs/{case.pretrain}"
    words = ["pretrain", case.pretrain, *where(data, case.pretrain_data), *sets, "--out", out]
    tlexport(words, cwd=work, timeout=TIMEOUT)
    return [f"backbone.weights={out}"]


def means(found: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Metric -> mean over the runs that define it, with Student's t interval (95%) where there are at least three."""
    from scipy.stats import t

    result: dict[str, dict[str, float | None]] = {}
    for metric in dict.fromkeys(name for one in found for name in one):
        values = np.array([one[metric] for one in found if metric in one])
        half = (
            float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
            if len(values) > 2
            else None
        )
        mean = float(values.mean())
        low, high = (None, None) if half is None else (mean - half, mean + half)
        result[metric] = {"ratio": mean, "low": low, "high": high}
    return result


def merged(cases: dict[str, Any], out: Path) -> dict[str, Any]:
    """This call's cases and those that the file already holds, in CASES' order."""
    held: dict[str, Any] = json.loads(out.read_text())["cases"] if out.is_file() else {}
    every = held | cases
    return {name: every[name] for name in CASES if name in every}


def goals_of(cases: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, result in cases.items():
        case = CASES[name]
        for metric, (limit, at_least) in case.limits.items():
            what = f"{name}: test {metric}" + (
                f", mean of {len(result['runs'])}" if len(result["runs"]) > 1 else ""
            )
            found.append(goal(what, result["mean"][metric], limit, at_least=at_least))
        for baseline in case.beats:
            limit = result["baselines"][baseline][result["metric"]]["ratio"]
            what = f"{name}: test {result['metric']}, not below {baseline}"
            found.append(
                goal(
                    what, result["mean"][result["metric"]], limit, at_least=HIGHER_IS_BETTER[result["metric"]]
                )
            )
    return found


def show(cases: dict[str, Any]) -> None:
    rows = []
    for name, result in cases.items():
        metric = result["metric"]
        plain = ", ".join(
            f"{b} {of[metric]['ratio']:.4f}" for b, of in result["baselines"].items() if metric in of
        )
        rows.append(
            [name, metric, f"{result['mean'][metric]['ratio']:.4f}", plain, result["chosen"].get("cpu", "-")]
        )
    table(["case", "metric", "test", "plain baselines", "chosen for cpu"], rows)


def main() -> None:
    parser = arguments("scenarios", __doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds the data sets")
    parser.add_argument(
        "--only", nargs="+", choices=list(CASES), help="some of the cases; results are merged"
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument(
        "--work", type=Path, help="keep runs and bundles here (default: a temporary directory)"
    )
    options = parser.parse_args()
    started, document = time.monotonic(), stamp("scenarios", parser, options)
    out = destination("scenarios", options)
    same = {key: document[key] for key in ("date", "git", "machine", "versions", "quick")}
    with tempfile.TemporaryDirectory(prefix="tlexport-scenarios-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for name in options.only or CASES:
            say(f"{name}:")
            result = measured(name, options.data.resolve(), work, options.targets, options.quick)
            document["cases"] = merged({name: result | same}, out)
            finish(document, goals_of(document["cases"]), out, started)  # what is done stays
    show(document["cases"])


if __name__ == "__main__":
    main()
