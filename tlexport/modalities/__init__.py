"""Modalities: where samples come from, how they are split and prepared, and which metrics judge them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from tlexport import recipe
from tlexport.modalities import image, molecule, tabular
from tlexport.modalities.dataset import Dataset
from tlexport.modalities.metrics import Metric


class Modality(Protocol):
    """What each module of `MODALITIES` offers."""

    @property
    def METRICS(self) -> Mapping[str, Metric]: ...

    @property
    def HIGHER_IS_BETTER(self) -> Mapping[str, bool]: ...

    def load(
        self,
        data: recipe.Data,
        *,
        task: str,
        seed: int,
        cache: Path | None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Dataset:
        """Read, check, split. Raises DataError or LeakageError for all that a person has to decide or repair."""
        ...


MODALITIES: dict[str, Modality] = {"image": image, "tabular": tabular, "molecule": molecule}
