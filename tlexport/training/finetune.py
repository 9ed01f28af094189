"""Fine-tuning an image model: the problem each strategy poses to the loop, and predictions with the result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tlexport.errors import RecipeError
from tlexport.modalities import metrics
from tlexport.modalities.image import ImageData, Split
from tlexport.models.image import ImageModel
from tlexport.progress import Progress, Step
from tlexport.recipe import Recipe, Transfer
from tlexport.run import replacing
from tlexport.training import loop, transfer
from tlexport.training.augment import augmentation

PREDICTION_BATCH = 64


def finetune(
    model: ImageModel, data: ImageData, recipe: Recipe, *, folder: Path, cache: Path, progress: Progress
) -> loop.Fitted:
    """Fit `model` in place to `data.train`; the best epoch's weights on `data.val` are left in it.

    `folder` holds the resumable state, `cache` the features of a probe. Raises TrainingError, RecipeError.
    """
    device = device_of(recipe.transfer)
    model.to(device).to(memory_format=transfer.memory_format(model))
    make = _probe if recipe.transfer.strategy == "probe" else _network
    problem, adopt = make(model, data, recipe, device, cache, progress)
    fitted = loop.fit(
        problem,
        recipe.transfer,
        metric=recipe.metric,
        seed=recipe.seed,
        identity=f"{_fingerprint(model, data)} {recipe.seed} {recipe.metric} {recipe.transfer.model_dump_json()}",
        folder=folder,
        progress=progress,
    )
    adopt(fitted.weights)
    model.to("cpu").eval()
    return fitted


def device_of(config: Transfer) -> torch.device:
    """Raises RecipeError if CUDA is asked for and there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "transfer.device is cuda, but torch finds no CUDA device here; use transfer.device=auto or cpu"
        )
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def probabilities(
    model: nn.Module, split: Split, data: ImageData, device: torch.device, step: Step | None = None
) -> np.ndarray:
    """float32 [n,K]: softmax, or one sigmoid per label, of the model's logits in evaluation mode and full precision."""
    logits = _forward(model, split, data, device, step)
    return (torch.sigmoid(logits) if data.task == "multilabel" else torch.softmax(logits, dim=1)).numpy()


Adopt = Callable[[dict[str, torch.Tensor]], None]


def _network(
    model: ImageModel, data: ImageData, recipe: Recipe, device: torch.device, cache: Path, progress: Progress
) -> tuple[loop.Problem, Adopt]:
    """Images go through the whole network; the strategy says what of it learns."""
    augment = augmentation(recipe.transfer.augment, data.preprocessing.image_size)
    layout = transfer.memory_format(model)
    crops = recipe.transfer.augment.crop < 1

    def inputs(indices: torch.Tensor) -> torch.Tensor:
        stored = data.train.images[indices.numpy()]
        # A random crop is taken from the stored image and resizes by itself; anything else starts from the prepared one.
        batch = _tensor(np.moveaxis(stored, -1, 1) if crops else data.preprocessing.batch(stored))
        batch = augment(batch) if augment else batch
        return batch.to(device, non_blocking=True).float().contiguous(memory_format=layout)

    problem = loop.Problem(
        network=model,
        groups=transfer.parameter_groups(model, recipe.transfer),
        inputs=inputs,
        labels=_labels(data.train, data),
        multilabel=data.task == "multilabel",
        validate=lambda network: metrics.evaluate(
            data.val.labels, probabilities(network, data.val, data, device)
        ),
        prepare=lambda _: transfer.train_mode(model),
        device=device,
    )
    return problem, model.load_state_dict


def _probe(
    model: ImageModel, data: ImageData, recipe: Recipe, device: torch.device, cache: Path, progress: Progress
) -> tuple[loop.Problem, Adopt]:
    """The frozen backbone's features are computed once, standardised, and the head learns on them.

    Standardising is folded into the head's weights afterwards, so the model is again a backbone and a linear layer.
    """
    train, val = (
        _features(model, split, name, data, device, cache, progress)
        for name, split in (("train", data.train), ("val", data.val))
    )
    mean, scale = train.mean(dim=0), _scale(train)
    standardised = [((part - mean) / scale).to(device) for part in (train, val)]

    def validate(network: nn.Module) -> dict[str, float]:
        network.eval()
        with torch.inference_mode():
            logits = network(standardised[1]).float().cpu()
        chances = torch.sigmoid(logits) if data.task == "multilabel" else torch.softmax(logits, dim=1)
        return metrics.evaluate(data.val.labels, chances.numpy())

    def adopt(weights: dict[str, torch.Tensor]) -> None:
        model.head.load_state_dict(weights)
        linear = model.head[-1]
        assert isinstance(linear, nn.Linear)
        with torch.no_grad():
            weight = linear.weight / scale.to(linear.weight)
            linear.bias.sub_(weight @ mean.to(linear.weight))
            linear.weight.copy_(weight)

    problem = loop.Problem(
        network=model.head,
        groups=transfer.parameter_groups(model, recipe.transfer),
        inputs=lambda indices: standardised[0][indices.to(device)],
        labels=_labels(data.train, data),
        multilabel=data.task == "multilabel",
        validate=validate,
        prepare=_train,
        device=device,
    )
    return problem, adopt


def _scale(features: torch.Tensor) -> torch.Tensor:
    """Standard deviation [D] of features [n,D], from below a hundredth of the mean one held there.

    A feature that hardly moves would otherwise get weights that no 16-bit number holds once this is folded in.
    """
    spread = features.std(dim=0)
    return spread.clamp(min=max(0.01 * float(spread.mean()), 1e-6))


def _train(head: nn.Module) -> None:
    head.train()


def _features(
    model: ImageModel,
    split: Split,
    name: str,
    data: ImageData,
    device: torch.device,
    cache: Path,
    progress: Progress,
) -> torch.Tensor:
    """float32 [n,D], from the cache if it was made by exactly this backbone from exactly these images."""
    path = cache / f"features-{name}-{_fingerprint(model, data)}.npy"
    if path.is_file():
        return torch.from_numpy(np.load(path, allow_pickle=False))
    with progress.bar(f"features ({name})") as step:
        found = _forward(model.features, split, data, device, step, owner=model)
    with replacing(path) as partial, partial.open("wb") as handle:
        np.save(handle, found.numpy())
    return found


def _fingerprint(model: ImageModel, data: ImageData) -> str:
    whole = hashlib.sha256(repr((data.report.sha256, data.preprocessing)).encode())
    for name, tensor in model.backbone.state_dict().items():
        whole.update(name.encode())
        whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def _forward(
    function: Callable[[torch.Tensor], torch.Tensor],
    split: Split,
    data: ImageData,
    device: torch.device,
    step: Step | None,
    owner: nn.Module | None = None,
) -> torch.Tensor:
    """float32 [n,...] on the CPU, batch by batch, without gradients, with the owner in evaluation mode."""
    network = owner if owner is not None else function
    assert isinstance(network, nn.Module)
    network.eval()
    layout = transfer.memory_format(network)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(split), PREDICTION_BATCH):
            batch = _tensor(data.preprocessing.batch(split.images[start : start + PREDICTION_BATCH]))
            parts.append(function(batch.to(device).float().contiguous(memory_format=layout)).float().cpu())
            if step is not None:
                step(min(start + PREDICTION_BATCH, len(split)), len(split))
    return torch.cat(parts)


def _tensor(images: np.ndarray) -> torch.Tensor:
    """The same memory where it may be written to; a copy of images that a read-only file holds."""
    return torch.from_numpy(np.require(images, requirements=["C", "W"]))


def _labels(split: Split, data: ImageData) -> torch.Tensor:
    return torch.from_numpy(np.asarray(split.labels)).to(
        torch.float32 if data.task == "multilabel" else torch.int64
    )
