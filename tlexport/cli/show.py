"""What a command prints: one JSON object, or its tables."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from tlexport.cli.options import Output
from tlexport.progress import printable

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import RenderableType

    from tlexport.console import Terminal
    from tlexport.recipe import Recipe
    from tlexport.results import GraphSearch, Variant


def result(result: BaseModel, *parts: RenderableType) -> None:
    """The one thing on standard output: the JSON object, or its tables."""
    if Output.as_json:
        document(result.model_dump(mode="json"))
        return
    from tlexport.console import results

    console = results()
    for part in parts:
        console.print(part)


def pairs(rows: dict[str, str]) -> RenderableType:
    from tlexport.console import pairs_table

    return pairs_table(rows)


def rows(rows: tuple[dict[str, Any], ...]) -> RenderableType:
    from tlexport.console import rows_table

    return rows_table(rows)


def variants(
    references: tuple[Variant, ...], variants: tuple[Variant, ...], metric: str, chosen: dict[str, str]
) -> RenderableType:
    from tlexport.console import variants_table

    return variants_table(references, variants, metric, chosen)


def search(found: GraphSearch) -> list[RenderableType]:
    """How a graph was brought within the budget, and what its layers cost if they were asked."""
    rows = {
        f"{trial.step}{f', {len(trial.kept)} in FP32' if trial.kept else ''}": f"drop {number(trial.drop, '.4g', 'not finite')}, "
        f"at worst {number(trial.drop_high, '.4g', '-')}{'' if trial.within else ' (over)'}, {trial.low_macs:.0%} of the operations low, "
        f"cost {trial.cost_ms:.3g} ms by the model"
        for trial in found.trials
    }
    layers = {
        " ".join(
            layer.layers
        ): f"noise {number(layer.noise, '.2e', 'not finite')}, {layer.macs:.1%} of the operations"
        f"{', left in FP32' if layer.kept else ''}"
        for layer in found.layers
    }
    title = f"{found.graph}: budget {found.budget:.4g} on {found.samples} samples, {found.evaluations:g} evaluations"
    return ["", title, pairs(rows), *(["", pairs(layers)] if layers else [])]


def number(value: float | None, form: str, otherwise: str) -> str:
    return otherwise if value is None else format(value, form)


def recipe(recipe: Recipe) -> None:
    if Output.as_json:
        document(recipe.model_dump(mode="json"))
    else:
        sys.stdout.write(recipe.to_yaml())


def document(document: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()
    except OSError as error:
        # What is still buffered would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise


def error(message: str) -> None:
    sys.stderr.write(f"error: {printable(message)}\n")
    sys.stderr.flush()


def progress() -> Terminal:
    from tlexport.console import Terminal

    return Terminal(quiet=Output.quiet)
