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
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tlexport.errors import TrainingError
from tlexport.progress import Progress
from tlexport.recipe import Transfer
from tlexport.run import write_text
from tlexport.training import state as states
from tlexport.training.state import TrainingState


@dataclass(frozen=True)
class Problem:
    """What the loop needs: a network, its optimiser groups, batches, labels and a judge.

    `inputs(indices [B])` gives what the network eats on its device; `labels` is int64 [n] or float32 [n,K];
    `validate(network)` gives the validation metrics; `prepare(network)` sets its training mode.
    """

    network: nn.Module
    groups: list[dict[str, Any]]
    inputs: Callable[[torch.Tensor], torch.Tensor]
    labels: torch.Tensor
    multilabel: bool
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
) -> Fitted:
    """Train, keep the best epoch by the validation `metric`, stop early if asked.

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
    loss_of = _loss(problem, transfer)
    scaler = torch.amp.GradScaler(problem.device.type, enabled=transfer.autocast == "fp16")
    if state.scaler:
        scaler.load_state_dict(state.scaler)
    per_epoch = len(_batches(len(problem.labels), transfer, problem.labels, seed))
    while state.epoch < transfer.epochs and not _should_stop(state, transfer.patience):
        started = time.monotonic()
        epoch = state.epoch
        torch.manual_seed(seed * 1_000_003 + epoch)
        batches = _batches(len(problem.labels), transfer, problem.labels, seed * 1_000_003 + epoch)
        problem.prepare(network)
        total, seen = torch.zeros((), device=problem.device), 0
        with progress.bar(f"epoch {epoch + 1}/{transfer.epochs}") as step:
            for number, indices in enumerate(batches):
                _set_rate(
                    optimizer, _rate(epoch * per_epoch + number, per_epoch * transfer.epochs, transfer.warmup)
                )
                total += _update(problem, optimizer, scaler, loss_of, transfer, indices) * len(indices)
                if averaged is not None:
                    averaged.update_parameters(network)
                seen += len(indices)
                step(number + 1, len(batches))
        train_loss, train_seconds = float(total) / seen, time.monotonic() - started
        if not math.isfinite(train_loss):
            raise TrainingError(
                f"the loss became {train_loss} in epoch {epoch + 1}; lower transfer.lr (now {transfer.lr}) "
                "or check the data for constant or extreme images"
            )
        _record(state, problem.validate(judged), metric, train_loss, train_seconds, seen, judged)
        state.history[-1]["lr"] = transfer.lr * _rate(
            (epoch + 1) * per_epoch - 1, per_epoch * transfer.epochs, transfer.warmup
        )
        state.scaler = scaler.state_dict()
        states.save(folder / "state.safetensors", state, network, averaged, optimizer)
        write_text(folder / "history.jsonl", "".join(json.dumps(entry) + "\n" for entry in state.history))
        last = state.history[-1]
        progress.say(
            f"epoch {state.epoch}/{transfer.epochs}  loss {train_loss:.4f}  val {metric} {last['val'][metric]:.4f}  "
            f"{last['images_per_second']:.0f} images/s"
        )
    rate = sum(e["images"] for e in state.history) / max(sum(e["train_seconds"] for e in state.history), 1e-9)
    return Fitted(state.best, state.best_epoch, state.history, rate, resumed_from)


def _update(
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    loss_of: Callable[..., torch.Tensor],
    transfer: Transfer,
    indices: torch.Tensor,
) -> torch.Tensor:
    inputs, labels = problem.inputs(indices), problem.labels[indices].to(problem.device)
    with autocast(transfer.autocast, problem.device):
        logits = problem.network(inputs)
    loss = loss_of(logits.float(), labels)
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


def _loss(problem: Problem, transfer: Transfer) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Cross-entropy over classes, or one per label; with `balance: weights` rare classes count as much as frequent ones."""
    labels, smoothing = problem.labels, transfer.label_smoothing
    weigh = transfer.balance == "weights"
    if problem.multilabel:
        positive = labels.mean(dim=0).clamp(1e-3, 1 - 1e-3)
        weight = ((1 - positive) / positive).to(problem.device) if weigh else None
        return lambda logits, y: functional.binary_cross_entropy_with_logits(
            logits, y * (1 - smoothing) + smoothing / 2, pos_weight=weight
        )
    counts = torch.bincount(labels).clamp(min=1)
    class_weight = (len(labels) / (len(counts) * counts)).float().to(problem.device) if weigh else None
    return lambda logits, y: functional.cross_entropy(
        logits, y, weight=class_weight, label_smoothing=smoothing
    )


def _batches(n: int, transfer: Transfer, labels: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Index batches of one epoch. A last batch of one is left out: batch normalisation cannot use it."""
    generator = torch.Generator().manual_seed(seed)
    if transfer.balance == "sampler":
        order = torch.multinomial(_sample_weights(labels), n, replacement=True, generator=generator)
    else:
        order = torch.randperm(n, generator=generator)
    batches = list(torch.split(order, transfer.batch_size))
    return batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches


def _sample_weights(labels: torch.Tensor) -> torch.Tensor:
    if labels.ndim == 1:
        return (1.0 / torch.bincount(labels).clamp(min=1).float())[labels]
    rarity = 1.0 / labels.mean(dim=0).clamp(min=1e-3)
    return torch.where(labels.sum(dim=1) > 0, (labels * rarity).amax(dim=1), torch.ones(len(labels)))


def _rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate: linear warm-up, then half a cosine to zero (Loshchilov and Hutter, arXiv 1608.03983)."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def _set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


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
    score = (metrics[metric], -metrics.get("log_loss", 0.0))
    if state.best_score is None or score > state.best_score:
        state.best_score, state.best_epoch = score, state.epoch
        own = judged.module if isinstance(judged, AveragedModel) else judged
        state.best = {name: tensor.detach().cpu().clone() for name, tensor in own.state_dict().items()}


def _should_stop(state: TrainingState, patience: int | None) -> bool:
    return patience is not None and state.epoch - state.best_epoch >= patience
