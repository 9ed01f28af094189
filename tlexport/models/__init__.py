"""Models: one module per modality. Everything in this room is torch, so importing it imports torch; timm, torchvision
and transformers, which cost seconds more, are imported only when a network is named."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from tlexport.models import image, molecule, series, tabular
from tlexport.models.network import Network
from tlexport.models.statefile import Found
from tlexport.recipe import Pretrain, Recipe

# A module's own Spec, a subclass of network.Spec that no other module takes.
AnySpec = Any


class Models(Protocol):
    """What each module of `MODELS` offers. `data` is a modalities.dataset.Dataset."""

    @property
    def Spec(self) -> type[Any]: ...

    def describe(self, recipe: Recipe, data: Any) -> AnySpec:
        """All that rebuilds the recipe's network for this data. Raises RecipeError."""
        ...

    def create(self, spec: AnySpec) -> Network:
        """The network with random weights from torch's global generator."""
        ...

    def prepare(self, model: Any, data: Any) -> None:
        """Set the backbone's data-dependent buffers (means, bins) from the training split alone."""
        ...

    def published(self, spec: AnySpec) -> Found:
        """The weights that the backbone's name stands for. Raises RecipeError where nobody publishes any."""
        ...

    def align(
        self, tensors: dict[str, Tensor], source: AnySpec, spec: AnySpec
    ) -> tuple[dict[str, Tensor], list[str]]:
        """The tensors of a checkpoint's backbone for another data set's backbone, and notes on what was adapted."""
        ...

    def pretext(self, model: Any, pretrain: Pretrain, data: Any) -> nn.Module:
        """The task of pretraining: inputs -> a scalar loss. Raises RecipeError for an objective it has not."""
        ...


MODELS: dict[str, Models] = {"image": image, "tabular": tabular, "series": series, "molecule": molecule}
