"""Models: one module per modality. Everything in this room is torch, so importing it imports torch; timm and
torchvision, which cost seconds more, are imported only when a network is named."""

from __future__ import annotations

from types import ModuleType

from tlexport.models import image

MODELS: dict[str, ModuleType] = {"image": image}
