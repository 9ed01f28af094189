"""pretrain: unlabelled samples become a checkpoint that `finetune` starts from, and a record of what was seen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from tlexport.modalities import MODALITIES, dataset
from tlexport.modalities.dataset import Dataset
from tlexport.models import MODELS, checkpoint, weights
from tlexport.models.network import Network
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import PretrainResult, WeightsSummary
from tlexport.run import Run, digest, replacing
from tlexport.training import leakage
from tlexport.training.finetune import device_of
from tlexport.training.pretrain import pretrain


def run(run: Run, recipe: Recipe, progress: Progress) -> PretrainResult:
    """Pretrain on the training split into `run`; the test split is never looked at.

    A finished run with the same recipe, data and weights is returned as it stands. Raises RecipeError for an
    objective that the modality has not, TrainingError if the loss is not finite.
    """
    started = time.monotonic()
    with progress.bar(f"reading {recipe.modality} data") as step:
        data = MODALITIES[recipe.modality].load(
            recipe.data, task="pretrain", seed=recipe.seed, cache=run / "cache", progress=step
        )
    dataset.tell(data, progress)
    record = run.stage("pretrain", _config(recipe, data), inputs=[])
    if (finished := record.unchanged(PretrainResult)) is not None:
        progress.say("pretrain: unchanged, skipped")
        return finished
    model, loaded = _model(recipe, data)
    pretext = MODELS[recipe.modality].pretext(model, recipe.pretrain, data)
    found = pretrain(model, pretext, data, recipe, folder=run / "training", progress=progress)
    result = PretrainResult(
        run=str(run.path),
        backbone=recipe.backbone.name,
        objective=recipe.pretrain.objective,
        samples={"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        first_loss=found.first_loss,
        val_loss=found.history[found.best_epoch - 1]["val_loss"],
        epochs=len(found.history),
        best_epoch=found.best_epoch,
        seconds=round(time.monotonic() - started, 2),
        samples_per_second=round(found.samples_per_second, 2),
        device=device_of(recipe.transfer).type,
        resumed_from=found.resumed_from,
        weights=loaded,
        problems=data.report.problems,
        notes=data.report.notes,
    )
    extra = {"preprocessing": data.preprocessing.describe(), "data": data.report.model_dump(mode="json")}
    checkpoint.save_checkpoint(run / "checkpoint", model, model.spec, extra)
    leakage.write(run / "checkpoint", data.train, data.val)
    with replacing(run / "checkpoint" / "history.jsonl") as partial:
        partial.write_bytes((run / "training" / "history.jsonl").read_bytes())
    record.finish(result, outputs=[run / "checkpoint"])
    (run / "training" / "state.safetensors").unlink(missing_ok=True)
    return result


def _config(recipe: Recipe, data: Dataset) -> dict[str, Any]:
    document = recipe.model_dump(mode="json", include={"modality", "seed", "data", "backbone", "pretrain"})
    document["data_sha256"] = data.report.sha256
    source = Path(recipe.backbone.weights) / "checkpoint"
    document["weights_sha256"] = digest(source) if source.exists() else None
    return document


def _model(recipe: Recipe, data: Dataset) -> tuple[Network, WeightsSummary]:
    torch.manual_seed(recipe.seed)
    module = MODELS[recipe.modality]
    model = module.create(module.describe(recipe, data))
    module.prepare(model, data)
    report = weights.load(model, recipe.backbone.weights, allow_mismatch=recipe.backbone.allow_mismatch)
    return model, WeightsSummary.model_validate(report.model_dump(include=set(WeightsSummary.model_fields)))
