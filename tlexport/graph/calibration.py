"""The ranges activations take on real data, found batch by batch in bounded memory.

Per tensor there is one histogram of |x|, whatever the number of samples; a batch's activations are dropped once counted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx

from tlexport import cores, origin
from tlexport.errors import ExportError
from tlexport.graph import inspect

Method = Literal["max", "entropy", "percentile"]

BINS = 2048
LEVELS = 128  # of |x| in 8 bits with a sign


class Range(NamedTuple):
    """The interval a tensor is quantised over."""

    low: float
    high: float

    @property
    def magnitude(self) -> float:
        return max(abs(self.low), abs(self.high))


def calibrate(
    model: onnx.ModelProto,
    batches: Iterable[Mapping[str, np.ndarray]],
    tensors: Collection[str],
    *,
    method: Method = "entropy",
    percentile: float = 99.99,
) -> dict[str, Range]:
    """Run `batches` (input name -> array [n, ...], n may vary) and return the range of each float tensor named.

    `max` keeps the whole range seen. `percentile` clips it at that percentile of |x|, `entropy` at the threshold with
    the least Kullback-Leibler divergence between the distribution and its 128-level quantisation (S. Migacz,
    "8-bit Inference with TensorRT", GTC 2017). Clipping is at plus and minus the threshold; a side that stays
    within it keeps its own bound.

    Raises ExportError naming a tensor the graph lacks or that holds NaN or infinity, and if there is no batch.
    """
    session = _session(model, tensors)
    observed = {name: Histogram() for name in tensors}
    samples = 0
    for batch in batches:
        samples += len(next(iter(batch.values())))
        for (name, histogram), values in zip(
            observed.items(), session.run(list(observed), dict(batch)), strict=True
        ):
            if not histogram.observe(values, counts=method != "max"):
                raise ExportError(_unbounded(model, name, values))
    if not samples:
        raise ExportError("calibration got no samples; it needs at least one of the training split")
    return {
        name: histogram.clipped(_threshold(histogram, method, percentile))
        for name, histogram in observed.items()
    }


class Histogram:
    """Counts of |x| in 2048 equal bins from 0 to `limit`, beside the exact lowest and highest value.

    `limit` starts as the first batch's largest |x|. Where a later one is larger the limit doubles and neighbouring
    bins merge, so that at least half of the bins stay in use and nothing has to be seen twice.
    """

    def __init__(self) -> None:
        self.low = np.inf
        self.high = -np.inf
        self.limit = 0.0
        self.counts = np.zeros(BINS, np.int64)

    @property
    def largest(self) -> float:
        return max(abs(self.low), abs(self.high))

    def observe(self, values: np.ndarray, *, counts: bool) -> bool:
        """Add float32 values of any shape; False if they are not all finite. `counts=False` keeps only the bounds."""
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low) or not np.isfinite(high):
            return False
        self.low, self.high = min(self.low, low), max(self.high, high)
        if counts:
            self._count(values)
        return True

    def _count(self, values: np.ndarray) -> None:
        if self.largest < np.finfo(np.float32).tiny:
            self.counts[0] += values.size
            return
        if self.limit == 0:
            self.limit = self.largest
        while self.largest > self.limit:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.limit *= 2
        bins = np.abs(values).ravel()
        bins *= BINS / self.limit
        np.minimum(bins, BINS - 1, out=bins)
        self.counts += np.bincount(bins.astype(np.intp), minlength=BINS)

    def clipped(self, threshold: float) -> Range:
        return Range(max(self.low, -threshold), min(self.high, threshold))


def _threshold(histogram: Histogram, method: Method, percentile: float) -> float:
    """The |x| to clip at."""
    if method == "max" or histogram.limit == 0:
        return histogram.largest
    width = histogram.limit / BINS
    used = min(BINS, int(histogram.largest / width) + 1)
    counts = histogram.counts[:used].astype(np.float64)
    share = np.cumsum(counts) / counts.sum()
    bins = (
        1 + int(np.searchsorted(share, percentile / 100))
        if method == "percentile"
        else _least_divergent(counts)
    )
    return min(bins * width, histogram.largest)


def _least_divergent(counts: np.ndarray) -> int:
    """How many of the bins [n] to keep so that 128 levels describe the clipped distribution best.

    For every candidate i >= 128: P is the first i bins with all mass beyond added to the last one; Q spreads the mass
    of each of 128 equal groups evenly over the group's non-empty bins. Sums over groups are differences of cumulative
    sums, so that all candidates are judged at once. Bin 0 is given its neighbour's count: zeros cost nothing to
    represent, and after a ReLU they would outweigh everything else.
    """
    counts = counts.copy()
    counts[0] = counts[1] if len(counts) > 1 else counts[0]
    if len(counts) <= LEVELS or not counts.any():
        return len(counts)
    kept = np.arange(LEVELS, len(counts) + 1)
    edges = np.arange(LEVELS + 1) * kept[:, None] // LEVELS
    mass = np.diff(_cumulative(counts)[edges], axis=1)
    filled = np.diff(_cumulative(counts > 0)[edges], axis=1)
    total, inside, last = counts.sum(), _cumulative(counts)[kept], counts[kept - 1]
    beyond = total - inside

    own = _cumulative(_x_log_x(counts))[kept] - _x_log_x(last) + _x_log_x(last + beyond)
    filled[:, -1] += (last == 0) & (beyond > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_q = np.log(np.maximum(mass / filled / inside[:, None], np.finfo(np.float64).tiny))
    mass[:, -1] += beyond
    cross = np.where(mass > 0, mass * log_q, 0).sum(1)
    return int(kept[np.argmin(own - cross)])


def _cumulative(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _x_log_x(counts: np.ndarray) -> np.ndarray:
    return np.asarray(counts * np.log(np.maximum(counts, 1)))


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


def _session(model: onnx.ModelProto, tensors: Collection[str]) -> Any:
    """An ONNX Runtime session of the graph with the tensors as outputs."""
    import onnxruntime as ort

    types = inspect.element_types(model)
    if strange := [name for name in tensors if types.get(name) != onnx.TensorProto.FLOAT]:
        raise ExportError(
            f"only float32 tensors of the graph can be calibrated, not {', '.join(strange[:5])}"
        )
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    del observed.graph.output[:]
    observed.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors
    )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = cores.usable()
    return ort.InferenceSession(observed.SerializeToString(), options, providers=["CPUExecutionProvider"])
