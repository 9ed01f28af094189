"""The learning rate over the steps of a training."""

from __future__ import annotations

import math

import torch


def rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate: linear warm-up, then half a cosine to zero (Loshchilov and Hutter, arXiv 1608.03983)."""
    rising = warmup * steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Every group at `share` of its own `peak_lr`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share
