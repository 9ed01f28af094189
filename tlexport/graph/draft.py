"""An 8-bit graph in the making, and what can make it better: rescaled channels, better ranges, learnt rounding, true means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from tlexport.errors import ExportError
from tlexport.graph import bias, calibration, equalize, inspect, quantize, rounding, smooth
from tlexport.graph.budget import Improvement
from tlexport.graph.grid import Flavour, Range

Batch = Mapping[str, np.ndarray]

CENTRING = 1  # batches that means are measured on


@dataclass(frozen=True)
class Samples:
    """Calibration samples: `all` of them in batches, made anew at each call, and a `few` held in memory."""

    all: Callable[[], Iterable[Batch]]
    few: Sequence[Batch]


@dataclass(frozen=True)
class Draft:
    """`base` computes what the network does; `model` is what is quantised: the same, or with weights rounded as was learnt."""

    base: onnx.ModelProto
    model: onnx.ModelProto
    ranges: Mapping[str, Range]
    flavour: Flavour
    reduce_range: bool
    fixed: tuple[str, ...]  # layers that the user wants in FP32
    samples: Samples
    centred: bool = False  # biases take up the means' shift; measured anew for each choice of layers, since it comes from all of them

    def make(self, kept: Collection[str]) -> onnx.ModelProto:
        """The graph with these layers in FP32, as they are in `base`."""
        exclude = {*self.fixed, *kept}
        model = self.model if self.model is self.base else _with_constants(self.model, self.base, exclude)
        if self.centred:
            model = bias.correct_biases(
                model,
                self.samples.few[:CENTRING],
                self.ranges,
                self.flavour,
                exclude=exclude,
                reduce_range=self.reduce_range,
                reference=self.base,
            )
        return quantize.quantize(
            model, self.ranges, self.flavour, exclude=exclude, reduce_range=self.reduce_range
        )

    def alone(self) -> onnx.ModelProto:
        """Every layer low, and nothing adjusted to the errors of others: what one layer's cost is asked of."""
        return replace(self, centred=False).make(())


def improvements(*, learn: bool) -> tuple[tuple[Improvement[Draft], ...], ...]:
    """In the order to try them: those that take seconds, then with `learn` those that take minutes, where the first are not enough."""

    def calibrated(draft: Draft) -> Draft:
        wanted = quantize.tensors_to_calibrate(draft.base, draft.flavour)
        ranges = calibration.calibrate(
            draft.base, draft.samples.all(), wanted, method="auto", flavour=draft.flavour
        )
        return replace(draft, ranges=ranges)

    def rescaled(draft: Draft) -> Draft:
        few = draft.samples.few
        base = smooth.smooth(equalize.equalize(draft.base, few), few)
        if base.SerializeToString() == draft.base.SerializeToString():
            raise ExportError("no channels stand between two layers that could share their scale")
        return calibrated(replace(draft, base=base, model=base))

    def centred(draft: Draft) -> Draft:
        return replace(draft, centred=True)

    def rounded(draft: Draft) -> Draft:
        """Without corrected means: from them, learnt rounding has less to gain than it loses."""
        model = rounding.learn_rounding(
            draft.base,
            draft.samples.few,
            draft.ranges,
            draft.flavour,
            exclude=draft.fixed,
            reduce_range=draft.reduce_range,
        )
        return replace(draft, model=model, centred=False)

    rounds = (
        (
            Improvement("each range by its least measured error", calibrated),
            Improvement("channels rescaled (equalisation, SmoothQuant)", rescaled),
            Improvement("means corrected in the biases", centred),
        ),
        (
            Improvement("rounding learnt (AdaRound)", rounded),
            Improvement("means corrected in the biases", centred),
        ),
    )
    return rounds if learn else rounds[:1]


def _with_constants(
    model: onnx.ModelProto, base: onnx.ModelProto, layers: Collection[str]
) -> onnx.ModelProto:
    """The graph whose products named have the constants of `base`."""
    own = {tensor.name: tensor for tensor in base.graph.initializer}
    read = {name for node in model.graph.node if node.name in layers for name in node.input}
    read -= {
        name
        for node in model.graph.node
        if node.op_type in inspect.COMPUTE and node.name not in layers
        for name in node.input
    }
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if tensor.name in read and tensor.name in own:
            tensor.CopyFrom(own[tensor.name])
    return result
