"""Fine-tuning on the CPU beside the plain loop of torchvision's tutorials: Dataset and DataLoader, NCHW, AdamW,
cross-entropy, model.train(), loss.item() in every step.

Both sides start from the same uint8 images in memory at the size the network takes, without augmentation, and from
random weights (speed does not depend on their values). Full: short segments of the same number of steps, in turns
(A B, B A, ...); ours is the product's own finetune() of one epoch and its own count of training time, the plain one
iterates its DataLoader once; validation is timed on neither side. Probe: wall time of 10 epochs; the plain one runs the
frozen backbone under no_grad in every epoch and is spared validation, ours is the whole of finetune() with features of
training and validation split, and files. At most 15 minutes, usually six.

Result: `full` {model: {image_size, batch_size, steps, ratio {ratio, low, high, pairs}, plain_images_per_s,
ours_images_per_s, outside_s}}, `probe` {ratio, plain_s, ours_s, epochs, images}, `threads`. Rates are of every segment;
`outside_s` is what finetune() took beside training (validation, files), which the ratio leaves out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, destination, finish, goal, pair_ratio, say, shown, smooth_images, stamp, table
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from tlexport import cores
from tlexport.modalities import image
from tlexport.models import backbones
from tlexport.models import image as models
from tlexport.progress import Silent
from tlexport.recipe import Recipe, parse
from tlexport.training.finetune import finetune

CLASSES = 10
MODELS = {
    "efficientnet_lite0": ("timm/tf_efficientnet_lite0", 112),
    "resnet18": ("torchvision/resnet18", 112),
    "mobilenet_v3_large": ("torchvision/mobilenet_v3_large", 112),
    "vit_tiny": ("timm/vit_tiny_patch16_224", 112),
}
LIMITS = {"efficientnet_lite0": 1.6}  # the others: never slower
QUICK_MODELS = {"test_resnet": ("timm/test_resnet", 64)}
PROBE_LIMIT = 8.0
DEADLINE = 900.0


@dataclass(frozen=True)
class Settings:
    batch: int = 32
    steps: int = 6
    fewest: int = 6  # pairs; an interval needs six
    most: int = 12
    seconds: float = 50.0  # for each model's pairs, past the fewest
    probe_pairs: int = 6
    probe_epochs: int = 10
    probe_images: int = 320

    @property
    def images(self) -> int:
        return self.batch * self.steps


QUICK = Settings(batch=8, steps=2, fewest=2, most=2, probe_pairs=2, probe_epochs=10, probe_images=20)


@dataclass
class Segments:
    """Seconds of each segment, pairwise."""

    plain: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    outside: list[float] = field(default_factory=list)


class InMemory(Dataset[Any]):
    """As the tutorials have it: one sample at a time, transformed on its own."""

    def __init__(self, split: image.Split, spec: models.ModelSpec) -> None:
        self.split = split
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.split.images[index]), int(self.split.labels[index])


class Plain:
    """The hand-written loop."""

    def __init__(self, spec: models.ModelSpec, data: image.ImageData, batch: int, *, probe: bool) -> None:
        backbone = backbones.build(spec.backbone, spec.channels, spec.image_size)
        blank = torch.zeros(1, spec.channels, spec.image_size, spec.image_size)
        with torch.no_grad():
            features = backbone.eval()(blank).shape[1]
        self.backbone, self.head, self.probe = backbone, nn.Linear(features, CLASSES), probe
        learning = self.head if probe else nn.Sequential(self.backbone, self.head)
        self.optimizer = torch.optim.AdamW(learning.parameters(), lr=1e-3)
        self.criterion = nn.CrossEntropyLoss()
        self.loader = DataLoader(InMemory(data.train, spec), batch_size=batch, shuffle=True)

    def epoch(self) -> float:
        """One pass over the training split; its seconds."""
        started = time.perf_counter()
        self.head.train()
        self.backbone.train(not self.probe)
        total = 0.0
        for inputs, labels in self.loader:
            self.optimizer.zero_grad()
            with torch.set_grad_enabled(not self.probe):
                features = self.backbone(inputs)
            loss = self.criterion(self.head(features), labels)
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(inputs)
        require_finite(total)
        return time.perf_counter() - started


def require_finite(loss: float) -> None:
    if not np.isfinite(loss):
        raise SystemExit(f"the plain loop's loss became {loss}; its time means nothing")


def dataset(folder: Path, size: int, train: int) -> tuple[Recipe, image.ImageData]:
    """Random images in an .npz, read by the product; every class is in every split."""
    count = {"train": train, "val": CLASSES * 2, "test": CLASSES}
    arrays: dict[str, np.ndarray] = {}
    for seed, (name, n) in enumerate(count.items()):
        arrays[f"{name}_images"] = smooth_images(n, size, seed).transpose(0, 2, 3, 1)
        arrays[f"{name}_labels"] = np.arange(n) % CLASSES
    path = folder / f"images-{size}-{train}.npz"
    np.savez(path, **arrays)
    recipe = parse({"name": "bench", "data": {"path": str(path), "image_size": size}}, [])
    return recipe, image.load(recipe.data, task="multiclass", seed=0, cache=None)


def configured(recipe: Recipe, **transfer: Any) -> Recipe:
    wanted = recipe.transfer.model_copy(update={"device": "cpu", "autocast": "off", **transfer})
    return recipe.model_copy(update={"transfer": wanted})


def ours(model: models.ImageModel, data: image.ImageData, recipe: Recipe) -> tuple[float, float]:
    """finetune() into a fresh directory: its training seconds, and the seconds of the whole call."""
    with tempfile.TemporaryDirectory(prefix="tlexport-finetune-") as name:
        folder = Path(name)
        started = time.perf_counter()
        fitted = finetune(model, data, recipe, folder=folder / "t", cache=folder / "c", progress=Silent())
        whole = time.perf_counter() - started
    return sum(epoch["train_seconds"] for epoch in fitted.history), whole


def in_turns(pair: int, plain: Callable[[], None], ours: Callable[[], None]) -> None:
    """One pair; who begins alternates, so that a drift of the machine cancels."""
    for measure in (plain, ours) if pair % 2 else (ours, plain):
        measure()


def full(backbone: str, size: int, folder: Path, settings: Settings, deadline: float) -> dict[str, Any]:
    """Full fine-tuning of one model, segment by segment."""
    torch.manual_seed(0)
    recipe, data = dataset(folder, size, settings.images)
    recipe = configured(recipe, strategy="full", epochs=1, batch_size=settings.batch)
    spec = models.describe_backbone(backbone, classes=CLASSES, task="multiclass", image_size=size)
    model, loop, found = models.create(spec), Plain(spec, data, settings.batch, probe=False), Segments()

    def train_ours() -> None:
        trained, whole = ours(model, data, recipe)
        found.ours.append(trained)
        found.outside.append(whole - trained)

    train_ours(), loop.epoch()  # threads, caches and first allocations
    found.ours.clear(), found.outside.clear()
    began = time.monotonic()
    for pair in range(settings.most):
        if pair >= settings.fewest and time.monotonic() - began > settings.seconds:
            break
        require_time(deadline)
        in_turns(pair, lambda: found.plain.append(loop.epoch()), train_ours)
    return {
        "backbone": backbone,
        "image_size": size,
        "batch_size": settings.batch,
        "steps": settings.steps,
        "ratio": pair_ratio(found.plain, found.ours),
        "plain_images_per_s": [round(settings.images / s, 2) for s in found.plain],
        "ours_images_per_s": [round(settings.images / s, 2) for s in found.ours],
        "outside_s": [round(s, 3) for s in found.outside],
    }


def probe(backbone: str, size: int, folder: Path, settings: Settings, deadline: float) -> dict[str, Any]:
    """Ten epochs of a linear head on a frozen backbone, wall time, in turns."""
    torch.manual_seed(0)
    recipe, data = dataset(folder, size, settings.probe_images)
    recipe = configured(recipe, strategy="probe", epochs=settings.probe_epochs, batch_size=settings.batch)
    spec = models.describe_backbone(backbone, classes=CLASSES, task="multiclass", image_size=size)
    model, loop, found = models.create(spec), Plain(spec, data, settings.batch, probe=True), Segments()
    ours(model, data, recipe), loop.epoch()
    for pair in range(settings.probe_pairs):
        require_time(deadline)
        in_turns(
            pair,
            lambda: found.plain.append(sum(loop.epoch() for _ in range(settings.probe_epochs))),
            lambda: found.ours.append(ours(model, data, recipe)[1]),
        )
    return {
        "backbone": backbone,
        "image_size": size,
        "epochs": settings.probe_epochs,
        "images": settings.probe_images,
        "ratio": pair_ratio(found.plain, found.ours),
        "plain_s": [round(s, 3) for s in found.plain],
        "ours_s": [round(s, 3) for s in found.ours],
    }


def require_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise SystemExit(
            f"not done within {DEADLINE:g} s; is the machine busy? (--only measures some of the models)"
        )


def goals_of(results: dict[str, Any], probed: dict[str, Any] | None) -> list[dict[str, Any]]:
    found = [
        goal(
            f"full fine-tuning of {name}, images/s over the plain loop's",
            r["ratio"],
            LIMITS.get(name, 1.0),
            at_least=True,
        )
        for name, r in results.items()
    ]
    if probed:
        what = f"{probed['epochs']} epochs of probe, plain wall time over ours"
        found.append(goal(what, probed["ratio"], PROBE_LIMIT, at_least=True))
    return found


def show(results: dict[str, Any], probed: dict[str, Any] | None) -> None:
    def middle(values: list[float]) -> str:
        return f"{np.median(values):.2f}"

    rows = [
        [model, middle(r["plain_images_per_s"]), middle(r["ours_images_per_s"]), shown(r["ratio"])]
        for model, r in results.items()
    ]
    table(["full fine-tuning", "plain images/s", "tlexport images/s", "ratio"], rows)
    if probed:
        row = [middle(probed["plain_s"]), middle(probed["ours_s"]), shown(probed["ratio"])]
        table([f"probe, {probed['epochs']} epochs: plain s", "tlexport s", "ratio"], [row])


def main() -> None:
    parser = arguments("finetune", __doc__ or "")
    parser.add_argument(
        "--only", nargs="+", choices=[*MODELS, "probe"], help="some of the models, or the probe"
    )
    options = parser.parse_args()
    started, document = time.monotonic(), stamp("finetune", parser, options)
    deadline = started + DEADLINE
    settings, available = (QUICK, QUICK_MODELS) if options.quick else (Settings(), MODELS)
    wanted = options.only or [*available, "probe"]
    threads = 1 if options.quick else cores.usable()
    torch.set_num_threads(threads)
    results: dict[str, Any] = {}
    probed: dict[str, Any] | None = None
    with tempfile.TemporaryDirectory(prefix="tlexport-bench-") as name:
        for model in (m for m in available if m in wanted):
            backbone, size = available[model]
            say(f"full fine-tuning: {model} at {size} px")
            results[model] = full(backbone, size, Path(name), settings, deadline)
        if "probe" in wanted:
            backbone, size = next(iter(available.values()))
            say(f"probe: {backbone} at {size} px, {settings.probe_epochs} epochs")
            probed = probe(backbone, size, Path(name), settings, deadline)
    document |= {"full": results, "probe": probed, "threads": threads}
    show(results, probed)
    finish(document, goals_of(results, probed), destination("finetune", options), started)


if __name__ == "__main__":
    main()
