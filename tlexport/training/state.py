"""The state of an unfinished training, in one safetensors file, so that a killed run goes on exactly where it was."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from tlexport.errors import StorageError
from tlexport.run import replacing

Weights = dict[str, torch.Tensor]


@dataclass
class TrainingState:
    """What must be known after an epoch to go on: everything else follows from the recipe's seed and the epoch.

    `problem` names what is trained on what: a state is only taken up for the same one. `scaler` is the FP16
    loss scaler's, empty without one.
    """

    problem: str = ""
    epoch: int = 0
    best_epoch: int = 0
    best_score: tuple[float, float] | None = None  # the metric, then the negative log loss
    history: list[dict[str, Any]] = field(default_factory=list)
    best: Weights = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


def save(
    path: Path,
    state: TrainingState,
    network: nn.Module,
    averaged: nn.Module | None,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write everything in one file that appears whole or not at all. Raises StorageError if it cannot be written."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
    if averaged is not None:
        tensors |= {f"averaged.{name}": tensor for name, tensor in averaged.state_dict().items()}
    scalars: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    header = {
        "problem": state.problem,
        "scaler": state.scaler,
        "epoch": state.epoch,
        "best_epoch": state.best_epoch,
        "best_score": state.best_score,
        "history": state.history,
        "optimizer": scalars,
    }
    with replacing(path) as partial:
        try:
            save_file(
                {name: _owned(tensor) for name, tensor in tensors.items()},
                partial,
                metadata={"state": json.dumps(header)},
            )
        except SafetensorError as error:
            raise StorageError(
                f"cannot write {path}: {error}; free some space and run the same command again, it resumes"
            ) from error


def load(
    path: Path, problem: str, network: nn.Module, averaged: nn.Module | None, optimizer: torch.optim.Optimizer
) -> TrainingState | None:
    """Restore in place; None where there is no state or it belongs to another problem (it is then overwritten)."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, TypeError, ValueError):
        return None
    if header.get("problem") != problem:
        return None
    network.load_state_dict(_under(tensors, "network."))
    if averaged is not None:
        averaged.load_state_dict(_under(tensors, "averaged."))
    _restore(optimizer, _under(tensors, "optimizer."), header["optimizer"])
    return TrainingState(
        problem,
        header["epoch"],
        header["best_epoch"],
        tuple(header["best_score"]),
        header["history"],
        _under(tensors, "best."),
        header["scaler"],
    )


def _restore(optimizer: torch.optim.Optimizer, tensors: Weights, scalars: dict[str, Any]) -> None:
    """Moments get their parameter's memory layout back: the fused optimisers walk both as flat memory."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    values: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *scalars.items()]:
        index, name = key.split(".", 1)
        own = parameters[int(index)]
        if isinstance(value, torch.Tensor) and value.shape == own.shape:
            value = torch.empty_like(own, requires_grad=False).copy_(value)
        values.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": values})


def _under(tensors: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _owned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in plain layout: safetensors refuses shared storage and keeps no memory format."""
    return tensor.detach().to("cpu", copy=True).contiguous()
