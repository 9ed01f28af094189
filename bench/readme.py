"""Write the README's table of numbers from bench/results/*.json, or with --check say whether it is up to date."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- numbers: written by bench/readme.py from bench/results -->", "<!-- /numbers -->"
ORDER = ("accuracy", "latency", "finetune", "startup", "memory")


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


def section() -> str:
    """One row a goal, missed ones included, and the machine they were measured on."""
    documents = [
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ORDER
        if (RESULTS / f"{name}.json").is_file()
    ]
    lines = ["| what | measured | wanted | |", "|---|---|---|---|"]
    for document in documents:
        lines += [row(goal) for goal in document["goals"]]
    machines = {
        (d["machine"]["cpu"], d["machine"]["usable_cores"], ", ".join(d["machine"]["isa"])) for d in documents
    }
    lines += ["", *(f"Machine: {cpu}, {cores} cores, {isa}." for cpu, cores, isa in sorted(machines))]
    lines += [
        "Intervals are 95%. Reproduce: "
        + ", ".join(f"`{document['command']}`" for document in documents)
        + "."
    ]
    return "\n".join(lines)


def row(goal: dict[str, Any]) -> str:
    spread = (
        "" if goal["low"] is None or goal["high"] is None else f" ({goal['low']:.3g} to {goal['high']:.3g})"
    )
    sign = "at least" if goal["at_least"] else "at most"
    return f"| {goal['what']} | {goal['value']:.4g}{spread} | {sign} {goal['limit']:g} | {'met' if goal['met'] else '**missed**'} |"


if __name__ == "__main__":
    main()
