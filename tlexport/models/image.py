"""Image classifiers: a backbone of timm or torchvision with a new head, normalisation inside."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tlexport.errors import RecipeError
from tlexport.models import backbones
from tlexport.models.backbones import list_backbones

__all__ = ["ImageModel", "ModelSpec", "ServingModel", "create", "describe", "list_backbones"]

Task = Literal["binary", "multiclass", "multilabel"]


class ModelSpec(BaseModel):
    """All that is needed to rebuild the network without its weights. `mean` and `std` are of images scaled to 0..1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: str
    classes: int
    task: Task
    channels: int
    image_size: int
    dropout: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ImageModel(nn.Module):
    """Images [B,C,S,S], uint8 or float in 0..255 -> logits [B,K].

    Mean and standard deviation come from the spec, so their buffers are not part of the state dict:
    that holds `backbone.*` under the library's own names and `head.*`.
    """

    def __init__(self, spec: ModelSpec, backbone: nn.Module, dimension: int) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.head = nn.Sequential(nn.Dropout(spec.dropout), nn.Linear(dimension, spec.classes))
        self.scale: Tensor
        self.shift: Tensor
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (spec.mean, spec.std)
        )
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (mean / std).float(), persistent=False)

    @property
    def dimension(self) -> int:
        """Length D of a feature vector."""
        linear = self.head[1]
        assert isinstance(linear, nn.Linear)
        return linear.in_features

    def normalise(self, x: Tensor) -> Tensor:
        """Images in 0..255 -> (x / 255 - mean) / std in the model's own float type."""
        return x.to(self.scale.dtype) * self.scale - self.shift

    def features(self, x: Tensor) -> Tensor:
        """Images [B,C,S,S] in 0..255 -> features [B,D]."""
        found: Tensor = self.backbone(self.normalise(x))
        return found

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits

    def stages(self) -> list[tuple[str, list[str]]]:
        """The backbone's parameters by stage from the input to the last, named as `self.backbone` names them.

        Each parameter is in exactly one stage; the head is in none.
        """
        groups = backbones.stages(self.spec.backbone, self.backbone)
        return [("stem" if index == 0 else f"stage{index}", names) for index, names in enumerate(groups)]


class ServingModel(nn.Module):
    """What is exported and what every claim is checked against: uint8 [B,C,S,S] -> probabilities float32 [B,K].

    Softmax over the classes of a binary or multiclass task, a sigmoid per class of a multilabel one.
    """

    def __init__(self, model: ImageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images).float()
        return torch.sigmoid(logits) if self.model.spec.task == "multilabel" else torch.softmax(logits, dim=1)


def describe(
    backbone: str,
    *,
    classes: int,
    task: Task,
    channels: int = 3,
    image_size: int | None = None,
    dropout: float = 0.0,
) -> ModelSpec:
    """The spec of a model, with normalisation (and size, if none is given) as the library's own weights expect.

    For other than three channels the RGB values are averaged. Raises RecipeError for an unknown name.
    """
    known = backbones.published(backbone)
    return ModelSpec(
        backbone=backbone,
        classes=classes,
        task=task,
        channels=channels,
        image_size=image_size or known.image_size,
        dropout=dropout,
        mean=_for_channels(known.mean, channels),
        std=_for_channels(known.std, channels),
    )


def create(spec: ModelSpec) -> ImageModel:
    """The network with random weights, drawn from torch's global generator.

    Raises RecipeError for an unknown backbone or one that does not take images of this size.
    """
    backbone = backbones.build(spec.backbone, spec.channels, spec.image_size)
    return ImageModel(spec, backbone, _dimension(spec, backbone))


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values if channels == len(values) else (sum(values) / len(values),) * channels


def _dimension(spec: ModelSpec, backbone: nn.Module) -> int:
    """Length of a feature vector, by one forward of an empty image."""
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            out = backbone(torch.zeros(1, spec.channels, spec.image_size, spec.image_size))
    except backbones.SIZE_ERRORS as error:
        raise backbones.refused_size(spec.backbone, spec.channels, spec.image_size, error) from error
    finally:
        backbone.train(training)
    if not isinstance(out, Tensor) or out.ndim != 2:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise RecipeError(
            f"{spec.backbone} gives {shape} instead of one feature vector per image; choose another backbone"
        )
    return int(out.shape[1])
