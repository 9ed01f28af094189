"""finetune: a recipe and its data become a checkpoint, judged on the test split, and the samples later stages need."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlexport.errors import LeakageError, RecipeError
from tlexport.modalities import MODALITIES, dataset, metrics, reference
from tlexport.modalities.dataset import Dataset
from tlexport.models import MODELS, checkpoint, weights
from tlexport.models.network import Network
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import FinetuneResult, Metrics, WeightsSummary
from tlexport.run import Run, digest, replacing, write_json
from tlexport.training import leakage, race
from tlexport.training.finetune import device_of, finetune, served


def run(run: Run, recipe: Recipe, progress: Progress) -> FinetuneResult:
    """Fine-tune into `run`; a finished one with the same recipe, data and weights is returned as it stands."""
    started = time.monotonic()
    with progress.bar(f"reading {recipe.modality} data") as step:
        data = MODALITIES[recipe.modality].load(
            recipe.data, task=recipe.task, seed=recipe.seed, cache=run / "cache", progress=step
        )
    dataset.tell(data, progress)
    _require_metric(recipe, data)
    record = run.stage("finetune", _config(recipe, data), inputs=[])
    if (finished := record.unchanged(FinetuneResult)) is not None:
        progress.say("finetune: unchanged, skipped")
        return finished
    data, seen = _unseen(recipe, data, progress)
    raced = None
    if recipe.transfer.strategy == "auto":
        raced = race.race(
            lambda source: _model(recipe, data, source)[0],
            data,
            recipe,
            folder=run / "training",
            cache=run / "cache",
            progress=progress,
        )
        write_json(run / "race.json", raced.evidence)
        recipe = raced.recipe
    source = "none" if recipe.transfer.strategy == "scratch" else recipe.backbone.weights
    model, loaded = _model(recipe, data, source)
    progress.say(f"weights: {loaded.matched} of {loaded.total} tensors matched from {loaded.source}")
    folder = raced.folder if raced else run / "training"
    fitted = finetune(model, data, recipe, folder=folder, cache=run / "cache", progress=progress)
    with progress.bar("test") as step:
        outputs = served(model, data.test, torch.device("cpu"), step)
    result = FinetuneResult(
        run=str(run.path),
        strategy=recipe.transfer.strategy,
        backbone=recipe.backbone.name,
        task=data.task,
        classes=data.class_names,
        samples={"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        metric=recipe.metric,
        metrics=Metrics(
            val=fitted.history[fitted.best_epoch - 1]["val"],
            test=metrics.evaluate(data.test.labels, outputs, data.task),
        ),
        epochs=len(fitted.history),
        best_epoch=fitted.best_epoch,
        seconds=round(time.monotonic() - started, 2),
        images_per_second=round(fitted.images_per_second, 2),
        device=device_of(recipe.transfer).type,
        resumed_from=0 if raced else fitted.resumed_from,  # the race goes on with its own trainings
        weights=loaded,
        corrupt=tuple(f"{file.name}: {file.reason}" for file in data.report.corrupt),
        duplicates=tuple(f"{d.name} ({d.split}) is {d.train} (train)" for d in data.report.duplicates),
        problems=data.report.problems,
        leaks=(*data.report.leaks, *seen),
        race=raced.evidence if raced else None,
        notes=tuple(data.report.notes),
    )
    _keep(run, model, data, result, folder)
    reference.keep(
        run / "reference",
        reference.Judged(data.test, outputs),
        data.train,
        samples=recipe.calibration.samples,
        seed=recipe.seed,
        validation=_validation(model, data, recipe),
    )
    record.finish(result, outputs=[run / "checkpoint", run / "reference"])
    for state in (run / "training").rglob("state.safetensors"):
        state.unlink()
    return result


def _require_metric(recipe: Recipe, data: Dataset) -> None:
    known = metrics.REGRESSION if data.task == "regression" else metrics.CLASSIFICATION
    if recipe.metric not in known:
        raise RecipeError(
            f"metric={recipe.metric} does not judge a {data.task} task (these do: {', '.join(known)})"
        )


def _config(recipe: Recipe, data: Dataset) -> dict[str, Any]:
    """All that decides the checkpoint: the recipe's part, the data's contents, the weights file's contents."""
    document = recipe.model_dump(
        mode="json",
        include={"modality", "task", "metric", "seed", "data", "backbone", "transfer"},
    )
    document["samples"] = {"calibration": recipe.calibration.samples, "validation": recipe.search.samples}
    document["race"] = recipe.race.model_dump(mode="json") if recipe.transfer.strategy == "auto" else None
    document["data_sha256"] = data.report.sha256
    source = Path(recipe.backbone.weights)
    source = source / "checkpoint" if (source / "checkpoint").is_dir() else source
    document["weights_sha256"] = digest(source) if source.exists() else None
    return document


def _unseen(recipe: Recipe, data: Dataset, progress: Progress) -> tuple[Dataset, tuple[str, ...]]:
    """The data without test samples that pretraining has seen, or with a warning, as `data.duplicates` asks."""
    known = leakage.read(Path(recipe.backbone.weights))
    if known is None:
        return data, ()
    found = known.shared(data.test)
    if not found.any():
        return data, ()
    told = f"{int(found.sum())} of {len(found)} test samples were seen in pretraining ({recipe.backbone.weights})"
    if recipe.data.duplicates == "fail":
        raise LeakageError(
            f"{told}; pretrain without them, or leave them out of test with data.duplicates=drop"
        )
    if recipe.data.duplicates == "drop" and not found.all():
        kept = np.flatnonzero(~found)
        test = data.test.part(kept)
        data, told = replace(data, test=test), f"{told}; they were left out of test"
    progress.warn(told)
    return data, (told,)


def _model(recipe: Recipe, data: Dataset, source: str) -> tuple[Network, WeightsSummary]:
    """The backbone with a new head for the data's classes, and the weights of `source` loaded."""
    torch.manual_seed(recipe.seed)
    module = MODELS[recipe.modality]
    model = module.create(module.describe(recipe, data))
    module.prepare(model, data)
    report = weights.load(model, source, allow_mismatch=recipe.backbone.allow_mismatch)
    return model, WeightsSummary.model_validate(report.model_dump(include=set(WeightsSummary.model_fields)))


def _validation(model: Network, data: Dataset, recipe: Recipe) -> reference.Judged:
    """What quantisation may look at while it searches."""
    split = data.val.part(reference.drawn(data.val, recipe.search.samples, recipe.seed))
    return reference.Judged(split, served(model, split, torch.device("cpu")))


def _keep(run: Run, model: Network, data: Dataset, result: FinetuneResult, training: Path) -> None:
    """checkpoint/: weights, network, classes, preprocessing, metrics, history."""
    extra = {
        "class_names": data.class_names,
        "task": data.task,
        "preprocessing": data.preprocessing.describe(),
        "metrics": result.metrics.model_dump(),
        "data": data.report.model_dump(mode="json"),
    }
    checkpoint.save_checkpoint(run / "checkpoint", model, model.spec, extra)
    write_json(run / "checkpoint" / "metrics.json", result.metrics.model_dump())
    with replacing(run / "checkpoint" / "history.jsonl") as partial:
        partial.write_bytes((training / "history.jsonl").read_bytes())
