"""Samples on their way into a network: rows of a split become the tensors that it takes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from tlexport.modalities import image
from tlexport.modalities.dataset import Split
from tlexport.models.network import Network
from tlexport.recipe import Augment
from tlexport.tensors import named
from tlexport.training import transfer
from tlexport.training.augment import augmentation

Tensors = tuple[torch.Tensor, ...]
Batches = Callable[[torch.Tensor], Tensors]


def prepared(model: Network, split: Split, rows: np.ndarray, device: torch.device) -> Tensors:
    """The rows as the graph will take them, in the order of the network's inputs; images as float in their layout."""
    return _placed(model, split.batch(rows), device)


def training(model: Network, split: Split, augment: Augment, device: torch.device) -> Batches:
    """What gives the loop its batches: as `prepared`, images changed at random as the recipe asks."""
    if isinstance(split, image.Split):
        return _images(model, split, augment, device)
    return lambda indices: prepared(model, split, indices.numpy(), device)


def _images(model: Network, split: image.Split, augment: Augment, device: torch.device) -> Batches:
    change = augmentation(augment, split.preprocessing.image_size)
    crops = augment.crop < 1

    def batch(indices: torch.Tensor) -> Tensors:
        stored = split.images[indices.numpy()]
        # A random crop is taken from the stored image and resizes by itself; anything else starts from the prepared one.
        pixels = _tensor(np.moveaxis(stored, -1, 1) if crops else split.preprocessing.batch(stored))
        return (_laid_out(model, change(pixels) if change else pixels, device),)

    return batch


def _placed(model: Network, batch: np.ndarray, device: torch.device) -> Tensors:
    tensors = (_tensor(array) for array in named(batch, model.INPUTS).values())
    if model.spec.modality == "image":
        return tuple(_laid_out(model, tensor, device) for tensor in tensors)
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


def _laid_out(model: Network, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    layout = transfer.memory_format(model)
    return images.to(device, non_blocking=True).float().contiguous(memory_format=layout)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """The same memory where it may be written to; a copy of samples that a read-only file holds."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))
