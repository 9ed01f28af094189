"""Modalities: where samples come from, how they are split and prepared, and which metrics judge them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from tlexport import recipe
from tlexport.modalities import image, molecule, series, tabular
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

    def samples(self, path: str, preprocessing: Mapping[str, Any]) -> tuple[tuple[str, ...], NDArray[Any]]:
        """Names and graph inputs of unlabelled samples, by a bundle's frozen description (`Preparation.describe`) alone.

        The inputs are as `Split.batch` gives them: [n, ...], or [n] structured with a field for each of the graph's
        inputs. Raises DataError for what cannot be read as described; what has to be told is warned as DataWarning.
        """
        ...


MODALITIES: dict[str, Modality] = {"image": image, "tabular": tabular, "series": series, "molecule": molecule}
