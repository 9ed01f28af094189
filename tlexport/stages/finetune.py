"""finetune: a recipe and its data become a checkpoint, judged on the test split, and the samples later stages need."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlexport.modalities import MODALITIES, metrics
from tlexport.modalities.image import ImageData, Split
from tlexport.models import checkpoint, weights
from tlexport.models import image as models
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import FinetuneResult, Metrics, WeightsSummary
from tlexport.run import Run, digest, replacing, write_json
from tlexport.training.finetune import device_of, finetune, probabilities


def run(run: Run, recipe: Recipe, progress: Progress) -> FinetuneResult:
    """Fine-tune into `run`; a finished one with the same recipe, data and weights is returned as it stands."""
    started = time.monotonic()
    with progress.bar("reading images") as step:
        data = MODALITIES[recipe.modality].load(
            recipe.data, task=recipe.task, seed=recipe.seed, cache=run / "cache", progress=step
        )
    _report(data, progress)
    record = run.stage("finetune", _config(recipe, data), inputs=[])
    if (finished := record.unchanged(FinetuneResult)) is not None:
        progress.say("finetune: unchanged, skipped")
        return finished
    model, spec, loaded = _model(recipe, data)
    progress.say(f"weights: {loaded.matched} of {loaded.total} tensors matched from {loaded.source}")
    fitted = finetune(model, data, recipe, folder=run / "training", cache=run / "cache", progress=progress)
    with progress.bar("test") as step:
        outputs = probabilities(model, data.test, data, torch.device("cpu"), step)
    result = FinetuneResult(
        run=str(run.path),
        strategy=recipe.transfer.strategy,
        backbone=recipe.backbone.name,
        task=data.task,
        classes=data.class_names,
        samples={"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        metric=recipe.metric,
        metrics=Metrics(
            val=fitted.history[fitted.best_epoch - 1]["val"], test=metrics.evaluate(data.test.labels, outputs)
        ),
        epochs=len(fitted.history),
        best_epoch=fitted.best_epoch,
        seconds=round(time.monotonic() - started, 2),
        images_per_second=round(fitted.images_per_second, 2),
        device=device_of(recipe.transfer).type,
        resumed_from=fitted.resumed_from,
        weights=loaded,
        corrupt=tuple(f"{file.name}: {file.reason}" for file in data.report.corrupt),
        duplicates=tuple(f"{d.name} ({d.split}) is {d.train} (train)" for d in data.report.duplicates),
        notes=tuple(data.report.notes),
    )
    _keep(run, model, spec, data, recipe, result)
    _keep_reference(run / "reference", data, outputs, recipe)
    record.finish(result, outputs=[run / "checkpoint", run / "reference"])
    (run / "training" / "state.safetensors").unlink(missing_ok=True)
    return result


def _config(recipe: Recipe, data: ImageData) -> dict[str, Any]:
    """All that decides the checkpoint: the recipe's part, the data's contents, the weights file's contents."""
    document = recipe.model_dump(
        mode="json",
        include={"modality", "task", "metric", "seed", "data", "backbone", "transfer", "calibration"},
    )
    document["data_sha256"] = data.report.sha256
    source = Path(recipe.backbone.weights)
    document["weights_sha256"] = digest(source) if source.exists() else None
    return document


def _report(data: ImageData, progress: Progress) -> None:
    """What the data holds, and everything about it that a careful person would want to know before training."""
    report = data.report
    counts = ", ".join(
        f"{name} {count} ({report.split_origin[name]})" for name, count in report.samples.items()
    )
    progress.say(f"data: {data.task}, {len(data.class_names)} classes; {counts}")
    if report.corrupt:
        first = report.corrupt[0]
        progress.warn(
            f"{len(report.corrupt)} unreadable files were left out, the first: {first.name} ({first.reason})"
        )
    if report.duplicates_count.get("test"):
        first_twin = next(twin for twin in report.duplicates if twin.split == "test")
        progress.warn(
            f"{report.duplicates_count['test']} test images are also in train, the first: {first_twin.name}; "
            + (
                "they were left out of test"
                if report.dropped
                else "data.duplicates=drop leaves them out of test"
            )
        )
    for note in report.notes:
        progress.say(note)


def _model(recipe: Recipe, data: ImageData) -> tuple[models.ImageModel, models.ModelSpec, WeightsSummary]:
    """The backbone with a new head for the data's classes, and its weights loaded."""
    torch.manual_seed(recipe.seed)
    spec = models.describe(
        recipe.backbone.name,
        classes=len(data.class_names),
        task=data.task,  # type: ignore[arg-type]
        channels=data.preprocessing.channels,
        image_size=data.preprocessing.image_size,
        dropout=recipe.backbone.dropout,
    )
    model = models.create(spec)
    report = weights.load(model, recipe.backbone.weights, allow_mismatch=recipe.backbone.allow_mismatch)
    return (
        model,
        spec,
        WeightsSummary.model_validate(report.model_dump(include=set(WeightsSummary.model_fields))),
    )


def _keep(
    run: Run,
    model: models.ImageModel,
    spec: models.ModelSpec,
    data: ImageData,
    recipe: Recipe,
    result: FinetuneResult,
) -> None:
    """checkpoint/: weights, network, classes, preprocessing, metrics, history."""
    extra = {
        "class_names": data.class_names,
        "task": data.task,
        "preprocessing": data.preprocessing.__dict__,
        "metrics": result.metrics.model_dump(),
        "data": data.report.model_dump(mode="json"),
    }
    checkpoint.save_checkpoint(run / "checkpoint", model, spec, extra)
    write_json(run / "checkpoint" / "metrics.json", result.metrics.model_dump())
    with replacing(run / "checkpoint" / "history.jsonl") as partial:
        partial.write_bytes((run / "training" / "history.jsonl").read_bytes())


def _keep_reference(folder: Path, data: ImageData, outputs: np.ndarray, recipe: Recipe) -> None:
    """reference/: prepared test images with labels and the reference's outputs, and training images for calibration."""
    with replacing(folder) as partial:
        partial.mkdir()
        _prepared(partial / "inputs.npy", data, data.test, np.arange(len(data.test)))
        np.save(partial / "outputs.npy", outputs)
        np.save(partial / "labels.npy", np.asarray(data.test.labels))
        if data.test.groups is not None:
            np.save(
                partial / "groups.npy",
                np.unique(np.asarray(data.test.groups), return_inverse=True)[1].astype(np.int64),
            )
        chosen = np.random.default_rng(recipe.seed).permutation(len(data.train))[: recipe.calibration.samples]
        _prepared(partial / "calibration.npy", data, data.train, np.sort(chosen))


def _prepared(path: Path, data: ImageData, split: Split, indices: np.ndarray) -> None:
    """uint8 [n,C,S,S], written batch by batch so that a large split does not fill the memory."""
    size, channels = data.preprocessing.image_size, data.preprocessing.channels
    array = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.uint8, shape=(len(indices), channels, size, size)
    )
    for start in range(0, len(indices), 256):
        array[start : start + 256] = data.preprocessing.batch(split.images[indices[start : start + 256]])
    array.flush()
