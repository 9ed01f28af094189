"""Baselines: the plain models a sceptic would pick, fitted on the same training split as the network they stand beside."""

from __future__ import annotations

from collections.abc import Callable

from tlexport.baselines import image, molecule, series, tabular
from tlexport.baselines.fitted import Fitted
from tlexport.errors import NotInstalledError, RecipeError
from tlexport.modalities.dataset import Dataset
from tlexport.progress import Progress

__all__ = ["Fitted", "fit"]

Fit = Callable[[Dataset, int], Fitted]

# Modality -> name -> how it is fitted; `auto` takes all of them that fit the task.
BASELINES: dict[str, dict[str, Fit]] = {
    "image": image.BASELINES,
    "tabular": tabular.BASELINES,
    "series": series.BASELINES,
    "molecule": molecule.BASELINES,
}


def fit(
    modality: str, data: Dataset, names: tuple[str, ...], *, seed: int, progress: Progress
) -> list[Fitted]:
    """Fit the named baselines (`auto`: the modality's own that are installed, the others are told).

    Raises RecipeError for a name that there is not, NotInstalledError for one that is named and needs an extra.
    """
    known = series.offered(data.preprocessing) if modality == "series" else BASELINES[modality]
    wanted = list(known) if names == ("auto",) else list(names)
    if unknown := [name for name in wanted if name not in known]:
        raise RecipeError(
            f"no baseline {', '.join(unknown)} for {modality} data (there are: {', '.join(known) or 'none'})"
        )
    found = []
    with progress.bar("baselines") as step:
        for done, name in enumerate(wanted, start=1):
            try:
                found.append(known[name](data, seed))
            except NotInstalledError as error:
                if names != ("auto",):
                    raise
                progress.warn(f"no baseline {name}: {error}")
            step(done, len(wanted))
    return found
