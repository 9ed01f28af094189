"""How often the gates cry wolf, and what they catch: many gate runs whose truth is known.

accuracy  Real answers (a logistic regression's on digits it has not seen, odd or even), drawn anew for each gate run; both sides
          get noise of their own on the logits, as quantisation does, so that the true drop is 0. A drop is planted by giving a
          share of the samples another sample's answer. 500 gate runs a cell, about 25 minutes in all.
latency   A real graph in ONNX Runtime against itself, and against itself slowed by 10% (a call and then waiting; the wrapper that
          both sides carry leaves about 8% of what is timed, see `ratio`), side by side, and with a fifth of the runs beside a
          neighbour that works and rests in turns; about 40 minutes.
sessions  The same against stored baselines: fresh processes in one long stream, cut into occasions of 10; the gate run holds an
          occasion against the one half the stream earlier, so that what drifts between them counts. About an hour.

The rules were chosen on other rounds, sessions and samples, recorded before, and are held to these. What other rules would
have said of the same rounds and sessions stands beside. With --only parts are measured alone and merged into the file.

Result: `accuracy`, `latency`, `sessions`: rows with `runs` and what was seen of them; a share is {ratio, low, high} with
Clopper and Pearson's 95% interval; and `measured` {part: {date, git, machine, busy_percent, seconds}}.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import arguments, destination, finish, goal, say, stamp, table
from gate_cases import build, neighbour, population

from tlexport.backends import isolation
from tlexport.evidence.accuracy.bootstrap import Metric
from tlexport.evidence.gate import accuracy as accuracy_gate
from tlexport.evidence.gate import rule, sessions
from tlexport.modalities.metrics import METRICS
from tlexport.progress import Silent
from tlexport.stages import gate

PARTS = ("accuracy", "latency", "sessions")
MARGIN = 0.01  # recipes' default for gates.max_drop
SIZES = (500, 2000)
SLOWER = 1.10
GATE_S = {1.0: 1.5, SLOWER: 4.0}  # of measuring in a gate run side by side; users have 30
# Of the gate runs of a cell one in so many, by neighbour and truth.
FEWER = {(False, 1.0): 1, (False, SLOWER): 4, (True, 1.0): 5, (True, SLOWER): 10}
SESSION_S = 0.25  # of measuring in a session
FIRST_SEED = 1000
RESAMPLES = 1000
HISTORY = 4  # accepted runs, where there is history


def main() -> None:
    parser = arguments("gate", __doc__ or "")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=500, help="gate runs of a cell")
    parser.add_argument("--pairs", type=int, default=100, help="pairs of occasions in the stream of sessions")
    options = parser.parse_args()
    if options.quick:
        options.runs, options.pairs = 2, 2
    out = destination("gate", options)
    for part in options.only:
        started, document = time.monotonic(), stamp("gate", parser, options)
        with tempfile.TemporaryDirectory(prefix="tlexport-gate-") as folder:
            found = MEASURE[part](options, Path(folder))
        about = {key: document[key] for key in ("date", "git", "machine", "busy_percent")}
        about["seconds"] = round(time.monotonic() - started, 1)
        held = json.loads(out.read_text()) if out.is_file() else {}
        parts = {name: held.get(name, []) for name in PARTS} | {part: found}
        document |= parts | {"measured": held.get("measured", {}) | {part: about}}
        finish(document, goals_of(parts), out, started)
    show(parts)


def accuracy(options: Any, folder: Path) -> list[dict[str, Any]]:
    """A row for each metric, number of samples and true drop, and what each tolerance says."""
    real, rows = population(), []
    sizes = SIZES[:1] if options.quick else SIZES
    for metric in ("accuracy", "auc"):
        for n in sizes:
            for times in (0, 1, 2):
                replaced = real.replaced(metric, times * MARGIN) if times else 0.0
                rng = np.random.default_rng([FIRST_SEED, n, times, len(metric)])
                gates = [
                    gated(metric, *real.sample(n, replaced, rng), index) for index in range(options.runs)
                ]
                verdicts = {f"tolerance {t:g}": shares([of[t] for of in gates]) for t in (0.0, MARGIN)}
                rows.append(
                    {
                        "metric": metric,
                        "samples": n,
                        "true_drop": times * MARGIN,
                        "runs": options.runs,
                        "decisions_changed": float(np.mean([of["changed"] for of in gates])),
                        **verdicts,
                    }
                )
                say(f"accuracy: {metric}, n = {n}, true drop {times * MARGIN:g}: {brief(verdicts)}")
    return rows


def gated(metric: str, labels: np.ndarray, old: np.ndarray, new: np.ndarray, seed: int) -> dict[Any, Any]:
    """The verdicts at both tolerances. The interval is the same, so it is made once."""
    prepare: Callable[..., Metric] = METRICS[metric]
    right = [answers.argmax(axis=1) == labels for answers in (old, new)]
    test = accuracy_gate.worse(right[0], right[1]) if metric == "accuracy" else None
    strict = accuracy_gate.compare(
        prepare(labels, old),
        prepare(labels, new),
        len(labels),
        name=metric,
        against="itself",
        metric=metric,
        tolerance=0.0,
        resamples=RESAMPLES if len(labels) <= RESAMPLES else len(labels),
        seed=seed,
        mcnemar_p=test,
    )
    assert strict.low is not None and strict.high is not None
    allowed = rule.reading(strict.low, strict.high, MARGIN)
    if allowed == "fail" and strict.verdict != "fail":
        allowed = "undecided"
    changed = float(np.mean(old.argmax(axis=1) != new.argmax(axis=1)))
    return {0.0: strict.verdict, MARGIN: allowed, "changed": changed}


def latency(options: Any, folder: Path) -> list[dict[str, Any]]:
    """A row for each truth and each neighbour; the gate is the command's own, its process and all."""
    rows = []
    for present in (False, True):
        for slower in (1.0, SLOWER):
            old, new = build(folder, "small"), build(folder, "small", slower)
            # A slow-down is caught so much more often than not that fewer runs tell.
            runs = max(2, options.runs // FEWER[present, slower])
            results = []
            with neighbour(present, FIRST_SEED):
                for index in range(runs):
                    seed = FIRST_SEED + index
                    results.append(
                        gate.beside(
                            new,
                            old,
                            Silent(),
                            path=folder,
                            against=folder,
                            tolerance=0.0,
                            seconds=0.3 if options.quick else GATE_S[slower],
                            seed=seed,
                        )
                    )
                    if (index + 1) % 50 == 0:
                        say(f"latency: {index + 1}/{runs}")
            verdicts = [result.verdicts[0] for result in results]
            others = [np.log(np.array(of.new_ms) / np.array(of.old_ms)) for of in results]
            row = {
                "slower": slower,
                "neighbour": present,
                "runs": runs,
                "rounds": float(np.median([verdict.count for verdict in verdicts])),
                "gate_seconds": float(np.median([result.seconds for result in results])),
                "ratio": float(np.median([verdict.value or np.nan for verdict in verdicts])),
                "half_width": float(
                    np.median([np.log(v.high / v.low) / 2 for v in verdicts if v.low and v.high])
                ),
                "tolerance 0": shares([verdict.verdict for verdict in verdicts]),
                "tolerance 0.05": shares(
                    [rule.reading(v.low or 0, v.high or np.inf, 1.05) for v in verdicts]
                ),
                "other rules' alarms at tolerance 0": {
                    name: share(sum(low(values) > 0 for values in others), runs)
                    for name, low in RIVALS.items()
                },
            }
            rows.append(row)
            say(f"latency: {row}")
    return rows


def stream(options: Any, folder: Path) -> list[dict[str, Any]]:
    """Sessions against stored baselines; a row for each graph, truth and amount of history."""
    rows = []
    each_occasion = rule.FEWEST_SESSIONS if options.quick else gate.SESSIONS
    for graph in ("small",) if options.quick else ("small", "wide"):
        pairs = options.pairs if graph == "small" else max(2, options.pairs // 2)
        builds = {1.0: build(folder, graph), SLOWER: build(folder, graph, SLOWER)}
        took, stored, later = [], [], {1.0: [], SLOWER: []}
        for index in range(2 * pairs):
            for slower, of in builds.items() if index >= pairs else ((1.0, builds[1.0]),):
                started = time.monotonic()
                seed = FIRST_SEED + each_occasion * index
                occasion = tuple(one_session(of, seed + each) for each in range(each_occasion))
                took.append(time.monotonic() - started)
                (later[slower] if index >= pairs else stored).append(occasion)
            if (index + 1) % 10 == 0:
                say(f"sessions: {graph}, {index + 1}/{2 * pairs} occasions")
        for slower, new in later.items():
            for past in (0, HISTORY):
                held = [[stored[index], *accepted(stored, index, past)] for index in range(pairs)]
                rows.append(
                    {
                        "graph": graph,
                        "slower": slower,
                        "history": past,
                        "runs": pairs,
                        "occasion_seconds": float(np.median(took)),
                        **judged(held, new),
                    }
                )
                say(f"sessions: {rows[-1]}")
    return rows


def one_session(of: sessions.Build, seed: int) -> rule.Session:
    return isolation.call(sessions.session, of, SESSION_S, seed, timeout=600, what="a session")


def accepted(stored: Sequence[Any], index: int, past: int) -> list[Any]:
    """The occasions after the baseline, in the order made; the last ones of the stream take those before."""
    after = [*stored[index + 1 :], *reversed(stored[:index])]
    return after[:past]


def judged(held: Sequence[Sequence[Any]], new: Sequence[Any]) -> dict[str, Any]:
    """What the rule says at both tolerances, and others of the same sessions at none."""
    verdicts: dict[float, list[str]] = {0.0: [], rule.TOLERANCE: []}
    others: dict[str, list[bool]] = {
        "Welch's t of the times": [],
        "Welch's t of times over the control's": [],
    }
    ratios, moved = [], 0
    for past, now in zip(held, new, strict=True):
        for tolerance, of in verdicts.items():
            verdict = rule.against_baseline(past, now, name="", against="", tolerance=tolerance)
            of.append(verdict.verdict)
        ratios.append(verdict.value)
        moved += bool(rule.machine_moved(past[0], now))
        before, after = (np.log([session.seconds for session in side]) for side in (past[0], now))
        control = [np.log([session.control for session in side]) for side in (past[0], now)]
        plain, divided = others
        others[plain].append(rule.welch(before, after, rule.CONFIDENCE)[1] > 0)
        others[divided].append(rule.welch(before - control[0], after - control[1], rule.CONFIDENCE)[1] > 0)
    return {
        "ratio": float(np.median(ratios)),
        "machine_moved": share(moved, len(new)),
        **{f"tolerance {tolerance:g}": shares(of) for tolerance, of in verdicts.items()},
        "other rules' alarms at tolerance 0": {name: share(sum(of), len(of)) for name, of in others.items()},
    }


def bootstrap_of(statistic: Callable[..., np.ndarray]) -> Callable[[np.ndarray], float]:
    """The percentile bootstrap's lower end of a statistic of the rounds' log ratios."""

    def low(values: np.ndarray) -> float:
        drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
        return float(np.quantile(statistic(values[drawn], axis=1), (1 - rule.CONFIDENCE) / 2))

    return low


def student(values: np.ndarray) -> float:
    from scipy.special import stdtrit

    spread = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - stdtrit(len(values) - 1, (1 + rule.CONFIDENCE) / 2) * spread)


RIVALS = {
    "percentile bootstrap of the mean": bootstrap_of(np.mean),
    "percentile bootstrap of the median": bootstrap_of(np.median),
    "Student's t": student,
}
MEASURE = {"accuracy": accuracy, "latency": latency, "sessions": stream}


def shares(verdicts: Sequence[str]) -> dict[str, Any]:
    return {kind: share(list(verdicts).count(kind), len(verdicts)) for kind in ("pass", "fail", "undecided")}


def share(count: int, runs: int, confidence: float = 0.95) -> dict[str, float]:
    """With Clopper and Pearson's interval."""
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = float(betaincinv(count, runs - count + 1, tail)) if count else 0.0
    high = float(betaincinv(count + 1, runs - count, 1 - tail)) if count < runs else 1.0
    return {"ratio": count / runs, "low": low, "high": high}


def goals_of(parts: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    found = []
    for row in parts["accuracy"]:
        where = f"{row['metric']} on {row['samples']} samples"
        strict, allowed = row["tolerance 0"], row[f"tolerance {MARGIN:g}"]
        if row["true_drop"] == 0:
            found += within(f"{where}: accuracy gate's false alarms", strict["fail"])
        if row["true_drop"] == 2 * MARGIN:
            if row["samples"] == max(SIZES):
                what = f"{where}: accuracy gate catches twice the margin"
                found.append(goal(what, strict["fail"], 0.95, at_least=True))
            what = f"{where}: accuracy gate lets twice the margin pass"
            found.append(goal(what, allowed["pass"], 0.05, at_least=False))
    for row in (*parts["latency"], *parts["sessions"]):
        strict = row["tolerance 0"]["fail"]
        if row["slower"] == 1.0:
            found += within(f"{told(row)}: latency gate's false alarms", strict)
        else:
            found.append(goal(f"{told(row)}: latency gate catches 10%", strict, 0.95, at_least=True))
    return found


def told(row: dict[str, Any]) -> str:
    """Of a latency gate: what was held against what."""
    if "graph" not in row:
        return "side by side, with a neighbour" if row["neighbour"] else "side by side"
    return f"stored baseline, {row['graph']} graph, " + (
        f"{row['history']} runs since" if row["history"] else "no history"
    )


def within(what: str, found: dict[str, float]) -> list[dict[str, Any]]:
    """Between 1% and 5%."""
    return [
        goal(f"{what}, not more", found, 0.05, at_least=False),
        goal(f"{what}, not fewer", found, 0.01, at_least=True),
    ]


def brief(verdicts: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: " + ", ".join(f"{kind} {of['ratio']:.1%}" for kind, of in kinds.items())
        for name, kinds in verdicts.items()
    )


def show(parts: dict[str, list[dict[str, Any]]]) -> None:
    rows = []
    for part, of in parts.items():
        for row in of:
            keys = ("metric", "samples", "true_drop", "graph", "slower", "neighbour", "history")
            truth = ", ".join(f"{key} {row[key]}" for key in keys if key in row)
            for name, kinds in row.items():
                if name.startswith("tolerance"):
                    rows.append(
                        [part, truth, row["runs"], name, *(f"{kinds[k]['ratio']:.1%}" for k in kinds)]
                    )
    table(["part", "truth", "runs", "at", "pass", "fail", "undecided"], rows)


if __name__ == "__main__":
    main()
