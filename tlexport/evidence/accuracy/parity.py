"""Whether two ways of computing a model agree, on a scale that cannot be zero."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from tlexport.errors import ExportError

# Beside the outputs' magnitude: float32 rounding is a per mille of it, so an error could not be told.
SMALLEST_SHARE = 1e-4
# In any unit: what is left of a signal that random weights have damped through every layer.
SMALLEST_SPREAD = 1e-12
# Another machine's kernels add in another order, and golden samples are few: so many times the error that verify measured ...
SLACK = 3.0
USUAL, WIDE = 0.9, 0.5
ROUNDING = 1e-4  # ... and this share of the outputs' spread, for graphs whose own error is next to none.


class Parity(BaseModel):
    """Errors of a candidate's outputs against the reference's."""

    model_config = ConfigDict(frozen=True)

    max_abs_error: float
    scale: float  # the largest range that an output element has over the reference's samples
    relative: float  # max_abs_error / scale
    rms_error: float
    worst_index: tuple[int, ...]  # where max_abs_error is; the first number is the sample
    samples: int


def compare(reference: NDArray[Any], candidate: NDArray[Any], *, name: str = "output") -> Parity:
    """Compare one output [n, ...] of the same n >= 2 samples, in the output's own units.

    The scale is how far the reference moves from sample to sample, not its magnitude: a graph that answers
    every sample with the mean is then off by about half the scale, however large the mean.
    Outputs of runs at batch 1 are to be stacked first.
    Raises ExportError if shapes differ, a value is not finite, or the reference does not vary over the
    samples (random weights do that), because then the check would prove nothing.
    """
    if reference.shape != candidate.shape:
        raise ExportError(
            f"{name} has shape {candidate.shape}, the reference has {reference.shape} (first: samples)"
        )
    if reference.ndim == 0 or len(reference) < 2 or reference.size == 0:
        raise ExportError(
            f"{name} has shape {reference.shape}: fewer than two samples cannot show whether outputs vary, "
            "so the check would prove nothing; compare on more samples"
        )
    reference, candidate = reference.astype(np.float64), candidate.astype(np.float64)
    _finite(reference, f"the reference's {name}")
    scale = spread(reference)
    magnitude = float(np.abs(reference).max())
    if scale <= max(SMALLEST_SPREAD, SMALLEST_SHARE * magnitude):
        raise ExportError(
            f"the reference's {name} does not vary over {len(reference)} samples (spread {scale:.3g}, "
            f"magnitude {magnitude:.3g}), so the check would prove nothing; use trained weights and real "
            "samples"
        )
    _finite(candidate, name)
    error = np.abs(candidate - reference)
    worst = np.unravel_index(int(error.argmax()), error.shape)
    return Parity(
        max_abs_error=float(error[worst]),
        scale=scale,
        relative=float(error[worst]) / scale,
        rms_error=float(np.sqrt(np.mean(error**2))),
        worst_index=tuple(int(i) for i in worst),
        samples=len(reference),
    )


def limit(error: float | None, expected: NDArray[Any]) -> float:
    """The largest difference from the reference's outputs [n, ...] that is taken for the same model elsewhere.

    error: the variant's largest over the test split, as verify measured it; None for none.
    """
    return SLACK * (error or 0.0) + ROUNDING * spread(expected)


def wide(error: float | None, expected: NDArray[Any]) -> bool:
    """Whether the limit is so large a share of the outputs' spread that it tells nothing."""
    return limit(error, expected) > WIDE * spread(expected)


def spread(expected: NDArray[Any]) -> float:
    """The largest range that an output element has over the samples of `expected` [n, ...]."""
    return float(np.ptp(expected, axis=0).max())


def usual_error(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """The 90% quantile over samples of a sample's largest error; outputs [n, ...]."""
    return float(np.quantile(_largest(reference, candidate), USUAL))


def disagreement(
    expected: NDArray[Any], outputs: NDArray[Any], error: float | None, usual: float | None
) -> str:
    """Why answers [n, ...] to golden samples are not those of the variant that was verified; empty if they may be.

    error, usual: the variant's largest and usual error over the test split. One sample in a thousand that is far off makes the
    limit of the largest one so wide that nearly any answer is within it; half of a few golden samples beyond what nine
    of ten stay below, three times over, is then no chance (8 samples: below one in 200 even without the three).
    """
    found, most = _largest(expected, outputs), limit(error, expected)
    if found.max() > most:
        return (
            f"differs by {found.max():.3g} from the reference, and verify measured {error or 0.0:.3g} "
            f"(at most {most:.3g} is taken for the same model)"
        )
    middle = float(np.median(found))
    if usual is not None and middle > limit(usual, expected):
        return (
            f"half of the samples differ by {middle:.3g} or more from the reference, and verify measured {usual:.3g} or less for nine "
            f"of ten (at most {limit(usual, expected):.3g} is taken for the same model)"
        )
    return ""


def _largest(reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
    """Of each sample [n], in float64."""
    error = np.abs(candidate.astype(np.float64) - reference.astype(np.float64))
    return np.asarray(error.reshape(len(error), -1).max(axis=1))


def _finite(values: NDArray[np.float64], what: str) -> None:
    broken = ~np.isfinite(values)
    if broken.any():
        samples = np.flatnonzero(broken.reshape(len(values), -1).any(axis=1))
        raise ExportError(
            f"{what} holds {int(broken.sum())} values that are not finite (NaN or infinite), "
            f"in {len(samples)} of {len(values)} samples, the first is sample {samples[0]}"
        )
