"""Pretraining: a pretext task is learned on the training split, and the best weights by its validation loss are kept."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tlexport.errors import TrainingError
from tlexport.modalities.dataset import Dataset, Split
from tlexport.models.network import Network
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.run import write_text
from tlexport.training import batches, schedule
from tlexport.training import state as states
from tlexport.training.finetune import device_of
from tlexport.training.state import TrainingState

WARMUP = 0.05  # share of the steps


@dataclass(frozen=True)
class Pretrained:
    """How it went; the best epoch's weights are in the model. Losses are the pretext's, on the validation split."""

    first_loss: float
    history: list[dict[str, Any]]
    best_epoch: int
    samples_per_second: float
    resumed_from: int


def pretrain(
    model: Network, pretext: nn.Module, data: Dataset, recipe: Recipe, *, folder: Path, progress: Progress
) -> Pretrained:
    """Minimise `pretext(*inputs)` over `data.train`; `pretext` holds `model`'s backbone and a decoder of its own.

    Resumes from `folder` if that holds a state of the same data and recipe. Raises TrainingError if the loss is not
    finite.
    """
    config, device = recipe.pretrain, device_of(recipe.transfer)
    pretext.to(device)
    optimizer = torch.optim.AdamW(_groups(pretext, config.lr, config.weight_decay), lr=config.lr, fused=True)
    identity = (
        f"{data.report.sha256} {recipe.seed} {recipe.backbone.model_dump_json()} {config.model_dump_json()}"
    )
    state_file = folder / "state.safetensors"
    found = states.load(state_file, identity, pretext, None, optimizer)
    state = found or TrainingState(identity)
    resumed_from = state.epoch
    if found is None:
        state.history = [{"epoch": 0, "val_loss": _judged(model, pretext, data.val, recipe, device)}]
    else:
        progress.say(f"resuming after epoch {resumed_from}")
    steps = max(len(data.train) // config.batch_size, 1)
    while state.epoch < config.epochs:
        started, epoch = time.monotonic(), state.epoch
        with (
            _drawn(recipe.seed * 1_000_003 + epoch),
            progress.bar(f"epoch {epoch + 1}/{config.epochs}") as step,
        ):
            pretext.train()
            total = torch.zeros((), device=device)
            for number, rows in enumerate(_shuffled(len(data.train), config.batch_size)):
                schedule.set_rate(
                    optimizer, schedule.rate(epoch * steps + number, steps * config.epochs, WARMUP)
                )
                loss = pretext(*batches.prepared(model, data.train, rows, device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(pretext.parameters(), 1.0)
                optimizer.step()
                total += loss.detach()
                step(number + 1, steps)
        seconds, train_loss = time.monotonic() - started, float(total) / steps
        if not math.isfinite(train_loss):
            raise TrainingError(
                f"the pretext's loss became {train_loss} in epoch {epoch + 1}; lower pretrain.lr (now {config.lr})"
            )
        val_loss = _judged(model, pretext, data.val, recipe, device)
        state.epoch += 1
        rate = steps * min(config.batch_size, len(data.train)) / seconds
        state.history.append(
            {
                "epoch": state.epoch,
                "train_loss": train_loss,
                "val_loss": val_loss,
                "samples_per_second": rate,
            }
        )
        if state.best_score is None or -val_loss > state.best_score[0]:
            state.best_score, state.best_epoch = (-val_loss, 0.0), state.epoch
            state.best = {name: t.detach().cpu().clone() for name, t in model.backbone.state_dict().items()}
        states.save(state_file, state, pretext, None, optimizer)
        write_text(folder / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in state.history))
        progress.say(
            f"epoch {state.epoch}/{config.epochs}  loss {train_loss:.4f}  val loss {val_loss:.4f}  {rate:.0f} samples/s"
        )
    model.to("cpu").backbone.load_state_dict(state.best)
    epochs = state.history[1:]
    return Pretrained(
        state.history[0]["val_loss"],
        epochs,
        state.best_epoch,
        float(np.mean([entry["samples_per_second"] for entry in epochs])),
        resumed_from,
    )


def _groups(pretext: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Biases and normalisation parameters get no weight decay."""
    tensors = [p for p in pretext.parameters() if p.requires_grad]
    parts = (([p for p in tensors if p.ndim > 1], weight_decay), ([p for p in tensors if p.ndim <= 1], 0.0))
    return [{"params": of, "lr": lr, "peak_lr": lr, "weight_decay": decay} for of, decay in parts if of]


def _judged(model: Network, pretext: nn.Module, split: Split, recipe: Recipe, device: torch.device) -> float:
    """Mean loss over the split, with the same masks every time."""
    pretext.eval()
    size, total = recipe.pretrain.batch_size, 0.0
    with torch.no_grad(), _drawn(recipe.seed):
        for start in range(0, len(split), size):
            rows = np.arange(start, min(start + size, len(split)))
            total += float(pretext(*batches.prepared(model, split, rows, device))) * len(rows)
    return total / len(split)


@contextlib.contextmanager
def _drawn(seed: int) -> Iterator[None]:
    """torch's global generator at `seed`; as it was afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _shuffled(n: int, size: int) -> Iterator[np.ndarray]:
    """Row batches of one epoch; what does not fill a batch waits for another epoch's order."""
    order = torch.randperm(n).numpy()
    for start in range(0, max(n // size, 1) * size, size):
        yield order[start : start + size]
