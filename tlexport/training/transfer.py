"""Transfer strategies: which parameters learn, and how fast each stage of the backbone does.

probe    the backbone is frozen; a linear head learns on its features
scratch  the whole network learns from random weights, all at one rate
partial  the last k stages and the head learn; everything below is frozen, its batch statistics too
full     everything learns, each stage slower than the one above it (layer-wise decay: Howard and Ruder,
         arXiv 1801.06146, section 3.2; Clark et al., arXiv 2003.10555)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tlexport.errors import RecipeError
from tlexport.models.network import Network
from tlexport.recipe import Transfer


def parameter_groups(model: Network, transfer: Transfer) -> list[dict[str, Any]]:
    """Optimiser groups from the head down: `lr` peaks at `transfer.lr` times `layer_decay` per stage below the head.

    Freezes what the strategy does not train. Biases and normalisation parameters get no weight decay.
    Raises RecipeError if `partial` asks for more stages than the backbone has.
    """
    stages = model.stages()
    if transfer.strategy == "partial" and transfer.stages > len(stages):
        names = ", ".join(name for name, _ in stages)
        raise RecipeError(
            f"transfer.stages is {transfer.stages}, the backbone has {len(stages)} stages: {names}"
        )
    every = len(stages)
    trained = {"probe": 0, "partial": transfer.stages, "full": every, "scratch": every}[transfer.strategy]
    decay = 1.0 if transfer.strategy == "scratch" else transfer.layer_decay
    parameters = dict(model.backbone.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    groups = _groups("head", list(model.head.parameters()), transfer.lr, transfer.weight_decay)
    for depth, (name, members) in enumerate(reversed(stages), start=1):
        if depth > trained:
            break
        tensors = [parameters[member] for member in members]
        for tensor in tensors:
            tensor.requires_grad_(True)
        groups += _groups(name, tensors, transfer.lr * decay**depth, transfer.weight_decay)
    return groups


def train_mode(model: Network) -> None:
    """Training mode for what learns; frozen modules keep the batch statistics they came with."""
    model.train()
    for module in model.backbone.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()
    if not any(parameter.requires_grad for parameter in model.backbone.parameters()):
        model.backbone.eval()


def _groups(name: str, tensors: list[nn.Parameter], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    matrices = [tensor for tensor in tensors if tensor.ndim > 1]
    vectors = [tensor for tensor in tensors if tensor.ndim <= 1]
    return [
        {"name": f"{name}{suffix}", "params": members, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for suffix, members, decay in (("", matrices, weight_decay), (" (no decay)", vectors, 0.0))
        if members
    ]


def convolutional(model: nn.Module) -> bool:
    """Whether the network's time goes into convolutions, which oneDNN and cuDNN run faster in channels_last."""
    kinds = [type(module) for module in model.modules()]
    return kinds.count(nn.Conv2d) > kinds.count(nn.LayerNorm)


def memory_format(model: nn.Module) -> torch.memory_format:
    return torch.channels_last if convolutional(model) else torch.contiguous_format
