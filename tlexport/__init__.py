"""tlexport: fine-tune a pretrained backbone, export, quantise and compile it, and prove that it is still the same model.

run = tlexport.finetune("chest-xray", out="runs/cxr", overrides=["data.path=pneumoniamnist.npz"])
result = tlexport.build(run, bundle="bundles/cxr", targets=["cpu", "sm89"])
answers = tlexport.predict("bundles/cxr", "new-scans/", out="answers.csv")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tlexport.errors import TlexportError

if TYPE_CHECKING:
    from tlexport.results import BuildResult, PredictResult
    from tlexport.run import Run

__all__ = ["TlexportError", "__version__", "build", "finetune", "predict", "pretrain"]

__version__ = "0.1.0"


def finetune(
    recipe: str | Path, *, out: str | Path, overrides: list[str] | None = None, sets: list[str] | None = None
) -> Run:
    """Fine-tune by a recipe (a file or a shipped name) into the run directory `out`, or resume the one that is there."""
    from tlexport.flow import tune
    from tlexport.progress import Silent
    from tlexport.recipe import load
    from tlexport.run import Run

    resolved = load(recipe, overrides, sets)
    made = Run.create(out, resolved)
    with made.lock():
        tune(made, resolved, Silent())
    return made


def pretrain(
    recipe: str | Path, *, out: str | Path, overrides: list[str] | None = None, sets: list[str] | None = None
) -> Run:
    """Pretrain a backbone without labels into the run directory `out`; `backbone.weights=<out>` then starts from it."""
    from tlexport.progress import Silent
    from tlexport.recipe import load
    from tlexport.run import Run
    from tlexport.stages import pretrain as stage

    resolved = load(recipe, overrides, sets)
    made = Run.create(out, resolved)
    with made.lock():
        stage.run(made, resolved, Silent())
    return made


def build(
    run: Run | str | Path,
    *,
    bundle: str | Path,
    targets: list[str] | None = None,
    overrides: list[str] | None = None,
) -> BuildResult:
    """Export, quantise, compile, verify, bench and package a run. `failed` of the result names targets without a passing variant."""
    from tlexport import flow
    from tlexport.progress import Silent
    from tlexport.recipe import with_overrides
    from tlexport.run import Run

    opened = run if isinstance(run, Run) else Run(run)
    recipe = with_overrides(opened.recipe, overrides or [], targets=targets)
    with opened.lock():
        return flow.build(opened, recipe, Silent(), bundle=Path(bundle))


def predict(
    bundle: str | Path,
    data: str | Path,
    *,
    out: str | Path,
    target: str | None = None,
    public_key: str | Path | None = None,
    trust_unsigned: bool = False,
) -> PredictResult:
    """Run a bundle on new raw data, prepared as its manifest says; the answers become the CSV `out`.

    A bundle that runs an engine or a compiled library needs a signature that `public_key` verifies, or `trust_unsigned`.
    """
    from tlexport.bundle.preflight import Trust
    from tlexport.progress import Silent
    from tlexport.stages import predict as stage

    trust = Trust(public_key=Path(public_key) if public_key else None, unsigned=trust_unsigned)
    return stage.run(Path(bundle), str(data), Silent(), out=Path(out), target=target, trust=trust)
