"""Write the README's table of numbers from bench/results/*.json, or with --check say whether it is up to date."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tlexport.modalities.metrics import HIGHER_IS_BETTER

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- numbers: written by bench/readme.py from bench/results -->", "<!-- /numbers -->"
ORDER = (
    "accuracy",
    "quantize",
    "scenarios",
    "pretraining",
    "strategies",
    "latency",
    "search_cost",
    "finetune",
    "startup",
    "memory",
    "open_loop",
    "serve",
    "soak",
    "gate",
    "report",
)
ALIKE = (
    "chosen over",
    "INT8 ",
    "accuracy gate",
    "latency gate",
)  # what follows a network's name in goals that are told in one row
RIVALS = ("onnxruntime", "nncf", "nncf-accuracy", "modelopt", "modelopt-max")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if the table is out of date"
    )
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    wanted = inserted(text, section())
    if options.check and wanted != text:
        sys.exit("README.md's numbers are not those of bench/results; run: python bench/readme.py")
    if not options.check:
        README.write_text(wanted, encoding="utf-8")


def inserted(text: str, table: str) -> str:
    """The text with what stands between the markers replaced."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def results() -> Iterator[dict[str, Any]]:
    """Each program's, and after it those of further machines (NAME.MACHINE.json), whose goals name theirs."""
    for name in ORDER:
        for path in (RESULTS / f"{name}.json", *sorted(RESULTS.glob(f"{name}.*.json"))):
            if not path.is_file():
                continue
            document = json.loads(path.read_text(encoding="utf-8"))
            if path.stem != name:
                for goal in document["goals"]:
                    goal["what"] += f" (on {document['machine']['cpu']})"
            yield document


def section() -> str:
    """One row a goal, missed ones included, and the machine they were measured on."""
    documents = list(results())
    lines = ["| what | measured | wanted | |", "|---|---|---|---|"]
    for document in documents:
        lines += [row(goal) for goal in worst_of_alike(document["goals"])]
    by_program = {document["program"]: document for document in reversed(documents)}
    for program, table in (
        ("accuracy", cases),
        ("quantize", quantised),
        ("scenarios", scenarios),
        ("pretraining", curves),
        ("strategies", strategies),
    ):
        lines += ["", *table(by_program[program]["cases"])] if program in by_program else []
    lines += ["", *on_a_gpu()]
    if "gate" in by_program:
        lines += ["", *gates(by_program["gate"])]
    machines = {
        (d["machine"]["cpu"], d["machine"]["usable_cores"], ", ".join(d["machine"]["isa"])) for d in documents
    }
    lines += ["", *(f"Machine: {cpu}, {cores} cores, {isa}." for cpu, cores, isa in sorted(machines))]
    lines += [
        "Intervals are 95%. Reproduce: " + ", ".join(f"`{command(document)}`" for document in documents) + "."
    ]
    return "\n".join(lines)


def worst_of_alike(goals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Goals that say the same of several networks, in one row: the one nearest to its limit, or furthest beyond."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for goal in goals:
        _, _, same = goal["what"].partition(": ")
        kinds.setdefault(same if same.startswith(ALIKE) else goal["what"], []).append(goal)
    return [told(alike) for alike in kinds.values()]


def told(alike: list[dict[str, Any]]) -> dict[str, Any]:
    """The worst of them, with how many there are and how many are missed."""
    worst = max(alike, key=lambda goal: (goal["value"] - goal["limit"]) * (-1 if goal["at_least"] else 1))
    if len(alike) == 1:
        return worst
    missed = sum(not goal["met"] for goal in alike)
    count = f"worst of {len(alike)}" + (f", {missed} missed" if missed else "")
    return worst | {"what": f"{worst['what']} ({count})"}


def cases(found: dict[str, Any]) -> list[str]:
    """What the shipped recipes reach on real data, and what quantisation costs there."""
    lines = [
        "| recipe on data | test | accuracy | INT8 drop on the CPU | chosen for the CPU |",
        "|---|---|---|---|---|",
    ]
    for name, case in found.items():
        drops = [
            v
            for v in case["variants"]
            if v["target"] == "cpu" and v["precision"] == "int8" and v["drop"] is not None
        ]
        worst = max(drops, key=lambda v: v["drop"], default=None)
        drop = f"{worst['drop']:+.4f}, at worst {worst['drop_high']:+.4f}" if worst else "-"
        test = f"{case['metric']} {case['test'][case['metric']]:.4f}"
        lines.append(
            f"| {name}: {case['data']} | {test} | {case['test']['accuracy']:.4f} | {drop} | {case['chosen'].get('cpu', '-')} |"
        )
    return lines


def quantised(found: dict[str, Any]) -> list[str]:
    """The drop of every maker's INT8 graph on the same test split, in the metric's own unit."""
    lines = [
        f"| INT8 of | for | test | tlexport's drop | operations in INT8 | {' | '.join(RIVALS)} |",
        "|---" * (5 + len(RIVALS)) + "|",
    ]
    for name, case in found.items():
        for flavour in ("cpu", "trt"):
            rows = {row["maker"]: row for row in case["graphs"] if row["flavour"] == flavour}
            ours = rows["tlexport"]
            known = ours["drop"] is not None
            drop = f"{ours['drop']:+.4f}, at worst {ours['drop_high']:+.4f}" if known else "none made"
            share = f"{ours['int8_macs']:.0%}" if known else "-"
            rivals = " | ".join(drop_of(rows.get(maker)) for maker in RIVALS)
            lines.append(
                f"| {name} | {flavour} | {case['metric']} {case['reference']:.4f} | {drop} | {share} | {rivals} |"
            )
    return lines


def drop_of(row: dict[str, Any] | None) -> str:
    """Of a rival's graph; a dash where it makes none for the target."""
    if row is None:
        return "-"
    return "no graph" if row["drop"] is None else f"{row['drop']:+.4f}"


def scenarios(found: dict[str, Any]) -> list[str]:
    """Tables: the fine-tuned model beside the best plain one, and what deploying it costs."""
    lines = [
        "| scenario | test | best plain baseline | FP16 drop (sm89) | INT8 drop (cpu) | CPU p50 | over torch eager |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in found.items():
        metric = case["metric"]
        chosen = next((v for v in case["variants"] if v["name"] == case["chosen"].get("cpu")), None)
        latency = f"{chosen['p50_ms'] * 1e3:.0f} µs | {chosen['speedup']:.1f}x" if chosen else "- | -"
        lines.append(
            f"| {name} | {metric} {spread(case['mean'][metric])} | {best_plain(case)} | "
            f"{worst_drop(case, 'sm89', 'fp16')} | {worst_drop(case, 'cpu', 'int8')} | {latency} |"
        )
    return lines


def best_plain(case: dict[str, Any]) -> str:
    metric = case["metric"]
    known = {name: of[metric] for name, of in case["baselines"].items() if metric in of}
    if not known:
        return "-"
    pick = max if HIGHER_IS_BETTER[metric] else min
    best = pick(known, key=lambda name: known[name]["ratio"])
    return f"{best.replace('_', ' ')} {spread(known[best])}"


def worst_drop(case: dict[str, Any], target: str, precision: str) -> str:
    judged = [
        v
        for v in case["variants"]
        if (v["target"], v["precision"]) == (target, precision) and v["drop"] is not None
    ]
    worst = max(judged, key=lambda v: v["drop"], default=None)
    return f"{worst['drop']:+.2g}, at worst {worst['drop_high']:+.2g}" if worst else "-"


def spread(of: dict[str, Any]) -> str:
    interval = "" if of["low"] is None else f" ({of['low']:.4f} to {of['high']:.4f})"
    return f"{of['ratio']:.4f}{interval}"


def curves(found: dict[str, Any]) -> list[str]:
    """Target metric against the number of labelled rows, pretrained beside from scratch."""
    lines = [
        "| rows of | " + "metric | labelled rows | pretrained | from scratch | gain |",
        "|---|---|---|---|---|---|",
    ]
    for name, curve in found.items():
        for index, size in enumerate(curve["sizes"]):
            means = " | ".join(
                f"{sum(curve[kind][index]) / len(curve[kind][index]):.4f}"
                for kind in ("pretrained", "scratch")
            )
            gain = curve["gain"][index]
            lines.append(f"| {name} | {curve['metric']} | {size} | {means} | {spread(gain)} |")
    return lines


def strategies(found: dict[str, Any]) -> list[str]:
    lines = [
        "| strategy: auto | chose | regret (validation) | regret (test) | share of the grid's time |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {name} | {case['auto']['strategy']} | {case['regret']['val']:.2%} | {case['regret']['test']:.2%} | {case['share']:.2f} |"
        for name, case in found.items()
    ]


def on_a_gpu() -> list[str]:
    """One row a network and batch size: each backend's fastest precision; a sentence where bench/gpu.py never ran on one."""
    path = RESULTS / "gpu.json"
    if not path.is_file():
        return ["Latency on a GPU (`python bench/gpu.py`): not yet measured on a GPU."]
    document = json.loads(path.read_text())
    fastest: dict[str, dict[str, tuple[float, str]]] = {}
    for name, cell in document["cells"].items():
        group, _, candidate = name.rpartition("/")
        backend, _, precision = candidate.rpartition("-")
        row = fastest.setdefault(group, {})
        if cell["state"] == "measured" and (p50 := cell["latency"]["p50"]["value_ms"]) is not None:
            told = f"{p50:.3g} ms ({precision}, {cell['speedup']['ratio']:.1f}x)"
            row[backend] = min(row.get(backend, (p50, told)), (p50, told))
    backends = list(dict.fromkeys(backend for row in fastest.values() for backend in row))
    gpus = [f"{gpu['name']}, driver {gpu['driver']}" for gpu in document["machine"]["gpus"]] or [
        document["target"]
    ]
    libraries = [f"{name} {document['versions'][name]}" for name in ("torch", "onnxruntime-gpu")]
    lines = [
        f"On a GPU ({', '.join(gpus + libraries)}), median of a call with copies, fastest precision, over eager FP32 without TF32 "
        f"(`{command(document)}`):",
        "",
    ]
    lines += ["| network/batch | " + " | ".join(backends) + " |", "|---" * (1 + len(backends)) + "|"]
    for group, row in fastest.items():
        lines.append(f"| {group} | " + " | ".join(row[b][1] if b in row else "-" for b in backends) + " |")
    return lines


def gates(document: dict[str, Any]) -> list[str]:
    """What the gates said where the truth is known."""
    lines = [
        "| gate | truth | gate runs | tolerated | fail | pass | undecided |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in (*document["accuracy"], *document["latency"], *document["sessions"]):
        if "metric" in row:
            name, truth = f"{row['metric']}, {row['samples']} samples", f"drop {row['true_drop']:g}"
        elif "graph" in row:
            name = f"latency, stored baseline, {row['graph']} graph, {row['history']} runs since"
            truth = f"{row['slower']:g} times the time"
        else:
            name = "latency, side by side" + (", a neighbour works" if row["neighbour"] else "")
            truth = f"{row['slower']:g} times the time"
        for tolerance, of in (
            (key.removeprefix("tolerance "), of) for key, of in row.items() if key.startswith("tolerance")
        ):
            fail, passed, undecided = (of[kind] for kind in ("fail", "pass", "undecided"))
            sure = f"{fail['ratio']:.1%} ({fail['low']:.1%} to {fail['high']:.1%})"
            lines.append(
                f"| {name} | {truth} | {row['runs']} | {tolerance} | {sure} | {passed['ratio']:.1%} | {undecided['ratio']:.1%} |"
            )
    return lines


def command(document: dict[str, Any]) -> str:
    """Some programs' cases may come from several calls; one without arguments makes them all."""
    merges = document["program"] in (
        "accuracy",
        "quantize",
        "scenarios",
        "pretraining",
        "strategies",
        "latency",
        "gate",
    )
    return f"python bench/{document['program']}.py" if merges else str(document["command"])


def row(goal: dict[str, Any]) -> str:
    spread = (
        "" if goal["low"] is None or goal["high"] is None else f" ({goal['low']:.3g} to {goal['high']:.3g})"
    )
    sign = "at least" if goal["at_least"] else "at most"
    return f"| {goal['what']} | {goal['value']:.4g}{spread} | {sign} {goal['limit']:g} | {'met' if goal['met'] else '**missed**'} |"


if __name__ == "__main__":
    main()
