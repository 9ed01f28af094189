"""Brings a file's tensors to a backbone's names, image size and input channels."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tlexport.errors import WeightsError
from tlexport.models import backbones
from tlexport.models.image import ModelSpec

# Buffers that a network computes by itself: a file may lack them, or hold them for an older version of the library.
COMPUTED = (
    "num_batches_tracked",
    "relative_position_index",
    "relative_coords_table",
    "attn_mask",
    "attention_bias_idxs",
)


@dataclass(frozen=True)
class Fitted:
    """Tensors under the backbone's names as far as they could be brought there, the old head's left out."""

    tensors: dict[str, Tensor]
    head: tuple[str, ...]
    adapted: tuple[str, ...]


def fit(tensors: Mapping[str, Tensor], ordered: bool, spec: ModelSpec, backbone: nn.Module) -> Fitted:
    """Part off the old head; where the rest does not fit as it is, rename, interpolate and sum as the libraries do.

    `ordered` says that the tensors come in their network's order, so that they may be matched by it.
    """
    own = backbone.state_dict()
    library = backbones.whole(spec.backbone)
    found, head = _split_head(tensors, library, own)
    adapted: list[str] = []
    if ordered and not own.keys() & found.keys():
        found, head, adapted = _by_order(tensors, library, own)
    if _differs(found, own):
        found, changes = _adapt(found, spec, backbone)
        adapted += changes
        found, more = _split_head(found, library, own)
        head = tuple(dict.fromkeys(head + more))
    return Fitted(found, head, tuple(adapted))


def fits(tensor: Tensor, own: Tensor) -> bool:
    return tensor.shape == own.shape and tensor.is_floating_point() == own.is_floating_point()


def kind(tensor: Tensor) -> str:
    """For messages: `64x3x7x7`, `64 int8`."""
    shape = "x".join(map(str, tensor.shape)) or "scalar"
    return shape if tensor.is_floating_point() else f"{shape} {str(tensor.dtype).removeprefix('torch.')}"


def _split_head(
    tensors: Mapping[str, Tensor], library: Mapping[str, torch.Size], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Part the backbone's tensors from those of the library's own classifiers, which the backbone does not have."""
    classifiers = {name.rpartition(".")[0] + "." for name in library if name not in own and "." in name}
    head = tuple(name for name in tensors if name not in own and name.startswith(tuple(classifiers)))
    return {name: tensor for name, tensor in tensors.items() if name not in head}, head


def _by_order(
    tensors: Mapping[str, Tensor], library: Mapping[str, torch.Size], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...], list[str]]:
    """Match tensors whose names all differ by their order, if the count, every shape and every kind agree.

    The kind is the last part of a name (weight, bias, running_mean ...). Otherwise nothing is renamed.
    """
    for names in (list(library), [name for name in library if name in own]):
        pairs = list(zip(tensors.items(), names, strict=False))
        if len(tensors) == len(names) and all(
            old.rpartition(".")[2] == new.rpartition(".")[2]
            and (new not in own or tensor.shape == library[new])
            for (old, tensor), new in pairs
        ):
            head = tuple(old for (old, _), new in pairs if new not in own)
            renamed = {new: tensor for (_, tensor), new in pairs if new in own}
            return renamed, head, [f"names: all {len(renamed)} differ, matched by order, shape and kind"]
    return dict(tensors), (), []


def _adapt(
    tensors: Mapping[str, Tensor], spec: ModelSpec, backbone: nn.Module
) -> tuple[dict[str, Tensor], list[str]]:
    """Bring another layout, image size or number of channels to this network's, as its library does."""
    library, name = backbones.check(spec.backbone)
    before = dict(tensors)
    after = (
        _timm_layout(before, backbone)
        if library == "timm"
        else _torchvision_positions(before, name, spec.image_size)
    )
    own = backbone.state_dict()
    renamed = sum(key in own and key not in before for key in after)
    changes = [f"names: {renamed} converted as timm's own loader does"] if renamed else []
    changes += [
        f"{key}: {kind(before[key])} to {kind(value)}"
        for key, value in after.items()
        if key in own and key in before and before[key].shape != value.shape
    ]
    for key, value in after.items():
        if key in own and _is_rgb_input(value, own[key], spec.channels):
            from timm.models import adapt_input_conv

            after[key] = adapt_input_conv(spec.channels, value)  # one channel: the sum over RGB
            changes.append(f"{key}: 3 input channels to {spec.channels}")
    return after, changes


def _timm_layout(tensors: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """What timm's own loader makes of a checkpoint: other projects' names, position embeddings of another size."""
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return tensors
    try:
        converted: dict[str, Tensor] = dict(convert(dict(tensors), backbone))
    except (*backbones.SIZE_ERRORS, KeyError, AttributeError):
        return tensors  # not a checkpoint it knows; the comparison that follows names every difference
    return converted


def _torchvision_positions(tensors: dict[str, Tensor], name: str, image_size: int) -> dict[str, Tensor]:
    """Interpolate a vision transformer's position embeddings to the image size."""
    key = "encoder.pos_embedding"
    if not name.startswith("vit") or key not in tensors:
        return tensors
    from torchvision.models.vision_transformer import interpolate_embeddings

    try:
        patch = int(name.rpartition("_")[2])
        return {**tensors, **interpolate_embeddings(image_size, patch, {key: tensors[key]})}
    except ValueError as error:
        raise WeightsError(
            f"position embeddings of shape {kind(tensors[key])} cannot be interpolated: {error}"
        ) from error


def _is_rgb_input(tensor: Tensor, own: Tensor, channels: int) -> bool:
    return (
        channels != 3
        and tensor.ndim == own.ndim == 4
        and (tensor.shape[1], own.shape[1]) == (3, channels)
        and (tensor.shape[0], *tensor.shape[2:]) == (own.shape[0], *own.shape[2:])
    )


def _differs(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    names = {name for name in (*own, *tensors) if not name.endswith(COMPUTED)}
    return any(name not in tensors or name not in own or not fits(tensors[name], own[name]) for name in names)
