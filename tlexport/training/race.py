"""`strategy: auto`: a short race of the strategies, by successive halving (Jamieson and Talwalkar, arXiv 1502.07943).

Every candidate trains for a part of its own schedule, the better ones go on from where they are, the last one left is the
choice: what it has learned is kept, and nothing is trained twice. Before the race a kNN probe on the frozen features says
how well the pretrained backbone fits the task (the best of 23 such scores over 42,000 runs, arXiv 2503.18528); it is
evidence, and orders candidates that are equal.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlexport.modalities.dataset import Dataset
from tlexport.modalities.metrics import HIGHER_IS_BETTER
from tlexport.models.network import Network
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.training.finetune import device_of, features, finetune

NEIGHBOURS = 10
KNN_ROWS = 2000  # of train and of val: enough to rank by, and a second's work


@dataclass(frozen=True)
class Raced:
    """`recipe` with the strategy chosen, `folder` with its unfinished training, and how it came to that."""

    recipe: Recipe
    folder: Path
    evidence: dict[str, Any]


@dataclass
class _Runner:
    strategy: str
    recipe: Recipe
    folder: Path
    epochs: int = 0
    seconds: float = 0.0
    value: float = float("nan")


def race(
    make: Callable[[str], Network],
    data: Dataset,
    recipe: Recipe,
    *,
    folder: Path,
    cache: Path,
    progress: Progress,
) -> Raced:
    """Choose the strategy. `make(source)` gives the network with the weights of `source` (`none`: random).

    The race's training time is planned to stay below `race.share` of the full grid's. Without pretrained weights
    there is nothing to transfer: scratch is chosen without a race.
    """
    if recipe.backbone.weights == "none":
        evidence: dict[str, Any] = {
            "chosen": "scratch",
            "why": "the backbone has no pretrained weights to transfer from",
        }
        progress.say("race: no pretrained weights, so the choice is scratch")
        return Raced(_with(recipe, "scratch"), folder / "scratch", evidence)
    started = time.monotonic()
    score = _knn(make(recipe.backbone.weights), data, recipe, cache, progress)
    runners = [_Runner(name, _with(recipe, name), folder / name) for name in recipe.race.candidates]
    rungs: list[dict[str, Any]] = []
    left = list(runners)
    for epochs in _rungs(len(runners), recipe):
        for runner in left:
            _advance(runner, epochs, make, data, cache, progress)
        left.sort(key=lambda runner: _worth(runner, recipe.metric), reverse=True)
        rungs.append({"epochs": epochs, "val": {r.strategy: r.value for r in left}})
        left = left[: max(1, len(left) // recipe.race.eta)]
        progress.say(
            f"race after {epochs} epochs: "
            + ", ".join(f"{name} {value:.4f}" for name, value in rungs[-1]["val"].items())
        )
        if len(left) == 1:
            break
    winner = left[0]
    for runner in runners:
        if runner is not winner:
            shutil.rmtree(runner.folder, ignore_errors=True)
    grid = sum(runner.seconds / max(runner.epochs, 1) * recipe.transfer.epochs for runner in runners)
    rest = winner.seconds / max(winner.epochs, 1) * (recipe.transfer.epochs - winner.epochs)
    evidence = {
        "chosen": winner.strategy,
        "why": f"best {recipe.metric} on val after {winner.epochs} of {recipe.transfer.epochs} epochs",
        "knn_probe": score,
        "rungs": rungs,
        "epochs": {runner.strategy: runner.epochs for runner in runners},
        "seconds": {runner.strategy: round(runner.seconds, 2) for runner in runners},
        "race_seconds": round(time.monotonic() - started, 2),
        "grid_seconds_estimated": round(grid, 2),
        "share_estimated": round((sum(r.seconds for r in runners) + rest) / max(grid, 1e-9), 3),
    }
    return Raced(winner.recipe, winner.folder, evidence)


def _with(recipe: Recipe, strategy: str) -> Recipe:
    chosen = recipe.transfer.model_copy(update={"strategy": strategy})
    return recipe.model_copy(update={"transfer": chosen})


def _rungs(candidates: int, recipe: Recipe) -> list[int]:
    """Epochs (of the whole schedule) at which candidates are compared, the last with two or fewer left.

    With k candidates and a share s of the grid's k * E epochs, the winner's own E is spent anyway: what is left,
    (s * k - 1) * E, is divided among the losers' rungs.
    """
    epochs, eta = recipe.transfer.epochs, recipe.race.eta
    standing, left = [], candidates
    while left > 1:
        standing.append(left)
        left = max(1, left // eta)
    spare = max((recipe.race.share * candidates - 1) * epochs, len(standing))
    first = spare / max(sum(n - max(1, n // eta) for n in standing) * 1.5, 1)
    found = [max(1, round(first * (rung + 1))) for rung in range(len(standing))]
    return sorted({min(epoch, epochs) for epoch in found})


def _advance(
    runner: _Runner,
    until: int,
    make: Callable[[str], Network],
    data: Dataset,
    cache: Path,
    progress: Progress,
) -> None:
    started = time.monotonic()
    model = make("none" if runner.strategy == "scratch" else runner.recipe.backbone.weights)
    fitted = finetune(
        model, data, runner.recipe, folder=runner.folder, cache=cache, progress=progress, until=until
    )
    best = fitted.history[fitted.best_epoch - 1]["val"]
    runner.value = float(best[runner.recipe.metric])
    runner.epochs = len(fitted.history)
    runner.seconds += time.monotonic() - started


def _worth(runner: _Runner, metric: str) -> float:
    return runner.value if HIGHER_IS_BETTER[metric] else -runner.value


def _knn(model: Network, data: Dataset, recipe: Recipe, cache: Path, progress: Progress) -> float:
    """Leave-nothing-out kNN on frozen features: accuracy on val of the majority of 10 cosine neighbours in train;
    for several labels or values the mean correlation of the neighbours' mean with the label."""
    device = device_of(recipe.transfer)
    model.to(device)
    train, val = (
        torch.nn.functional.normalize(
            features(model, split, name, data, device, cache, progress).flatten(1), dim=1
        )
        for name, split in (("train", data.train), ("val", data.val))
    )
    generator = np.random.default_rng(recipe.seed)
    own = [generator.permutation(len(part))[:KNN_ROWS] for part in (train, val)]
    near = (val[own[1]] @ train[own[0]].T).topk(min(NEIGHBOURS, len(own[0])), dim=1).indices.numpy()
    neighbours, truth = np.asarray(data.train.labels)[own[0]][near], np.asarray(data.val.labels)[own[1]]
    if truth.ndim == 1:
        votes = np.stack([(neighbours == k).sum(axis=1) for k in range(len(data.class_names))], axis=1)
        return float((votes.argmax(axis=1) == truth).mean())
    means = neighbours.astype(np.float64).mean(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = [
            np.corrcoef(means[:, k], truth[:, k].astype(np.float64))[0, 1] for k in range(truth.shape[1])
        ]
    return float(np.nan_to_num(found).mean())
