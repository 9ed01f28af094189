"""compile: every (graph, backend, target) that can be made here becomes a variant with a receipt of its real precisions."""

from __future__ import annotations

import shutil
from pathlib import Path

from tlexport.backends import Availability, registry
from tlexport.errors import BackendCrash, CompileError
from tlexport.graph import inspect, trace
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import CompileResult, QuantizeResult, Variant
from tlexport.run import Run, digest, replacing, write_json

TIMEOUT = 1800.0


def run(run: Run, recipe: Recipe, progress: Progress) -> CompileResult:
    """Compile into variants/<name>/. A variant that a backend refuses stays in the list with the reason.

    Raises CompileError if a target is left without any variant.
    """
    require_targets(recipe)
    available = {name: backend.availability() for name, backend in registry.BACKENDS.items()}
    plans = [
        (target, backend, precision)
        for target in recipe.targets
        for backend, found in available.items()
        if target in found.builds
        for precision in recipe.precision
    ]
    refused = run.result("quantize", QuantizeResult).refused
    graphs = {
        name: run.require(f"graphs/{name}.onnx", "quantize") for name in _graphs(recipe) - refused.keys()
    }
    config = recipe.model_dump(mode="json", include={"targets", "precision"}) | {
        "batch": recipe.export.batch.model_dump(),
        "backends": {name: found.version for name, found in available.items()},
        "refused": refused,
    }
    record = run.stage("compile", config, inputs=sorted(graphs.values()))
    if (finished := record.unchanged(CompileResult)) is not None:
        progress.say("compile: unchanged, skipped")
        return finished
    variants = []
    with progress.bar("compiling") as step:
        for done, (target, backend, precision) in enumerate(plans, start=1):
            graph = _graph(precision, target)
            variant = Variant(
                name=f"{target}-{backend}-{precision}", backend=backend, target=target, precision=precision
            )
            why = refused.get(graph) or registry.BACKENDS[backend].refusal(target, precision)
            variants.append(
                _refused(variant, why, progress)
                if why
                else _variant(run, recipe, variant, graphs[graph], progress)
            )
            step(done, len(plans))
    _remove_others(run / "variants", {variant.name for variant in variants if variant.file})
    result = CompileResult(run=str(run.path), variants=tuple(variants))
    record.finish(result, outputs=[run / "variants" / variant.name for variant in variants if variant.file])
    return result


def _graphs(recipe: Recipe) -> set[str]:
    return {_graph(precision, target) for precision in recipe.precision for target in recipe.targets}


def _graph(precision: str, target: str) -> str:
    """Name of the typed graph; INT8 and INT4 have a flavour for CPUs and one for TensorRT."""
    if precision not in ("int8", "int4"):
        return precision
    return f"{precision}-{'cpu' if target == 'cpu' else 'trt'}"


def _refused(variant: Variant, why: str, progress: Progress) -> Variant:
    progress.say(f"{variant.name}: refused, {why}")
    return variant.model_copy(update={"verdict": "refused", "reason": why})


def _variant(run: Run, recipe: Recipe, variant: Variant, graph: Path, progress: Progress) -> Variant:
    """One variant: built, or with the reason why it is not."""
    try:
        made = _built(run, recipe, variant, graph)
    except BackendCrash as error:
        made = variant.model_copy(update={"verdict": "fail", "reason": " ".join(str(error).split())})
    except CompileError as error:
        made = variant.model_copy(update={"verdict": "refused", "reason": " ".join(str(error).split())})
    if made.verdict != "unjudged":
        progress.warn(f"{variant.name}: {made.verdict}, {made.reason}")
    return made


def _built(run: Run, recipe: Recipe, variant: Variant, graph: Path) -> Variant:
    """Compile into variants/<name>/ with the receipt beside the artifact. Raises CompileError."""
    folder = run / "variants" / variant.name
    expected = inspect.compute_dtypes(trace.load(graph))
    with replacing(folder) as partial:
        partial.mkdir()
        out = partial / f"model{registry.BACKENDS[variant.backend].SUFFIX}"
        artifact = registry.build(
            variant.backend, graph, out, variant.target, recipe.export.batch, expected, TIMEOUT
        )
        wrong = artifact.receipt.disagreements
        variant = variant.model_copy(
            update={
                "file": run.relative(folder / out.name),
                "size_bytes": out.stat().st_size,
                "sha256": digest(out),
                "receipt": artifact.receipt.summary(),
                "verdict": "fail" if wrong else "unjudged",
                "reason": f"receipt disagrees in {len(wrong)} of {len(expected)} layers: {'; '.join(wrong[:3])}"
                if wrong
                else "",
            }
        )
        write_json(partial / "receipt.json", artifact.receipt.model_dump(mode="json"))
    return variant


def _remove_others(folder: Path, keep: set[str]) -> None:
    """variants/ holds what was asked for in this call, nothing older."""
    for entry in folder.iterdir() if folder.is_dir() else []:
        if entry.name not in keep:
            shutil.rmtree(entry)


def require_targets(recipe: Recipe) -> None:
    """Raises CompileError if no backend here serves one of the targets, naming what each could do instead."""
    offers = {name: backend.availability() for name, backend in registry.BACKENDS.items()}
    for target in recipe.targets:
        if not any(target in found.builds for found in offers.values()):
            listed = "; ".join(f"{name}: {_offer(found)}" for name, found in offers.items())
            raise CompileError(
                f"no backend on this machine can compile for {target} ({listed}); "
                "`tlexport doctor` says what to install or where to build"
            )


def _offer(found: Availability) -> str:
    return f"builds for {', '.join(found.builds)}" if found.builds else found.note
