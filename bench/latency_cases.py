"""What bench/latency.py times: networks for images, and the networks of recipes for tables and series.

All have random weights, which cost as much as trained ones; what the data decides (columns, bins) is real.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, smooth_images

IMAGES = {
    "resnet18": "torchvision/resnet18",
    "resnet50": "torchvision/resnet50",
    "mobilenet_v3_large": "torchvision/mobilenet_v3_large",
    "efficientnet_lite0": "timm/tf_efficientnet_lite0",
    "vit_tiny": "timm/vit_tiny_patch16_224",
}
QUICK_IMAGES = {"test_resnet": "timm/test_resnet"}
# Name -> (recipe, its data in the folder of shared data, empty where a package brings it).
SMALL = {
    "tabular": ("breast-cancer", ""),
    "tabular_credit": ("credit-scoring", "credit/uci_credit_card_default.csv"),
    "series": ("volatility", "market_ohlcv"),
}
QUICK_SMALL = ("tabular",)
DATA = Path(os.environ.get("TLEXPORT_SHARED", ROOT.parent / "shared")) / "data"
CLASSES = 10
SEEN, FRESH = 64, 16  # samples for calibration, and others to compare the candidates on


@dataclass(frozen=True)
class Case:
    """A network that answers differently from sample to sample. `seen` and `fresh`: input name -> array [n, ...]."""

    serving: Any
    seen: dict[str, np.ndarray]
    fresh: dict[str, np.ndarray]
    about: dict[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.fresh)


def case_of(name: str, quick: bool) -> Case:
    """Raises SystemExit if the data is not there."""
    return (
        small(name, quick) if name in SMALL else image({**IMAGES, **QUICK_IMAGES}[name], 64 if quick else 224)
    )


def image(backbone: str, size: int) -> Case:
    about = {"class_names": json.dumps(list(range(CLASSES))), "preprocessing": "{}", "task": "multiclass"}
    seen, fresh = ({"images": smooth_images(n, size, seed=s)} for n, s in ((SEEN, 2), (FRESH, 3)))
    return Case(sane_model(backbone, size), seen, fresh, about)


def sane_model(backbone: str, size: int) -> Any:
    """A ServingModel whose activations have a normal size and whose outputs differ from image to image."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from tlexport.models.image import create, describe_backbone
    from tlexport.models.network import ServingModel

    torch.manual_seed(0)
    model = create(describe_backbone(backbone, classes=CLASSES, task="multiclass", image_size=size))
    batches = torch.from_numpy(smooth_images(64, size, seed=1)).split(16)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = None  # a plain average over the batches
        norm.reset_running_stats()
    with torch.no_grad():
        model.train()
        for batch in batches:
            model(batch)
        model.eval()
        logits = torch.cat([model(batch) for batch in batches])
        spread = logits.std(dim=0).mean()
        if not spread > 1e-12:
            raise SystemExit(
                f"{backbone} with random weights answers every image alike; there is nothing to compare"
            )
        head = model.head[-1]
        head.bias.sub_(logits.mean(dim=0)).mul_(2 / spread)
        head.weight.mul_(2 / spread)
    return ServingModel(model).eval()


def small(name: str, quick: bool, data_folder: Path | None = None) -> Case:
    """The network that a shipped recipe would fine-tune, prepared on the recipe's own training rows, or on others' if given."""
    import torch

    from tlexport import recipe as recipes
    from tlexport import tensors
    from tlexport.modalities import MODALITIES
    from tlexport.models import MODELS
    from tlexport.models.network import ServingModel

    wanted, data_path = SMALL[name]
    path = data_folder or (DATA / data_path if data_path else None)
    if path and not path.exists():
        raise SystemExit(f"{name} needs {data_path} in the folder that TLEXPORT_SHARED/data names")
    overrides = [f"data.path={path}"] if path else []
    recipe = recipes.load(wanted, overrides, sets=["quick"] if quick else [])
    data = MODALITIES[recipe.modality].load(recipe.data, task=recipe.task, seed=0, cache=None)
    torch.manual_seed(0)
    models = MODELS[recipe.modality]
    model = models.create(models.describe(recipe, data))
    models.prepare(model, data)
    rows = {
        name: tensors.named(split.batch(np.arange(min(count, len(split)))), model.INPUTS)
        for name, split, count in (("seen", data.train, SEEN), ("fresh", data.test, FRESH))
    }
    about = {"class_names": json.dumps(data.class_names), "preprocessing": "{}", "task": data.task}
    return Case(ServingModel(model).eval(), rows["seen"], rows["fresh"], about)
