"""What pretraining buys: the test metric against the number of labelled training rows, pretrained beside from scratch.

Per modality a source task without labels is learned once a seed (once in all where the source has no split in common with the
target), then the same recipe is fine-tuned on 50, 200, 1000 and all training rows, from the pretrained weights and from random
ones, over the same seeds: the same rows, the same split, so that differences are paired.

Result: `cases` {name: {metric, sizes [..], pretrained [[value a seed] a size], scratch [...], gain [{ratio, low, high} a size],
pretrain_seconds}}; `gain` is the mean paired difference (positive: pretraining is better) with Student's t interval (95%).
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
from common import ROOT, arguments, destination, finish, overrides, say, stamp, table, tlexport

from tlexport.modalities.metrics import HIGHER_IS_BETTER

TIMEOUT = 3000.0  # of one command
DATA = Path(os.environ.get("TLEXPORT_SHARED", ROOT.parent / "shared")) / "data"
SIZES = (50, 200, 1000, 0)  # training rows; 0: all


@dataclass(frozen=True)
class Curve:
    """A target recipe and the source it is pretrained on; `own_split`: source and target are split by the same seed."""

    recipe: str
    data: str
    source: str
    source_data: str
    own_split: bool
    change: dict[str, Any] = field(default_factory=dict)


ZINC = "molecules/zinc_clean_leads_100k.csv.gz"
CURVES = {
    "credit": Curve(
        "credit-scoring",
        "credit/uci_credit_card_default.csv",
        "credit-pretrain",
        "credit/uci_credit_card_default.csv",
        own_split=True,
    ),
    "volatility": Curve("volatility", "market_ohlcv", "market-pretrain", "market_ohlcv", own_split=False),
    "bace": Curve("drug-activity", "molecules/bace.csv", "molecule-pretrain", ZINC, own_split=False),
    "esol": Curve(
        "drug-property", "molecules/delaney-processed.csv", "molecule-pretrain", ZINC, own_split=False
    ),
}


def measured(
    name: str, data: Path, work: Path, seeds: list[int], sizes: list[int], quick: bool
) -> dict[str, Any]:
    """Every size and seed of one curve, both ways."""
    curve = CURVES[name]
    sets = ["--set", "quick"] if quick else []
    values: dict[str, list[list[float]]] = {"pretrained": [], "scratch": []}
    seconds, metric, available = [], "", 0
    for size in sizes:
        for kind in values:
            values[kind].append([])
        for seed in seeds:
            source = f"runs/{curve.source}" + (f"-{seed}" if curve.own_split else "")
            words = [
                "pretrain",
                curve.source,
                f"data.path={data / curve.source_data}",
                *sets,
                "--out",
                source,
            ]
            seconds.append(
                tlexport([*words, *seeded(seed, curve.own_split)], cwd=work, timeout=TIMEOUT)["seconds"]
            )
            for kind, weights in (("pretrained", source), ("scratch", "none")):
                change = curve.change | {"backbone.weights": weights, "baselines": "[]"}
                change |= {"data.train_size": size} if size else {}
                out = f"runs/{name}-{size or 'all'}-{seed}-{kind}"
                words = [
                    "finetune",
                    curve.recipe,
                    f"data.path={data / curve.data}",
                    *overrides(change),
                    *sets,
                ]
                tuned = tlexport([*words, *seeded(seed, True), "--out", out], cwd=work, timeout=TIMEOUT)
                metric, available = tuned["metric"], max(available, tuned["samples"]["train"])
                values[kind][-1].append(tuned["metrics"]["test"][metric])
    sign = 1.0 if HIGHER_IS_BETTER[metric] else -1.0
    gain = [paired(p, s, sign) for p, s in zip(values["pretrained"], values["scratch"], strict=True)]
    sizes_shown = [size or available for size in sizes]
    return {"metric": metric, "sizes": sizes_shown, **values, "gain": gain, "pretrain_seconds": max(seconds)}


def seeded(seed: int, varies: bool) -> list[str]:
    return ["--seed", str(seed)] if varies else []


def paired(one: list[float], other: list[float], sign: float) -> dict[str, float | None]:
    """Mean of sign * (one - other) over seeds, with Student's t interval where there are at least three."""
    from scipy.stats import t

    difference = sign * (np.array(one) - np.array(other))
    mean = float(difference.mean())
    if len(difference) < 3:
        return {"ratio": mean, "low": None, "high": None}
    half = float(t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / len(difference) ** 0.5)
    return {"ratio": mean, "low": mean - half, "high": mean + half}


def show(curves: dict[str, Any]) -> None:
    rows = []
    for name, curve in curves.items():
        for index, size in enumerate(curve["sizes"]):
            gain = curve["gain"][index]
            spread = "" if gain["low"] is None else f" ({gain['low']:+.4f} to {gain['high']:+.4f})"
            means = [f"{np.mean(curve[kind][index]):.4f}" for kind in ("pretrained", "scratch")]
            rows.append([name, curve["metric"], size, *means, f"{gain['ratio']:+.4f}{spread}"])
    table(["curve", "metric", "rows", "pretrained", "scratch", "gain"], rows)


def main() -> None:
    parser = arguments("pretraining", __doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds the data sets")
    parser.add_argument(
        "--only", nargs="+", choices=list(CURVES), help="some of the curves; results are merged"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=list(SIZES), help="labelled training rows; 0: all of them"
    )
    parser.add_argument("--work", type=Path, help="keep runs here (default: a temporary directory)")
    options = parser.parse_args()
    started, document = time.monotonic(), stamp("pretraining", parser, options)
    out = destination("pretraining", options)
    seeds = list(range(1 if options.quick else options.seeds))
    sizes = [50, 0] if options.quick else options.sizes
    with tempfile.TemporaryDirectory(prefix="tlexport-pretraining-") as temporary:
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        for name in options.only or CURVES:
            say(f"{name}:")
            result = measured(name, options.data.resolve(), work, seeds, sizes, options.quick)
            held: dict[str, Any] = json.loads(out.read_text())["cases"] if out.is_file() else {}
            every = held | {name: result}
            document["cases"] = {known: every[known] for known in CURVES if known in every}
            finish(document, [], out, started)  # what is done stays
    show(document["cases"])


if __name__ == "__main__":
    main()
