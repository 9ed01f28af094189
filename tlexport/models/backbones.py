"""The classification networks of torchvision and timm by name, each cut to what it computes before its classifier.

A backbone's name is the library's name behind `timm/` or `torchvision/`; timm's may carry a weights tag
(`timm/resnet50.a1_in1k`). Parameters keep the library's own names, so that its weights fit as they are.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tlexport.errors import RecipeError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What libraries raise for an image size that a network cannot take, at construction or in its forward.
SIZE_ERRORS = (AssertionError, RuntimeError, ValueError, TypeError, IndexError, ZeroDivisionError)

# torchvision's networks by the start of their names: a stage begins where this match changes along the parameters,
# which torchvision registers in the order of computation. Sequences of blocks are cut where the resolution halves.
_TORCHVISION_STAGES = {
    "resnet": r"layer\d",
    "resnext": r"layer\d",
    "wide_resnet": r"layer\d",
    "regnet": r"trunk_output\.block\d",
    "shufflenet": r"stage\d|conv5",
    "googlenet": r"inception\d",
    "inception": r"Mixed_\d",
    "densenet": r"denseblock\d",
    "mobilenet_v2": r"features\.(2|4|7|14)\.",
    "mobilenet_v3_small": r"features\.(1|2|4|9)\.",
    "mobilenet_v3_large": r"features\.(2|4|7|13)\.",
    "mnasnet": r"layers\.(8|9|10|11|12|13|14)\.",
    "efficientnet": r"features\.[1-8]\.",
    "convnext": r"features\.[1246]\.",
    "swin": r"features\.[1246]\.",
    "vit": r"encoder_layer_\d+",
    "maxvit": r"blocks\.\d",
    "vgg": "",  # by its pooling layers
    "alexnet": "",
    "squeezenet": "",
}
_TIMM_STAGES = (
    r"(stages|transformers)\.\d+"  # the few of timm's networks that do not say how they are grouped
)


@dataclass(frozen=True)
class Published:
    """What the library says of a network's own weights. `origin` is empty where there are none."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    origin: str = ""
    licence: str = "not stated"


def list_backbones(pattern: str = "*") -> list[str]:
    """Names of all backbones that match a shell pattern, for instance `*resnet50*`."""
    return [name for name in _known() if fnmatch.fnmatchcase(name, pattern)]


def check(backbone: str) -> tuple[str, str]:
    """The library and its name for the network. Raises RecipeError with the nearest names."""
    library, _, name = backbone.partition("/")
    arch, _, tag = name.partition(".")
    if f"{library}/{arch}" not in _known():
        tails: dict[str, list[str]] = {}
        for known in _known():
            tails.setdefault(known.partition("/")[2], []).append(known)
        typed = backbone.rpartition("/")[2].partition(".")[0].lower()
        near = [
            full for tail in difflib.get_close_matches(typed, tails, n=4, cutoff=0.6) for full in tails[tail]
        ]
        hint = (
            f"did you mean {', '.join(near)}?"
            if near
            else "for instance timm/resnet18 or torchvision/resnet50"
        )
        raise RecipeError(
            f"backbone.name: no classification network {backbone!r} in timm or torchvision; {hint}"
        )
    if tag and (library != "timm" or tag not in _tags(arch)):
        have = ", ".join(_tags(arch)) if library == "timm" else ""
        raise RecipeError(
            f"backbone.name: {library}/{arch} has no weights tag {tag!r} (available: {have or 'none'})"
        )
    return library, name


def published(backbone: str) -> Published:
    """Normalisation, image size and origin of the library's own weights (ImageNet's values where there are none)."""
    library, name = check(backbone)
    if library == "timm":
        import timm

        cfg = timm.get_pretrained_cfg(name)
        if cfg is None:
            return Published(IMAGENET_MEAN, IMAGENET_STD, 224)
        origin = f"Hugging Face repository {cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url or ""
        return Published(
            tuple(cfg.mean), tuple(cfg.std), cfg.input_size[-1], origin, cfg.license or "not stated"
        )
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT
    transforms = weights.transforms()
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    if name in (
        "googlenet",
        "inception_v3",
    ):  # torchvision shifts ImageNet's values to these within the network
        mean = std = (0.5, 0.5, 0.5)
    return Published(mean, std, transforms.crop_size[0], weights.url)


def build(
    backbone: str, channels: int, image_size: int, *, pretrained: bool = False, file: Path | None = None
) -> nn.Module:
    """The network without its classifier: normalised images [B,C,S,S] -> features [B,D].

    `pretrained` is for timm only: its own loader adapts weights to channels and size; it downloads them, or takes `file`.
    Raises RecipeError where the network does not take the name, the channels or the size.
    """
    library, name = check(backbone)
    try:
        if library == "timm":
            return _timm(name, channels, image_size, pretrained, file)
        return _torchvision(name, channels, image_size)
    except SIZE_ERRORS as error:
        if pretrained:
            raise
        raise refused_size(backbone, channels, image_size, error) from error


def refused_size(backbone: str, channels: int, image_size: int, error: Exception) -> RecipeError:
    reason = str(error).strip().splitlines()
    return RecipeError(
        f"{backbone} does not take images of {channels} x {image_size} x {image_size} "
        f"({reason[0] if reason else type(error).__name__}); "
        f"set data.image_size to its own size, {published(backbone).image_size}, or choose another backbone"
    )


def whole(backbone: str) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of the library's network with its own classifier, in the library's order."""
    library, name = check(backbone)
    with torch.device("meta"):
        if library == "timm":
            import timm

            model = timm.create_model(name)
        else:
            from torchvision.models import get_model

            aux = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            model = get_model(name, weights=None, **aux)
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def stages(backbone: str, module: nn.Module) -> list[list[str]]:
    """Names of `module`'s parameters by stage from the input to the last; each is in exactly one stage.

    A stage that would hold only norms or biases joins the one before it: it is no unit to train on its own.
    """
    library, name = check(backbone)
    parameters = [key for key, _ in module.named_parameters()]
    if library == "torchvision":
        family = max((start for start in _TORCHVISION_STAGES if name.startswith(start)), key=len)
        groups = _by_match(parameters, _TORCHVISION_STAGES[family] or _after_pooling(module))
    elif group_matcher := getattr(module, "group_matcher", None):
        from timm.models import group_parameters

        try:
            matcher = group_matcher(coarse=True)
        except AssertionError:  # the few networks that are only grouped finely
            matcher = group_matcher(coarse=False)
        groups = list(group_parameters(module, matcher).values())
    else:
        groups = _by_match(parameters, _TIMM_STAGES)
    return _with_weights(groups, dict(module.named_parameters()))


@cache
def _known() -> dict[str, None]:
    import timm
    import torchvision.models as vision

    families = tuple(_TORCHVISION_STAGES)
    plain = [name for name in vision.list_models(module=vision) if name.startswith(families)]
    names = [*(f"timm/{name}" for name in timm.list_models()), *(f"torchvision/{name}" for name in plain)]
    return dict.fromkeys(sorted(names))


@cache
def _tags(arch: str) -> tuple[str, ...]:
    import timm

    return tuple(name.partition(".")[2] for name in timm.list_pretrained(f"{arch}.*"))


def _timm(name: str, channels: int, image_size: int, pretrained: bool, file: Path | None) -> nn.Module:
    import timm

    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0, "in_chans": channels}
    if file:
        options["pretrained_cfg_overlay"] = {"file": str(file)}
    try:
        model: nn.Module = timm.create_model(name, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name, **options)
    return model


def _torchvision(name: str, channels: int, image_size: int) -> nn.Module:
    from torchvision.models import get_model

    options: dict[str, Any] = {}
    if name.startswith("vit"):
        options = {"image_size": image_size}
    elif name.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    elif name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    model: nn.Module = get_model(name, weights=None, **options)
    if channels != 3:
        _set_channels(model, channels)
    if name.startswith("squeezenet"):
        model.classifier = nn.AdaptiveAvgPool2d(1)  # its classifier is a convolution; the forward flattens
    else:
        _cut_classifier(model)
    return model


def _set_channels(model: nn.Module, channels: int) -> None:
    """Replace the first convolution by one that takes `channels`."""
    path, conv = next(
        (path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d)
    )
    new = nn.Conv2d(
        channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    model.set_submodule(path, new)


def _cut_classifier(model: nn.Module) -> None:
    """Replace the last linear layer, and the dropout right before it (our head has its own), by identities."""
    leaves = [(path, module) for path, module in model.named_modules() if not list(module.children())]
    last = max(index for index, (_, module) in enumerate(leaves) if isinstance(module, nn.Linear))
    model.set_submodule(leaves[last][0], nn.Identity())
    if isinstance(leaves[last - 1][1], nn.Dropout):
        model.set_submodule(leaves[last - 1][0], nn.Identity())


def _by_match(parameters: list[str], pattern: str) -> list[list[str]]:
    """Cut the ordered names wherever the text that `pattern` matches changes; names without a match stay."""
    groups: list[list[str]] = [[]]
    current = ""
    for name in parameters:
        match = re.search(pattern, name)
        if match and match[0] != current:
            current = match[0]
            groups.append([])
        groups[-1].append(name)
    return [group for group in groups if group]


def _after_pooling(module: nn.Module) -> str:
    """For plain sequences (VGG, AlexNet, SqueezeNet): a pattern that changes at the first layer after each pooling."""
    features = module.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    layers = list(features)
    starts = [
        i + 1 for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d) and i + 1 < len(layers)
    ]
    return "|".join([*(rf"features\.{start}\." for start in starts), r"classifier\.\d+"])


def _with_weights(groups: list[list[str]], parameters: dict[str, nn.Parameter]) -> list[list[str]]:
    """Join each group that holds no weight matrix to the one before it (the first: to the one after it)."""
    joined: list[list[str]] = []
    pending: list[str] = []
    for group in groups:
        if any(sum(size > 1 for size in parameters[name].shape) > 1 for name in group):
            joined.append(pending + group)
            pending = []
        elif joined:
            joined[-1].extend(group)
        else:
            pending += group
    return joined or [pending]
