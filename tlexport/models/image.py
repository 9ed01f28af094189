"""Image classifiers: a backbone of timm or torchvision with a new head, normalisation inside."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from tlexport.errors import RecipeError
from tlexport.models import backbones, download, network
from tlexport.models.backbones import list_backbones
from tlexport.models.network import Network, Stages, Task
from tlexport.models.statefile import Found, StateFile
from tlexport.recipe import Pretrain, Recipe
from tlexport.run import digest

__all__ = [
    "ImageModel",
    "ModelSpec",
    "Spec",
    "align",
    "create",
    "describe",
    "describe_backbone",
    "list_backbones",
    "prepare",
    "pretext",
    "published",
]


class ModelSpec(network.Spec):
    """`mean` and `std` are of images scaled to 0..1."""

    modality: Literal["image"] = "image"
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


Spec = ModelSpec


class ImageModel(Network):
    """Images [B,C,S,S], uint8 or float in 0..255 -> logits [B,K].

    Mean and standard deviation come from the spec, so their buffers are not part of the state dict:
    that holds `backbone.*` under the library's own names and `head.*`.
    """

    INPUTS = ("images",)
    spec: ModelSpec

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

    def features(self, *inputs: Tensor) -> Tensor:
        """Images [B,C,S,S] in 0..255 -> features [B,D]."""
        (images,) = inputs
        found: Tensor = self.backbone(self.normalise(images))
        return found

    def stages(self) -> Stages:
        groups = backbones.stages(self.spec.backbone, self.backbone)
        return [("stem" if index == 0 else f"stage{index}", names) for index, names in enumerate(groups)]


def describe(recipe: Recipe, data: Any) -> ModelSpec:
    """The spec of the recipe's backbone for this data. Raises RecipeError for an unknown name, or for options."""
    if recipe.backbone.options:
        raise RecipeError(
            f"backbone.options ({', '.join(recipe.backbone.options)}): {recipe.backbone.name} takes none; its name says it all"
        )
    return describe_backbone(
        recipe.backbone.name,
        classes=len(data.class_names),
        task=data.task,
        channels=data.preprocessing.channels,
        image_size=data.preprocessing.image_size,
        dropout=recipe.backbone.dropout,
    )


def describe_backbone(
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


def prepare(model: ImageModel, data: Any) -> None:
    """Nothing: an image network's normalisation is that of its published weights."""


def published(spec: ModelSpec) -> Found:
    """The library's own weights, from its cache or downloaded. Raises WeightsError."""
    tensors, path = download.default(spec.backbone, spec.channels, spec.image_size)
    known = backbones.published(spec.backbone)
    sha256 = digest(path) if path else None
    return Found(StateFile(tensors, ordered=True), known.origin, known.licence, sha256)


def align(
    tensors: dict[str, Tensor], source: ModelSpec, spec: ModelSpec
) -> tuple[dict[str, Tensor], list[str]]:
    """Unchanged: `fitting` brings any file's tensors to the network's size and channels."""
    return tensors, []


def pretext(model: ImageModel, pretrain: Pretrain, data: Any) -> nn.Module:
    raise RecipeError(
        f"images are not pretrained here: {model.spec.backbone} starts from published weights (backbone.weights)"
    )


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
