"""Fine-tuning a model: the problem each strategy poses to the loop, and predictions with the result."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from tlexport.errors import RecipeError
from tlexport.modalities import metrics
from tlexport.modalities.dataset import Dataset, Split
from tlexport.models.network import MemberLinear, Network
from tlexport.progress import Progress, Step
from tlexport.recipe import Recipe, Transfer
from tlexport.run import replacing
from tlexport.training import batches, loop, smearing, transfer
from tlexport.training.losses import labels_of, loss_of

PREDICTION_BATCH = {"image": 64}  # samples at a time; what is smaller than an image goes by OTHERS
OTHERS = 512

Adopt = Callable[[dict[str, torch.Tensor]], None]


def finetune(
    model: Network,
    data: Dataset,
    recipe: Recipe,
    *,
    folder: Path,
    cache: Path,
    progress: Progress,
    until: int | None = None,
) -> loop.Fitted:
    """Fit `model` in place to `data.train`; the best epoch's weights on `data.val` are left in it.

    `folder` holds the resumable state, `cache` the features of a probe; `until` is an epoch to stop after, to be
    gone on from later. Raises TrainingError, RecipeError.
    """
    device = device_of(recipe.transfer)
    model.to(device)
    if model.spec.modality == "image":
        model.to(memory_format=transfer.memory_format(model))
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
        until=until,
    )
    adopt(fitted.weights)
    if smearing.needed(model.spec, recipe.transfer):
        factor = smearing.factor(data.train.labels, served(model, data.train, device))
        smearing.fold(model, factor)
    model.to("cpu").eval()
    return fitted


def device_of(config: Transfer) -> torch.device:
    """Raises RecipeError if CUDA is asked for and there is none."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "transfer.device is cuda, but torch finds no CUDA device here; use transfer.device=auto or cpu"
        )
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def served(model: Network, split: Split, device: torch.device, step: Step | None = None) -> np.ndarray:
    """float32 [n,K]: probabilities or values, of the model in evaluation mode and full precision."""
    return _forward(model, lambda *inputs: model.answer(model(*inputs)), split, device, step).numpy()


def features(
    model: Network,
    split: Split,
    name: str,
    data: Dataset,
    device: torch.device,
    cache: Path,
    progress: Progress,
) -> torch.Tensor:
    """float32 [n,D] or [n,M,D], from the cache if it was made by exactly this backbone from exactly these samples."""
    path = cache / f"features-{name}-{_fingerprint(model, data)}.npy"
    if path.is_file():
        return torch.from_numpy(np.load(path, allow_pickle=False))
    with progress.bar(f"features ({name})") as step:
        found = _forward(model, model.features, split, device, step)
    with replacing(path) as partial, partial.open("wb") as handle:
        np.save(handle, found.numpy(), allow_pickle=False)
    return found


def _network(
    model: Network, data: Dataset, recipe: Recipe, device: torch.device, cache: Path, progress: Progress
) -> tuple[loop.Problem, Adopt]:
    """Samples go through the whole network; the strategy says what of it learns."""
    labels = labels_of(data.train.labels, data.task)
    problem = loop.Problem(
        network=model,
        groups=transfer.parameter_groups(model, recipe.transfer),
        inputs=batches.training(model, data.train, recipe.transfer.augment, device),
        labels=labels,
        loss=loss_of(model.spec, recipe.transfer, labels),
        task=data.task,
        # The network handed in may be the average of the one that learns.
        validate=_validation(
            model, data, recipe, lambda network, split: _answers(model, network, split, device)
        ),
        prepare=lambda _: transfer.train_mode(model),
        device=device,
    )
    return problem, model.load_state_dict


def _validation(
    model: Network, data: Dataset, recipe: Recipe, answers: Callable[[nn.Module, Split], np.ndarray]
) -> Callable[[nn.Module], dict[str, float]]:
    """The validation metrics of a network, as they will be once its answers are unbiased (`smearing`)."""

    def validate(network: nn.Module) -> dict[str, float]:
        outputs = answers(network, data.val)
        if smearing.needed(model.spec, recipe.transfer):
            outputs = outputs * smearing.factor(data.train.labels, answers(network, data.train))
        return metrics.evaluate(data.val.labels, outputs, data.task)

    return validate


def _answers(model: Network, network: nn.Module, split: Split, device: torch.device) -> np.ndarray:
    network.eval()
    return _forward(model, lambda *inputs: model.answer(network(*inputs)), split, device).numpy()


def _probe(
    model: Network, data: Dataset, recipe: Recipe, device: torch.device, cache: Path, progress: Progress
) -> tuple[loop.Problem, Adopt]:
    """The frozen backbone's features are computed once, standardised, and the head learns on them.

    Standardising is folded into the head's weights afterwards, so the model is again a backbone and a linear layer.
    """
    train, val = (
        features(model, split, name, data, device, cache, progress)
        for name, split in (("train", data.train), ("val", data.val))
    )
    mean, scale = train.mean(dim=0), _scale(train)
    standardised = [((part - mean) / scale).to(device) for part in (train, val)]

    def answers(network: nn.Module, split: Split) -> np.ndarray:
        network.eval()
        with torch.inference_mode():
            found: np.ndarray = model.answer(network(standardised[split is data.val])).cpu().numpy()
        return found

    def adopt(weights: dict[str, torch.Tensor]) -> None:
        model.head.load_state_dict(weights)
        with torch.no_grad():
            _fold(model.head[-1], mean, scale)

    labels = labels_of(data.train.labels, data.task)
    problem = loop.Problem(
        network=model.head,
        groups=transfer.parameter_groups(model, recipe.transfer),
        inputs=lambda indices: (standardised[0][indices.to(device)],),
        labels=labels,
        loss=loss_of(model.spec, recipe.transfer, labels),
        task=data.task,
        validate=_validation(model, data, recipe, answers),
        prepare=_train,
        device=device,
    )
    return problem, adopt


def _fold(linear: nn.Module, mean: torch.Tensor, scale: torch.Tensor) -> None:
    """A layer that learned on (x - mean) / scale is made to take x."""
    if isinstance(linear, MemberLinear):
        mean, scale = mean.to(linear.weight), scale.to(linear.weight)
        weight = linear.weight / scale[:, :, None]
        linear.bias.sub_(torch.einsum("md,mdk->mk", mean, weight))
    else:
        assert isinstance(linear, nn.Linear)
        mean, scale = mean.to(linear.weight), scale.to(linear.weight)
        weight = linear.weight / scale
        linear.bias.sub_(weight @ mean)
    linear.weight.copy_(weight)


def _scale(features: torch.Tensor) -> torch.Tensor:
    """Standard deviation of features over the samples, from below a hundredth of the mean one held there.

    A feature that hardly moves would otherwise get weights that no 16-bit number holds once this is folded in.
    """
    spread = features.std(dim=0)
    return spread.clamp(min=max(0.01 * float(spread.mean()), 1e-6))


def _train(head: nn.Module) -> None:
    head.train()


def _fingerprint(model: Network, data: Dataset) -> str:
    whole = hashlib.sha256(repr((data.report.sha256, data.preprocessing.describe())).encode())
    for name, tensor in model.backbone.state_dict().items():
        whole.update(name.encode())
        whole.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def _forward(
    model: Network,
    function: Callable[..., torch.Tensor],
    split: Split,
    device: torch.device,
    step: Step | None = None,
) -> torch.Tensor:
    """float32 [n,...] on the CPU, batch by batch, without gradients, with the model in evaluation mode."""
    model.eval()
    size = PREDICTION_BATCH.get(model.spec.modality, OTHERS)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(split), size):
            rows = np.arange(start, min(start + size, len(split)))
            parts.append(function(*batches.prepared(model, split, rows, device)).float().cpu())
            if step is not None:
                step(int(rows[-1]) + 1, len(split))
    return torch.cat(parts)
