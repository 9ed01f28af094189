"""`strategy: auto`: a probe and one network are trained to their end, and the validation split decides.

A probe costs next to nothing, its backbone being asked once. Of the strategies that train a network one is chosen beforehand:
`full`, since `partial` lies between it and the probe, and is only taken where `full` costs too much or fails; `scratch`, where
it learns more than the pretrained networks in a short trial on a part of the samples. On such parts `full` starts slower than
`partial` whichever wins in the end (digits: 0.10 against 0.52 of 256 samples, 0.99 against 0.97 of all), so a trial does not
choose between these two; it says what each costs and which fail. Before the race a kNN probe on the frozen features says how
well the pretrained backbone fits the task (the best of 23 such scores over 42,000 runs, arXiv 2503.18528); it is evidence.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlexport.errors import DataError, RecipeError, TrainingError
from tlexport.modalities import splits
from tlexport.modalities.dataset import Dataset
from tlexport.modalities.metrics import HIGHER_IS_BETTER
from tlexport.models.network import Network
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.training.finetune import device_of, features, finetune

NEIGHBOURS = 10
KNN_ROWS = 2000  # of train and of val: enough to rank by, and a second's work
TRIAL = 0.02  # of a network's whole training: what its trial may cost
LEAST_SCHEDULE = 0.5  # of a network's epochs: a shorter training says little about a whole one
LEAST_UPDATES = 8  # of a trial: fewer of them rank nothing

Make = Callable[[str], Network]
Score = tuple[float, float]  # larger is better: the metric, then the negative log loss


@dataclass(frozen=True)
class Raced:
    """`recipe` with the strategy chosen, `folder` with its training as far as it went, and how it came to that."""

    recipe: Recipe
    folder: Path
    evidence: dict[str, Any]


@dataclass
class _Candidate:
    strategy: str
    recipe: Recipe
    folder: Path
    trial: Score | None = None
    final: Score | None = None
    trial_seconds: float = 0.0
    epoch_seconds: float = 0.0
    seconds: float = 0.0  # of its training on all samples
    failed: str = ""


@dataclass(frozen=True)
class _Course:
    """What every candidate runs on."""

    make: Make
    data: Dataset
    cache: Path
    progress: Progress


def race(
    make: Make, data: Dataset, recipe: Recipe, *, folder: Path, cache: Path, progress: Progress
) -> Raced:
    """Choose the strategy. `make(source)` gives the network with the weights of `source` (`none`: random).

    A candidate that diverges, whose metric is undefined or that its backbone does not allow is recorded, and the others go on.
    Without pretrained weights there is nothing to transfer: scratch is chosen without a race. Raises TrainingError if no
    candidate can be trained.
    """
    if recipe.backbone.weights == "none":
        progress.say("race: no pretrained weights, so the choice is scratch")
        why = "the backbone has no pretrained weights to transfer from"
        return Raced(_with(recipe, "scratch"), folder / "scratch", {"chosen": "scratch", "why": why})
    started = time.monotonic()
    course = _Course(make, data, cache, progress)
    knn = _knn(make(recipe.backbone.weights), data, recipe, cache, progress)
    candidates = [_Candidate(name, _with(recipe, name), folder / name) for name in recipe.race.candidates]
    probe = next((candidate for candidate in candidates if candidate.strategy == "probe"), None)
    networks = [candidate for candidate in candidates if candidate is not probe]
    probe_seconds = _finish(probe, course) if probe else 0.0
    part, epochs = _part(data, recipe)
    for candidate in networks:
        _try(candidate, replace(course, data=part), epochs, len(data.train))
    _level(networks)
    networks = _ordered(networks)
    grid = probe_seconds + recipe.transfer.epochs * sum(c.epoch_seconds for c in networks)
    spent = probe_seconds + sum(candidate.trial_seconds for candidate in networks)
    left = recipe.race.share * grid - spent
    winner, why = _decided(probe, [c for c in networks if not c.failed], course, left)
    if winner is None:
        reasons = "; ".join(f"{c.strategy}: {c.failed}" for c in candidates)
        raise TrainingError(f"no candidate of the race could be trained ({reasons})")
    raced = time.monotonic() - started
    audited = _audited(candidates, winner, course, recipe, raced) if recipe.race.audit else {}
    for candidate in candidates:
        shutil.rmtree(candidate.folder / "trial", ignore_errors=True)
        if candidate is not winner:
            shutil.rmtree(candidate.folder, ignore_errors=True)
    epochs_of = f"{winner.recipe.transfer.epochs} of {recipe.transfer.epochs} epochs"
    progress.say(f"race: {winner.strategy} ({epochs_of}), {why}")
    evidence = {
        "chosen": winner.strategy,
        "why": why,
        "epochs": winner.recipe.transfer.epochs,
        "knn_probe": knn,
        "trial": {"samples": len(part.train), "epochs": epochs, "val": _shown(networks, "trial", recipe)},
        "val": _shown(candidates, "final", recipe),
        "failed": {c.strategy: c.failed for c in candidates if c.failed},
        "epoch_seconds": {c.strategy: round(c.epoch_seconds, 3) for c in networks},
        "race_seconds": round(raced, 2),
        "grid_seconds_estimated": round(grid, 2),
        **audited,
    }
    return Raced(winner.recipe, winner.folder, evidence)


def _level(networks: list[_Candidate]) -> None:
    """Full and scratch compute the same: one cost for both, with half the noise of a short timing."""
    alike = [c for c in networks if c.strategy in ("full", "scratch") and not c.failed]
    seconds = sum(candidate.epoch_seconds for candidate in alike) / max(len(alike), 1)
    for candidate in alike:
        candidate.epoch_seconds = seconds


def _ordered(networks: list[_Candidate]) -> list[_Candidate]:
    """In the order they are to be trained in: full, partial; and scratch last, or first if its trial is the best of all."""
    best = max(networks, key=lambda candidate: _worth(candidate.trial), default=None)
    first = "scratch" if best is not None and best.strategy == "scratch" else "full"
    order = [first, "full", "partial", "scratch"]
    return sorted(networks, key=lambda candidate: order.index(candidate.strategy))


def _decided(
    probe: _Candidate | None, networks: list[_Candidate], course: _Course, left: float
) -> tuple[_Candidate | None, str]:
    """The winner and why. Networks come in the order to be trained in; one that fails on all samples gives way to the next.

    A network's schedule is cut to the `left` seconds; one of which less than LEAST_SCHEDULE would be left is not trained.
    """
    standing = probe if probe and not probe.failed else None
    affordable = [network for network in networks if _cut(network, left)]
    if standing is None and networks:
        return (affordable or networks)[0], "no probe to hold it against, and first in the order of the trial"
    if standing is not None and networks and not affordable:
        network = networks[0]
        told = f"training {network.strategy} would take more than race.share allows"
        if _worth(network.trial) > _worth(standing.final):
            return network, f"after its trial better than the finished probe, though {told}"
        return (
            standing,
            f"after its trial {network.strategy} is no better than the finished probe, and {told}",
        )
    for network in affordable:
        assert standing is not None
        _finish(network, course)
        if not network.failed:
            won = max((standing, network), key=lambda candidate: _worth(candidate.final))
            other = network if won is standing else standing
            return won, f"better on val than {other.strategy}, both trained to their end"
    return standing, "the only one that could be trained"


def _cut(network: _Candidate, left: float) -> bool:
    """Shorten the network's schedule, in place, to what fits into `left` seconds; False if that is too little of it."""
    transfer = network.recipe.transfer
    epochs = min(transfer.epochs, int(left / max(network.epoch_seconds, 1e-9)))
    if epochs < max(1, LEAST_SCHEDULE * transfer.epochs):
        return False
    cut = transfer.model_copy(update={"epochs": epochs})
    network.recipe = network.recipe.model_copy(update={"transfer": cut})
    return True


def _with(recipe: Recipe, strategy: str) -> Recipe:
    chosen = recipe.transfer.model_copy(update={"strategy": strategy})
    return recipe.model_copy(update={"transfer": chosen})


def _part(data: Dataset, recipe: Recipe) -> tuple[Dataset, int]:
    """The data with the part of train that a trial learns on, and for how many epochs."""
    count = len(data.train)
    passes = TRIAL * recipe.transfer.epochs
    least = min(count, LEAST_UPDATES * recipe.transfer.batch_size)
    rows = min(count, max(least, round(min(passes, 1.0) * count)))
    labels = np.asarray(data.train.labels)
    strata = labels if labels.dtype.kind in "iu" else np.zeros(count, np.int64)
    drawn = splits.nested(strata, rows, recipe.seed)
    report = data.report.model_copy(update={"sha256": f"{data.report.sha256}, {rows} of {count}"})
    return replace(data, train=data.train.part(drawn), report=report), max(1, math.floor(passes))


def _try(candidate: _Candidate, course: _Course, epochs: int, samples: int) -> None:
    """Train on the part, without what needs a long schedule (averaged weights, patience); an epoch on all `samples`
    is taken to cost in proportion, and validation as much as here."""
    short = candidate.recipe.transfer.model_copy(update={"epochs": epochs, "ema": None, "patience": None})
    recipe = candidate.recipe.model_copy(update={"transfer": short})
    history = _trained(candidate, recipe, course, candidate.folder / "trial")
    if history:
        candidate.trial = _best(history, recipe)
        whole, training, images = (
            sum(entry[key] for entry in history) for key in ("seconds", "train_seconds", "images")
        )
        validating = (whole - training) / len(history)
        candidate.trial_seconds = whole
        candidate.epoch_seconds = training / images * samples + validating


def _finish(candidate: _Candidate, course: _Course) -> float:
    """Train to the end; the seconds that it took."""
    started = time.monotonic()
    history = _trained(candidate, candidate.recipe, course, candidate.folder)
    if history:
        candidate.final = _best(history, candidate.recipe)
    candidate.seconds += time.monotonic() - started
    return candidate.seconds


def _audited(
    candidates: list[_Candidate], winner: _Candidate, course: _Course, recipe: Recipe, raced: float
) -> dict[str, Any]:
    """The full grid: every candidate to its end, what the choice cost against the best of them, and what time it took."""
    before = winner.seconds
    for candidate in candidates:
        if candidate.final is None and not candidate.failed:
            _finish(candidate, course)
    finals = {c.strategy: c.final for c in candidates if c.final is not None}
    best = max(finals.values(), key=_worth)[0]
    regret = (
        (best - finals[winner.strategy][0]) / max(abs(best), 1e-12) if winner.strategy in finals else None
    )
    grid = sum(candidate.seconds for candidate in candidates)
    return {
        "grid": _shown(candidates, "final", winner.recipe),
        "regret": regret,
        "time_share": round((raced + winner.seconds - before) / max(grid, 1e-9), 3),
    }


def _trained(candidate: _Candidate, recipe: Recipe, course: _Course, folder: Path) -> list[dict[str, Any]]:
    """The history of its training; empty, with the reason in `failed`, if it cannot be trained."""
    source = "none" if candidate.strategy == "scratch" else recipe.backbone.weights
    try:
        fitted = finetune(
            course.make(source),
            course.data,
            recipe,
            folder=folder,
            cache=course.cache,
            progress=course.progress,
        )
    except (TrainingError, RecipeError, DataError) as error:
        candidate.failed = str(error)
        course.progress.warn(f"race: {candidate.strategy} is out: {error}")
        return []
    return fitted.history


def _best(history: list[dict[str, Any]], recipe: Recipe) -> Score:
    sign = 1.0 if HIGHER_IS_BETTER[recipe.metric] else -1.0
    found = [(sign * entry["val"][recipe.metric], -entry["val"].get("log_loss", 0.0)) for entry in history]
    return max(found, key=_worth)


def _worth(score: Score | None) -> Score:
    """A metric that is no number is worse than any."""
    if score is None or not math.isfinite(score[0]):
        return (-math.inf, -math.inf)
    return score


def _shown(candidates: list[_Candidate], which: str, recipe: Recipe) -> dict[str, float]:
    sign = 1.0 if HIGHER_IS_BETTER[recipe.metric] else -1.0
    scores = {candidate.strategy: getattr(candidate, which) for candidate in candidates}
    return {name: sign * score[0] for name, score in scores.items() if score is not None}


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
