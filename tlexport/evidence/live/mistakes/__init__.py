"""Mistakes that are made on the way to a model, as changes of its samples: what the model would have been sent by each.

Each is a hypothesis. The local session is asked the changed samples, and `diagnosis` sees whose answers a server gave.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from tlexport.tensors import TensorSpec

Samples = NDArray[Any]  # as golden/inputs.npy: [n, ...], or structured with a field an input

PRECISE = (
    0.9  # a mistake that is repeated exactly is suspected where it explains so much of the difference ...
)
ROUGH = 0.6  # ... one that can only be approximated, where it explains so much ...
NEVER = 1.0  # ... and one of many alike only where its answers are the server's: the best of many always explains some


@dataclass(frozen=True)
class Mistake:
    """`change` makes of the right samples those that the model got by it: of the same shape, float32 where they were uint8 if
    the values are no whole numbers. `least`: share of the difference that it must explain to be suspected where its
    answers are near to the server's and not equal to them.
    """

    says: str
    advice: str
    change: Callable[[Samples], Samples]
    least: float = PRECISE


def known(
    modality: str, inputs: Sequence[TensorSpec], preprocessing: Mapping[str, Any]
) -> tuple[Mistake, ...]:
    """Those that a client of this modality makes, likeliest first. Empty for a modality without any."""
    from tlexport.evidence.live.mistakes import image, molecule, series, tabular

    if modality == "image":
        return image.known(*(int(side) for side in inputs[0].shape[1:]))
    if modality == "tabular":
        columns = preprocessing.get("columns", ())
        return tabular.known(
            [str(column["name"]) for column in columns],
            [column.get("kind") == "categorical" for column in columns],
        )
    if modality == "series":
        return series.known([str(channel) for channel in preprocessing.get("channels", ())])
    return molecule.known(tuple(spec.name for spec in inputs)) if modality == "molecule" else ()
