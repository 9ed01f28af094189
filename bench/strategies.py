"""`strategy: auto` against the full grid: how much metric its choice costs, and how much of the grid's time the race took.

Every scenario is fine-tuned by each candidate to the end (the grid) and once with strategy auto, with the same seed. Regret is
how much worse auto's choice is than the grid's best on the validation split's metric, as a share of the best; both are also given
on the test split. Time is training time as measured, auto's with the winner trained to its end.

Result: `cases` {name: {metric, grid {strategy: {val, test, seconds}}, auto {strategy, val, test, seconds, evidence}, regret, share}}.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, arguments, destination, finish, goal, overrides, say, stamp, table, tlexport

from tlexport.modalities.metrics import HIGHER_IS_BETTER

TIMEOUT = 3000.0  # of one command
DATA = Path(os.environ.get("TLEXPORT_SHARED", ROOT.parent / "shared")) / "data"
STRATEGIES = ("probe", "partial", "full", "scratch")
REGRET, SHARE = 0.01, 0.4


@dataclass(frozen=True)
class Case:
    recipe: str
    data: str = ""
    change: dict[str, Any] = field(default_factory=dict)
    pretrain: str = ""
    pretrain_data: str = ""


ZINC = "molecules/zinc_clean_leads_100k.csv.gz"
CASES = {
    "digits": Case("digits-quickstart"),
    "chest-xray": Case("chest-xray", "pneumoniamnist/pneumoniamnist.npz", {"data.image_size": 64}),
    "insects": Case("insects", "hymenoptera", {"data.image_size": 160, "transfer.epochs": 8}),
    "credit-uci": Case(
        "credit-scoring",
        "credit/uci_credit_card_default.csv",
        pretrain="credit-pretrain",
        pretrain_data="credit/uci_credit_card_default.csv",
    ),
    "volatility": Case(
        "volatility", "market_ohlcv", pretrain="market-pretrain", pretrain_data="market_ohlcv"
    ),
    "risk-events": Case(
        "risk-events", "market_ohlcv", pretrain="market-pretrain", pretrain_data="market_ohlcv"
    ),
    "bace": Case("drug-activity", "molecules/bace.csv", pretrain="molecule-pretrain", pretrain_data=ZINC),
    "esol": Case(
        "drug-property", "molecules/delaney-processed.csv", pretrain="molecule-pretrain", pretrain_data=ZINC
    ),
}


def measured(name: str, data: Path, work: Path, quick: bool) -> dict[str, Any]:
    case = CASES[name]
    sets = ["--set", "quick"] if quick else []
    start = []
    if case.pretrain:
        words = ["pretrain", case.pretrain, f"data.path={data / case.pretrain_data}", *sets]
        tlexport([*words, "--out", f"runs/{case.pretrain}"], cwd=work, timeout=TIMEOUT)
        start = [f"backbone.weights=runs/{case.pretrain}"]
    change = overrides({"baselines": "[]"} | case.change) + start
    change += [f"data.path={data / case.data}"] if case.data else []
    found: dict[str, Any] = {}
    metric = ""
    for strategy in (*STRATEGIES, "auto"):
        words = [
            "finetune",
            case.recipe,
            *change,
            *sets,
            "--strategy",
            strategy,
            "--out",
            f"runs/{name}-{strategy}",
        ]
        tuned = tlexport(words, cwd=work, timeout=TIMEOUT)
        metric = tuned["metric"]
        found[strategy] = {
            "strategy": tuned["strategy"],
            "val": tuned["metrics"]["val"][metric],
            "test": tuned["metrics"]["test"][metric],
            "seconds": tuned["seconds"],
            "evidence": tuned["race"],
        }
    auto = found.pop("auto")
    sign = 1.0 if HIGHER_IS_BETTER[metric] else -1.0
    best = {split: max(sign * grid[split] for grid in found.values()) for split in ("val", "test")}
    regret = {split: max(0.0, (best[split] - sign * auto[split]) / abs(best[split])) for split in best}
    share = auto["seconds"] / sum(grid["seconds"] for grid in found.values())
    return {"metric": metric, "grid": found, "auto": auto, "regret": regret, "share": share}


def goals_of(cases: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, case in cases.items():
        found.append(
            goal(
                f"{name}: regret of strategy auto (validation)", case["regret"]["val"], REGRET, at_least=False
            )
        )
        found.append(
            goal(f"{name}: time of strategy auto over the full grid's", case["share"], SHARE, at_least=False)
        )
    return found


def show(cases: dict[str, Any]) -> None:
    rows = [
        [
            name,
            case["metric"],
            *(f"{case['grid'][s]['val']:.4f}" for s in STRATEGIES),
            case["auto"]["strategy"],
            f"{case['regret']['val']:.2%}",
            f"{case['regret']['test']:.2%}",
            f"{case['share']:.2f}",
        ]
        for name, case in cases.items()
    ]
    table(["case", "metric", *STRATEGIES, "auto", "regret val", "regret test", "time share"], rows)


def main() -> None:
    parser = arguments("strategies", __doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds the data sets")
    parser.add_argument(
        "--only", nargs="+", choices=list(CASES), help="some of the cases; results are merged"
    )
    parser.add_argument("--work", type=Path, help="keep runs here (default: a temporary directory)")
    options = parser.parse_args()
    started, document = time.monotonic(), stamp("strategies", parser, options)
    out = destination("strategies", options)
    with tempfile.TemporaryDirectory(prefix="tlexport-strategies-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for name in options.only or CASES:
            say(f"{name}:")
            result = measured(name, options.data.resolve(), work, options.quick)
            held: dict[str, Any] = json.loads(out.read_text())["cases"] if out.is_file() else {}
            every = held | {name: result}
            document["cases"] = {known: every[known] for known in CASES if known in every}
            finish(document, goals_of(document["cases"]), out, started)  # what is done stays
    show(document["cases"])


if __name__ == "__main__":
    main()
