"""The training loop: one for every strategy. What is trained and where batches come from is passed in."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tlexport.errors import TrainingError
from tlexport.modalities.metrics import HIGHER_IS_BETTER
from tlexport.progress import Progress
from tlexport.recipe import Transfer
from tlexport.run import write_text
from tlexport.training import schedule
from tlexport.training import state as states
from tlexport.training.losses import Loss, sampling_weights
from tlexport.training.state import TrainingState


@dataclass(frozen=True)
class Problem:
    """What the loop needs: a network, its optimiser groups, batches, labels and a judge.

    `inputs(indices [B])` gives the network's arguments on its device; `labels` is int64 [n] or float32 [n,K], and
    `loss(raw, labels)` a scalar; `validate(network)` gives the validation metrics; `prepare(network)` sets its training
    mode; `task` says how samples can be balanced.
    """

    network: nn.Module
    groups: list[dict[str, Any]]
    inputs: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    labels: torch.Tensor
    loss: Loss
    task: str
    validate: Callable[[nn.Module], dict[str, float]]
    prepare: Callable[[nn.Module], None]
    device: torch.device


@dataclass(frozen=True)
class Fitted:
    """`weights` are the best epoch's; `images_per_second` counts training images over training time alone."""

    weights: dict[str, torch.Tensor]
    best_epoch: int
    history: list[dict[str, Any]]
    images_per_second: float
    resumed_from: int


def fit(
    problem: Problem,
    transfer: Transfer,
    *,
    metric: str,
    seed: int,
    identity: str,
    folder: Path,
    progress: Progress,
    until: int | None = None,
) -> Fitted:
    """Train, keep the best epoch by the validation `metric`, stop early if asked.

    `until` ends this call after that epoch of the whole schedule; a later call goes on from there.
    Resumes if `folder` holds a state of the same `identity`, which names everything that the result depends on.
    Writes `state.safetensors` and `history.jsonl` after every epoch. Raises TrainingError if the loss is not finite.
    """
    network = problem.network
    optimizer = _optimizer(problem.groups, transfer)
    averaged = _averaged(network, transfer.ema)
    judged = averaged if averaged is not None else network
    state = states.load(
        folder / "state.safetensors", identity, network, averaged, optimizer
    ) or TrainingState(identity)
    resumed_from = state.epoch
    if resumed_from:
        progress.say(f"resuming after epoch {resumed_from}")
    scaler = torch.amp.GradScaler(problem.device.type, enabled=transfer.autocast == "fp16")
    if state.scaler:
        scaler.load_state_dict(state.scaler)
    per_epoch = len(_batches(problem, transfer, seed))
    last_epoch = min(until or transfer.epochs, transfer.epochs)
    while state.epoch < last_epoch and not _should_stop(state, transfer.patience):
        started = time.monotonic()
        epoch = state.epoch
        torch.manual_seed(seed * 1_000_003 + epoch)
        batches = _batches(problem, transfer, seed * 1_000_003 + epoch)
        problem.prepare(network)
        total, seen = torch.zeros((), device=problem.device), 0
        with progress.bar(f"epoch {epoch + 1}/{transfer.epochs}") as step:
            for number, indices in enumerate(batches):
                schedule.set_rate(
                    optimizer,
                    schedule.rate(epoch * per_epoch + number, per_epoch * transfer.epochs, transfer.warmup),
                )
                total += _update(problem, optimizer, scaler, transfer, indices) * len(indices)
                if averaged is not None:
                    averaged.update_parameters(network)
                seen += len(indices)
                step(number + 1, len(batches))
        train_loss, train_seconds = float(total) / seen, time.monotonic() - started
        if not math.isfinite(train_loss):
            raise TrainingError(
                f"the loss became {train_loss} in epoch {epoch + 1}; lower transfer.lr (now {transfer.lr}) "
                "or check the data for constant or extreme samples"
            )
        _record(state, problem.validate(judged), metric, train_loss, train_seconds, seen, judged)
        state.history[-1]["lr"] = transfer.lr * schedule.rate(
            (epoch + 1) * per_epoch - 1, per_epoch * transfer.epochs, transfer.warmup
        )
        state.history[-1]["seconds"] = time.monotonic() - started  # with validation
        state.scaler = scaler.state_dict()
        states.save(folder / "state.safetensors", state, network, averaged, optimizer)
        write_text(folder / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in state.history))
        last = state.history[-1]
        progress.say(
            f"epoch {state.epoch}/{transfer.epochs}  loss {train_loss:.4f}  val {metric} {last['val'][metric]:.4f}  "
            f"{last['images_per_second']:.0f} samples/s"
        )
    rate = sum(e["images"] for e in state.history) / max(sum(e["train_seconds"] for e in state.history), 1e-9)
    return Fitted(state.best, state.best_epoch, state.history, rate, resumed_from)


def _update(
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    transfer: Transfer,
    indices: torch.Tensor,
) -> torch.Tensor:
    inputs, labels = problem.inputs(indices), problem.labels[indices].to(problem.device)
    with autocast(transfer.autocast, problem.device):
        raw = problem.network(*inputs)
    loss = problem.loss(raw.float(), labels)
    optimizer.zero_grad(set_to_none=True)
    scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_([p for group in problem.groups for p in group["params"]], 1.0)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()


def autocast(choice: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """`auto` is bf16 on a CUDA device that has it; the CPU runs in FP32 unless bf16 is asked for."""
    if choice == "off" or (
        choice == "auto" and not (device.type == "cuda" and torch.cuda.is_bf16_supported())
    ):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.float16 if choice == "fp16" else torch.bfloat16)


def _averaged(network: nn.Module, decay: float | None) -> AveragedModel | None:
    """Exponential moving average of weights and batch statistics."""
    if decay is None:
        return None
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)


def _optimizer(groups: list[dict[str, Any]], transfer: Transfer) -> torch.optim.Optimizer:
    if transfer.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=transfer.lr, fused=True)
    return torch.optim.SGD(groups, lr=transfer.lr, momentum=0.9, nesterov=True, fused=True)


def _batches(problem: Problem, transfer: Transfer, seed: int) -> list[torch.Tensor]:
    """Index batches of one epoch. A last batch of one is left out: batch normalisation cannot use it."""
    generator = torch.Generator().manual_seed(seed)
    n = len(problem.labels)
    if transfer.balance == "sampler":
        weights = sampling_weights(problem.labels, problem.task)
        order = torch.multinomial(weights, n, replacement=True, generator=generator)
    else:
        order = torch.randperm(n, generator=generator)
    batches = list(torch.split(order, transfer.batch_size))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


def _record(
    state: TrainingState,
    metrics: dict[str, float],
    metric: str,
    loss: float,
    seconds: float,
    images: int,
    judged: nn.Module,
) -> None:
    if metric not in metrics:
        raise TrainingError(
            f"the metric {metric!r} is undefined on the validation split (defined: {', '.join(metrics)}); choose another with metric=..."
        )
    state.epoch += 1
    state.history.append(
        {
            "epoch": state.epoch,
            "train_loss": loss,
            "val": metrics,
            "train_seconds": seconds,
            "images": images,
            "images_per_second": images / seconds,
        }
    )
    # A small validation split ties often: then the more probable labels decide.
    sign = 1.0 if HIGHER_IS_BETTER.get(metric, True) else -1.0
    score = (sign * metrics[metric], -metrics.get("log_loss", 0.0))
    if state.best_score is None or score > state.best_score:
        state.best_score, state.best_epoch = score, state.epoch
        own = judged.module if isinstance(judged, AveragedModel) else judged
        state.best = {name: tensor.detach().cpu().clone() for name, tensor in own.state_dict().items()}


def _should_stop(state: TrainingState, patience: int | None) -> bool:
    return patience is not None and state.epoch - state.best_epoch >= patience
