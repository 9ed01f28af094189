"""compile: every (graph, backend, target) that can be made here becomes a variant with a receipt of its real precisions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from tlexport import targets
from tlexport.backends import Availability, Load, Network, Options, registry, trt_options
from tlexport.errors import BackendCrash, CompileError
from tlexport.graph import cost, inspect, trace
from tlexport.models.checkpoint import WEIGHTS, describe_checkpoint, load_checkpoint
from tlexport.models.network import ServingModel
from tlexport.progress import Progress, Step
from tlexport.recipe import Recipe
from tlexport.results import CompileResult, QuantizeResult, Variant
from tlexport.run import Run, digest, replacing, write_json


def run(run: Run, recipe: Recipe, progress: Progress) -> CompileResult:
    """Compile into variants/<name>/. A variant that a backend refuses stays in the list with the reason.

    Raises CompileError if a target is left without any variant.
    """
    require_targets(recipe)
    available = {
        name: backend.availability() for name, backend in registry.chosen(recipe.compile.backends).items()
    }
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
    config = recipe.model_dump(mode="json", include={"targets", "precision", "compile", "tensorrt"}) | {
        "batch": recipe.export.batch.model_dump(),
        "backends": {name: found.version for name, found in available.items()},
        "refused": refused,
    }
    network = _network_of(run)
    record = run.stage("compile", config, inputs=[run / "checkpoint", *sorted(graphs.values())])
    if (finished := record.unchanged(CompileResult)) is not None:
        progress.say("compile: unchanged, skipped")
        return finished
    variants = []
    with progress.bar("compiling") as step:
        for done, (target, backend, precision) in enumerate(plans):
            graph = targets.graph(precision, target)
            variant = Variant(
                name=f"{target}-{backend}-{precision}", backend=backend, target=target, precision=precision
            )
            why = refused.get(graph) or registry.BACKENDS[backend].refusal(target, precision)
            report = _reporter(step, variant, done, len(plans))
            options = Options(recipe.tensorrt.placed(run / "cache"), network, report)
            variants.append(
                _refused(variant, why, progress)
                if why
                else _variant(run, recipe, variant, graphs[graph], options, progress)
            )
            step(done + 1, len(plans))
    _remove_others(run / "variants", {variant.name for variant in variants if variant.file})
    result = CompileResult(run=str(run.path), variants=tuple(variants))
    record.finish(result, outputs=[run / "variants" / variant.name for variant in variants if variant.file])
    return result


def _graphs(recipe: Recipe) -> set[str]:
    return {targets.graph(precision, target) for precision in recipe.precision for target in recipe.targets}


def _refused(variant: Variant, why: str, progress: Progress) -> Variant:
    progress.say(f"{variant.name}: refused, {why}")
    return variant.model_copy(update={"verdict": "refused", "reason": why})


def _network_of(run: Run) -> Load | None:
    """How a backend that compiles PyTorch makes the network; None where the model is a plain baseline's graph."""
    checkpoint = run.require("checkpoint", "finetune")
    if describe_checkpoint(checkpoint).file != WEIGHTS:
        return None
    return partial(_network, checkpoint, run.require("graphs/fp32.onnx", "export"))


def _network(checkpoint: Path, graph: Path) -> Network:
    """The reference as it stands in the run, made in the process that compiles it: only weights and JSON are read."""
    import torch

    serving = ServingModel(load_checkpoint(checkpoint)[0]).eval()
    specs = {spec.name: spec for spec in inspect.io(trace.load(graph))[0]}
    names = serving.model.INPUTS
    example = (torch.from_numpy(np.zeros(specs[name].at(2), specs[name].dtype)) for name in names)
    return Network(serving, names, serving.output, tuple(example))


def _reporter(step: Step, variant: Variant, done: int, plans: int) -> Callable[[str, float], None]:
    """Moves the bar by the share of one build, and says what it is doing."""
    step(done, plans, variant.name)
    return lambda phase, share: step(done + share, plans, f"{variant.name}, {phase}")


def _variant(
    run: Run, recipe: Recipe, variant: Variant, graph: Path, options: Options, progress: Progress
) -> Variant:
    """One variant: built, or with the reason why it is not."""
    try:
        made = _built(run, recipe, variant, graph, options)
    except BackendCrash as error:
        made = variant.model_copy(update={"verdict": "fail", "reason": " ".join(str(error).split())})
    except CompileError as error:
        made = variant.model_copy(update={"verdict": "refused", "reason": " ".join(str(error).split())})
    if made.verdict != "unjudged":
        progress.warn(f"{variant.name}: {made.verdict}, {made.reason}")
    return made


def _built(run: Run, recipe: Recipe, variant: Variant, graph: Path, options: Options) -> Variant:
    """Compile into variants/<name>/ with the receipt beside the artifact. Raises CompileError."""
    folder = run / "variants" / variant.name
    model = trace.load(graph)
    expected = inspect.compute_dtypes(model)
    with replacing(folder) as beside:
        beside.mkdir()
        out = beside / f"model{registry.BACKENDS[variant.backend].SUFFIX}"
        artifact = registry.build(
            *(variant.backend, graph, out, variant.target, recipe.export.batch, expected),
            timeout=recipe.compile.timeout,
            options=options,
        )
        wrong = artifact.receipt.disagreements
        variant = variant.model_copy(
            update={
                "file": run.relative(folder / out.name),
                "size_bytes": out.stat().st_size,
                "sha256": digest(out),
                "receipt": artifact.receipt.summary(),
                "cost_ms": None if variant.target == "cpu" else 1e3 * cost.seconds(model, cost.GPU),
                "options": trt_options.used(variant.backend, recipe.tensorrt),
                "verdict": "fail" if wrong else "unjudged",
                "reason": f"receipt disagrees in {len(wrong)} of {len(expected)} layers: {'; '.join(wrong[:3])}"
                if wrong
                else "",
            }
        )
        write_json(beside / "receipt.json", artifact.receipt.model_dump(mode="json"))
    return variant


def _remove_others(folder: Path, keep: set[str]) -> None:
    """variants/ holds what was asked for in this call, nothing older."""
    for entry in folder.iterdir() if folder.is_dir() else []:
        if entry.name not in keep:
            shutil.rmtree(entry)


def require_targets(recipe: Recipe) -> None:
    """Raises CompileError if no backend of the recipe serves one of the targets here, naming what each could do instead,
    and NotInstalledError for a backend that is asked for by name and is not here."""
    chosen = registry.chosen(recipe.compile.backends)
    offers = {name: backend.availability() for name, backend in chosen.items()}
    for target in recipe.targets:
        if not any(target in found.builds for found in offers.values()):
            listed = "; ".join(f"{name}: {_offer(found)}" for name, found in offers.items())
            raise CompileError(
                f"no backend of {', '.join(recipe.compile.backends)} can compile for {target} on this machine ({listed}); "
                "`tlexport doctor` says what to install or where to build"
            )


def _offer(found: Availability) -> str:
    return f"builds for {', '.join(found.builds)}" if found.builds else found.note
