"""Random changes of training images, drawn anew for each image, on uint8 tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torchvision.transforms import v2

from tlexport.recipe import Augment

# A transform of torchvision.transforms.v2 draws once per call, so a batch is taken image by image: a whole
# batch that is flipped or left alone together is a weaker augmentation.


def augmentation(config: Augment, size: int) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A function from uint8 [B,C,h,w] to uint8 [B,C,size,size]; None where nothing is to be changed.

    Draws from torch's global generator, so `torch.manual_seed` repeats it.
    """
    steps: list[torch.nn.Module] = []
    if config.crop < 1:
        steps.append(v2.RandomResizedCrop((size, size), scale=(config.crop, 1.0), antialias=True))
    if config.horizontal_flip:
        steps.append(v2.RandomHorizontalFlip())
    if config.vertical_flip:
        steps.append(v2.RandomVerticalFlip())
    if config.rotate:
        steps.append(v2.RandomRotation(config.rotate, interpolation=v2.InterpolationMode.BILINEAR))
    if config.color:
        steps.append(v2.ColorJitter(brightness=config.color, contrast=config.color))
    if config.erase:
        steps.append(v2.RandomErasing(p=config.erase))
    if not steps:
        return None
    change = v2.Compose(steps)
    return lambda batch: torch.stack([change(image) for image in batch])
