"""The fine-tuned runs that bench/quantize.py and bench/search_cost.py share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from common import overrides, tlexport
from quantize_cases import TINY, Case

from tlexport.recipe import load
from tlexport.run import Run

TIMEOUT = 3000.0  # of one command
TRAINED_BY = {"modality", "task", "metric", "seed", "data", "backbone", "transfer"}


def training_words(name: str, case: Case, options: argparse.Namespace) -> tuple[list[str], str | None]:
    """Overrides of the case's recipe with this machine's paths, and the weights' file name. Raises SystemExit."""
    data = options.data.resolve()
    if not (data / case.data).exists():
        raise SystemExit(
            f"{name} needs {case.data} in the folder that --data names ({data}); put it there, or leave the case out with --only"
        )
    weights = None if options.quick else case.weights
    words = [
        f"data.path={data / case.data}",
        *overrides(case.change | (TINY if options.quick else {})),
        *([f"backbone.weights={data.parent / 'weights' / weights}"] if weights else []),
    ]
    return words, weights


def fine_tuned(name: str, case: Case, words: list[str], work: Path) -> tuple[Run, dict[str, Any]]:
    """The run and what finetune returned. One that stands is taken if its recipe trains alike, whatever changed since."""
    folder = work / "runs" / name
    if (folder / "recipe.yaml").is_file() and "finetune" in Run(folder).manifest["stages"]:
        held, wanted = (
            recipe.model_dump(mode="json", include=TRAINED_BY)
            for recipe in (Run(folder).recipe, load(case.recipe, words))
        )
        if held != wanted:
            keys = ", ".join(key for key in wanted if held[key] != wanted[key])
            raise SystemExit(
                f"{folder} was trained by another recipe ({keys}); remove it or choose another --work"
            )
    else:
        tlexport(["finetune", case.recipe, *words, "--out", str(folder)], cwd=work, timeout=TIMEOUT)
    tuned: dict[str, Any] = Run(folder).manifest["stages"]["finetune"]["result"]
    return Run(folder), tuned
