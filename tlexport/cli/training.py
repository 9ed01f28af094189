"""From data to a fine-tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tlexport.cli import show
from tlexport.cli.app import app
from tlexport.cli.options import (
    Debug,
    DryRun,
    Epochs,
    Json,
    Overrides,
    Quiet,
    RecipeName,
    RunOut,
    Seed,
    Sets,
    with_flags,
)


@app.command(epilog="Example: tlexport pretrain market-pretrain data.path=prices/ --out runs/market")
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: RunOut = None,
    sets: Sets = None,
    epochs: Epochs = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a backbone without labels, where nobody publishes one. Then: tlexport finetune ... backbone.weights=RUN"""
    from tlexport.recipe import load

    resolved = load(recipe, with_flags(overrides, {"pretrain.epochs": epochs, "seed": seed}), sets)
    if dry_run:
        show.recipe(resolved)
        return
    from tlexport.run import Run
    from tlexport.stages import pretrain as stage

    made = Run.create(out or Path("runs") / resolved.name, resolved)
    with made.lock():
        result = stage.run(made, resolved, show.progress())
    rows = {
        "run": result.run,
        "model": f"{result.backbone}, {result.objective}, {result.epochs} epochs, best {result.best_epoch}",
        "val loss": f"{result.val_loss:.4f}   (before training {result.first_loss:.4f})",
        "time": f"{result.seconds:.0f} s, {result.samples_per_second:.0f} samples/s on {result.device}",
        "next": f"tlexport finetune RECIPE backbone.weights={result.run}",
    }
    show.result(result, show.pairs(rows))


@app.command(epilog="Example: tlexport finetune chest-xray data.path=pneumoniamnist.npz --out runs/cxr")
def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: RunOut = None,
    sets: Sets = None,
    strategy: Annotated[
        str | None, typer.Option(help="auto, probe, partial, full or scratch.", show_default=False)
    ] = None,
    epochs: Epochs = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a backbone by a recipe into a run directory. The same command resumes what was interrupted."""
    from tlexport.recipe import load

    flags = {"transfer.strategy": strategy, "transfer.epochs": epochs, "seed": seed}
    resolved = load(recipe, with_flags(overrides, flags), sets)
    if dry_run:
        show.recipe(resolved)
        return
    from tlexport.flow import tune
    from tlexport.run import Run

    made = Run.create(out or Path("runs") / resolved.name, resolved)
    with made.lock():
        result = tune(made, resolved, show.progress())
    metrics = {
        f"test {name}": f"{value:.4f}   (val {result.metrics.val.get(name, float('nan')):.4f})"
        for name, value in result.metrics.test.items()
    }
    rows = {
        "run": result.run,
        "model": f"{result.backbone}, {result.strategy}, {result.epochs} epochs, best {result.best_epoch}",
        **metrics,
        **{f"baseline {b.name}": f"{b.verdict}" for b in result.baselines},
        "time": f"{result.seconds:.0f} s, {result.images_per_second:.0f} samples/s on {result.device}",
        "next": f"tlexport build {result.run}",
    }
    show.result(result, result.headline, show.pairs(rows)) if result.headline else show.result(
        result, show.pairs(rows)
    )
