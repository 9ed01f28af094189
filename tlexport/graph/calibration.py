"""The ranges activations take on real data, found batch by batch in bounded memory.

Per tensor there is one histogram, whatever the number of samples; a batch's activations are dropped once counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
import onnx

from tlexport import origin
from tlexport.errors import ExportError
from tlexport.graph import inspect, judgement, probe
from tlexport.graph.grid import Flavour
from tlexport.graph.grid import Range as Range
from tlexport.graph.histogram import Histogram, range_of
from tlexport.graph.histogram import Method as Fixed

Method = Literal[Fixed, "auto"]

FIXED: tuple[Fixed, ...] = ("max", "entropy", "percentile", "mse")
JUDGED = 16  # samples on which `auto` measures the candidates' errors


class Calibrated(NamedTuple):
    """The range of each tensor, and the method that set it."""

    ranges: dict[str, Range]
    methods: dict[str, Fixed]


def calibrate(
    model: onnx.ModelProto,
    batches: Iterable[Mapping[str, np.ndarray]],
    tensors: Collection[str],
    *,
    method: Method = "entropy",
    percentile: float = 99.99,
    flavour: Flavour = "trt",
) -> dict[str, Range]:
    """The ranges alone of `calibrate_each`, which see for the arguments and what is raised."""
    return calibrate_each(
        model, batches, tensors, method=method, percentile=percentile, flavour=flavour
    ).ranges


def calibrate_each(
    model: onnx.ModelProto,
    batches: Iterable[Mapping[str, np.ndarray]],
    tensors: Collection[str],
    *,
    method: Method = "entropy",
    percentile: float = 99.99,
    flavour: Flavour = "trt",
) -> Calibrated:
    """Run `batches` (input name -> array [n, ...], n may vary) and find the range of each float tensor named.

    `max` keeps the whole range seen. `percentile` clips it at that percentile of |x|, `entropy` at the threshold with
    the least Kullback-Leibler divergence between the distribution and its 128-level quantisation (S. Migacz,
    "8-bit Inference with TensorRT", GTC 2017), `mse` at the least mean squared error of rounding and clipping onto the
    flavour's grid. Clipping is at plus and minus the threshold; a side that stays within it keeps its own bound, and
    `mse` moves either bound by itself where the grid has a zero point (`cpu`).
    `auto` takes for each tensor the one of these with the least error measured in the products that read it, on the
    first 16 samples (`judgement.least_error`).

    Raises ExportError naming a tensor the graph lacks or that holds NaN or infinity, and if there is no batch.
    """
    session = probe.session(model, tensors)
    observed = {name: Histogram() for name in tensors}
    samples, judged = 0, []
    for batch in batches:
        if method == "auto" and samples < JUDGED:
            judged.append({name: values[: JUDGED - samples] for name, values in batch.items()})
        samples += len(next(iter(batch.values())))
        for (name, histogram), values in zip(
            observed.items(), session.run(list(observed), dict(batch)), strict=True
        ):
            if not histogram.observe(values, counts=method != "max"):
                raise ExportError(_unbounded(model, name, values))
    if not samples:
        raise ExportError("calibration got no samples; it needs at least one of the training split")
    tried = FIXED if method == "auto" else (method,)
    candidates = {
        name: {each: range_of(histogram, each, percentile, flavour) for each in tried}
        for name, histogram in observed.items()
    }
    if method != "auto":
        return Calibrated(
            {name: ranges[method] for name, ranges in candidates.items()}, dict.fromkeys(candidates, method)
        )
    methods = judgement.least_error(model, judged, candidates, flavour)
    return Calibrated({name: candidates[name][chosen] for name, chosen in methods.items()}, methods)


def _unbounded(model: onnx.ModelProto, name: str, values: np.ndarray) -> str:
    """Why a tensor has no range, with the product it is a factor of."""
    readers = [node for node in model.graph.node if name in node.input and node.op_type in inspect.COMPUTE]
    where = origin.named(readers[0].name, origin.module(readers[0])) if readers else ""
    factor = f", a factor of {where!r}," if readers else ""
    nan, infinite = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    return (
        f"tensor {name!r}{factor} holds {nan} NaN and {infinite} infinite values of {values.size} on the calibration "
        "samples, so it has no range to quantise over; replace missing values before the first product "
        "(torch.where), or leave int8 out of precision"
    )
