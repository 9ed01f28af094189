"""What every model is: a backbone that makes features, a head on top, and how its answers are served."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from tlexport.errors import RecipeError
from tlexport.recipe import Recipe

Task = Literal["binary", "multiclass", "multilabel", "regression", "pretrain"]
Stages = list[tuple[str, list[str]]]
Sizes = TypeVar("Sizes", bound=BaseModel)


class Spec(BaseModel):
    """All that is needed to rebuild a network without its weights. Each modality adds its own fields.

    In a regression `center` and `scale` [K] are the training labels' mean and standard deviation, after the
    logarithm where `link` is `log`: the network answers in these units.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    modality: str
    backbone: str
    classes: int  # 1 in pretraining, where the head is not used
    task: Task
    dropout: float = 0.0
    link: Literal["identity", "log"] = "identity"
    center: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()


class Network(nn.Module):
    """A backbone and a linear head: `backbone.*` and `head.*` are the whole state dict.

    `INPUTS` names the graph's inputs in the order of `forward`'s arguments. `head` is Sequential(Dropout, linear),
    linear being nn.Linear or MemberLinear. `NEW` are beginnings of the names of backbone tensors that belong to the task as
    the head does: weights from elsewhere need not hold them.
    """

    INPUTS: ClassVar[tuple[str, ...]]
    NEW: ClassVar[tuple[str, ...]] = ()
    spec: Any
    backbone: nn.Module
    head: nn.Sequential

    def features(self, *inputs: Tensor) -> Tensor:
        """The inputs -> features [B, D], or [B, M, D] of an ensemble of M members."""
        raise NotImplementedError

    def forward(self, *inputs: Tensor) -> Tensor:
        """The inputs -> logits or standardised values [B, K], or [B, M, K] of an ensemble."""
        answers: Tensor = self.head(self.features(*inputs))
        return answers

    def stages(self) -> Stages:
        """The backbone's parameters by stage from the input to the last, named as `self.backbone` names them.

        Each parameter is in exactly one stage; the head is in none.
        """
        raise NotImplementedError

    def answer(self, raw: Tensor) -> Tensor:
        """What `forward` returns -> what is served, float32 [B, K]: probabilities, or values in their own unit."""
        raw = raw.float()
        if self.spec.task == "regression":
            return _values(raw, self.spec)
        shares = torch.sigmoid(raw) if self.spec.task == "multilabel" else torch.softmax(raw, dim=-1)
        return shares.mean(dim=1) if raw.ndim == 3 else shares


def _values(raw: Tensor, spec: Spec) -> Tensor:
    scale, center = (raw.new_tensor(values) for values in (spec.scale, spec.center))
    values = raw * scale + center
    values = values.mean(dim=1) if raw.ndim == 3 else values
    return torch.exp(values) if spec.link == "log" else values


class MemberLinear(nn.Module):
    """One linear layer a member: [B, M, D] -> [B, M, K]."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bmd,mdk->bmk", x, self.weight) + self.bias


class ServingModel(nn.Module):
    """What is exported and what every claim is checked against: the graph's inputs -> what is served."""

    def __init__(self, model: Network) -> None:
        super().__init__()
        self.model = model

    @property
    def output(self) -> str:
        """The graph's only output: `probabilities` [B, K], or `values` [B, K] of a regression."""
        return "values" if self.model.spec.task == "regression" else "probabilities"

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model.answer(self.model(*inputs))


def task_fields(recipe: Recipe, data: Any, link: Literal["identity", "log"] = "identity") -> dict[str, Any]:
    """A Spec's fields that follow from the recipe and the training labels, whatever the modality."""
    regression = data.task == "regression"
    fields = {
        "classes": max(len(data.class_names), 1),
        "task": data.task,
        "dropout": recipe.backbone.dropout,
        "link": link if regression else "identity",
    }
    if not regression:
        return fields
    values = np.asarray(data.train.labels, np.float64)
    values = np.log(values) if link == "log" else values
    spread = np.maximum(values.std(axis=0), 1e-6 if link == "log" else 1e-12)
    return fields | {"center": tuple(values.mean(axis=0).tolist()), "scale": tuple(spread.tolist())}


def unpublished(spec: Spec) -> RecipeError:
    """What to tell where a backbone's weights are asked for and nobody publishes any."""
    return RecipeError(
        f"nobody publishes weights of {spec.backbone}; use backbone.weights=none, or a run made by tlexport pretrain"
    )


def sizes(kind: type[Sizes], given: dict[str, Any]) -> Sizes:
    """`backbone.options` as the network's own type. Raises RecipeError naming the key and the nearest valid one."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        near = difflib.get_close_matches(name, kind.model_fields, n=1)
        known = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(kind.model_fields)}"
        told = known if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise RecipeError(f"{'.'.join(filter(None, ('backbone.options', name)))}: {told}") from error
