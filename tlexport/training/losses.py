"""What training minimises: the network's raw answers against the labels.

Raw answers are [B, K], or [B, M, K] of an ensemble: then each member has its own loss and their mean is minimised, so that
members stay different (Gorishniy et al., arXiv 2410.24210, section 3). Regression happens in the network's own units: the
label's logarithm where `link` is log, standardised by `center` and `scale`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tlexport.errors import RecipeError, TrainingError
from tlexport.models.network import Spec
from tlexport.recipe import Transfer

Loss = Callable[[Tensor, Tensor], Tensor]

_FOR_VALUES = ("mse", "huber", "qlike")


def loss_of(spec: Spec, transfer: Transfer, labels: Tensor) -> Loss:
    """(raw, labels [B] or [B, K]) -> a scalar. `labels` are the training split's: int64 [n] or float32 [n, K].

    Raises RecipeError where the recipe's loss or balance is not of this task, TrainingError where a label has no
    logarithm.
    """
    _require_fitting(spec, transfer)
    if spec.task == "regression":
        return _of_values(spec, transfer, labels)
    if spec.task == "multilabel":
        return _of_labels(transfer, labels)
    return _of_classes(transfer, labels)


def _require_fitting(spec: Spec, transfer: Transfer) -> None:
    fitting = ("auto", *(_FOR_VALUES if spec.task == "regression" else ("cross_entropy",)))
    if transfer.loss not in fitting:
        raise RecipeError(
            f"transfer.loss={transfer.loss} does not fit a {spec.task} task (these do: {', '.join(fitting)})"
        )
    if transfer.loss == "qlike" and spec.link != "log":
        raise RecipeError("transfer.loss=qlike needs a network that answers in logarithms")
    if spec.task == "regression" and transfer.balance != "none":
        raise RecipeError(f"transfer.balance={transfer.balance} is for classes; a regression has none")


def _of_classes(transfer: Transfer, labels: Tensor) -> Loss:
    """Cross-entropy; with `balance: weights` rare classes count as much as frequent ones."""
    counts = torch.bincount(labels).clamp(min=1)
    weight = (len(labels) / (len(counts) * counts)).float() if transfer.balance == "weights" else None

    def loss(raw: Tensor, y: Tensor) -> Tensor:
        raw, y = _members_as_rows(raw, y)
        own = weight.to(raw.device) if weight is not None else None
        return functional.cross_entropy(raw, y, weight=own, label_smoothing=transfer.label_smoothing)

    return loss


def _of_labels(transfer: Transfer, labels: Tensor) -> Loss:
    """Binary cross-entropy over the cells that were measured (0 or 1; below 0: unknown)."""
    known = labels >= 0
    positive = ((labels * known).sum(dim=0) / known.sum(dim=0).clamp(min=1)).clamp(1e-3, 1 - 1e-3)
    weight = (1 - positive) / positive if transfer.balance == "weights" else None
    smoothing = transfer.label_smoothing

    def loss(raw: Tensor, y: Tensor) -> Tensor:
        raw, y = _members_as_rows(raw, y)
        measured = y >= 0
        cells = functional.binary_cross_entropy_with_logits(
            raw,
            y.clamp(min=0) * (1 - smoothing) + smoothing / 2,
            pos_weight=weight.to(raw.device) if weight is not None else None,
            reduction="none",
        )
        return (cells * measured).sum() / measured.sum().clamp(min=1)

    return loss


def _of_values(spec: Spec, transfer: Transfer, labels: Tensor) -> Loss:
    if spec.link == "log" and (wrong := int((labels <= 0).sum())):
        raise TrainingError(
            f"{wrong} training labels are not positive, so they have no logarithm; remove them or choose another target"
        )

    def loss(raw: Tensor, y: Tensor) -> Tensor:
        raw, y = _members_as_rows(raw, y)
        center, scale = (raw.new_tensor(values) for values in (spec.center, spec.scale))
        y = torch.log(y) if spec.link == "log" else y
        if transfer.loss == "qlike":
            excess = y - (raw * scale + center)
            return (torch.exp(excess) - excess - 1).mean()  # Patton 2011, in logarithms
        target = (y - center) / scale
        return (
            functional.huber_loss(raw, target)
            if transfer.loss == "huber"
            else functional.mse_loss(raw, target)
        )

    return loss


def _members_as_rows(raw: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[B, M, K] -> [B*M, K], each with its sample's label."""
    if raw.ndim < 3:
        return raw, y
    return raw.flatten(0, 1), y.repeat_interleave(raw.shape[1], dim=0)


def sampling_weights(labels: Tensor, task: str) -> Tensor:
    """float [n]: how often to draw each sample so that classes come equally often (`balance: sampler`).

    Raises RecipeError for a regression.
    """
    if task == "regression":
        raise RecipeError("transfer.balance=sampler is for classes; a regression has none")
    if labels.ndim == 1:
        return (1.0 / torch.bincount(labels).clamp(min=1).float())[labels]
    positive = labels.clamp(min=0)
    rarity = 1.0 / positive.mean(dim=0).clamp(min=1e-3)
    return torch.where(positive.sum(dim=1) > 0, (positive * rarity).amax(dim=1), torch.ones(len(labels)))


def labels_of(labels: Any, task: str) -> Tensor:
    """A split's labels as the losses take them: int64 [n], or float32 [n, K]."""
    dtype = torch.float32 if task in ("multilabel", "regression") else torch.int64
    return torch.as_tensor(labels).to(dtype)
