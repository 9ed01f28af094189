"""Draw docs/demo.svg: the table that `make demo` ended with, from its run directory."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

from rich.console import Console

from tlexport.bundle import choice
from tlexport.console import variants_table
from tlexport.errors import GateError
from tlexport.results import BenchResult

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "digits-quickstart")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "demo.svg")
    options = parser.parse_args()
    measured = BenchResult.model_validate(
        json.loads((options.run / "bench.json").read_text(encoding="utf-8"))
    )
    chosen = {}
    for target in {variant.target for variant in measured.variants}:
        try:
            chosen[target] = choice.choose(target, measured.variants).variant.name
        except GateError:
            continue
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(variants_table(measured.references, measured.variants, "accuracy", chosen))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # The default template loads a web font; the picture must stand alone.
    svg = console.export_svg(title="tlexport build", unique_id="demo")
    head, font_face, tail = svg.partition("@font-face")
    while font_face:
        tail = tail.partition("}")[2]
        before, font_face, tail = tail.partition("@font-face")
        head += before
    options.out.write_text(head + tail, encoding="utf-8")


if __name__ == "__main__":
    main()
