"""An 8-bit graph in the making, and what can make it better: rescaled channels, better ranges, learnt rounding, true means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper

from tlexport.errors import ExportError
from tlexport.graph import bias, calibration, equalize, inspect, quantize, rounding, smooth
from tlexport.graph.budget import Improvement
from tlexport.graph.grid import Flavour, Range

Batch = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Draft:
    """`base` computes what the network does; `model` is what is quantised: the same, or with weights and biases adjusted to it."""

    base: onnx.ModelProto
    model: onnx.ModelProto
    ranges: Mapping[str, Range]
    flavour: Flavour
    reduce_range: bool
    fixed: tuple[str, ...]  # layers that the user wants in FP32

    def make(self, kept: Collection[str]) -> onnx.ModelProto:
        """The graph with these layers in FP32, as they are in `base`: what was adjusted to their rounding is taken back."""
        exclude = {*self.fixed, *kept}
        model = self.model if self.model is self.base else _with_constants(self.model, self.base, exclude)
        return quantize.quantize(
            model, self.ranges, self.flavour, exclude=exclude, reduce_range=self.reduce_range
        )


@dataclass(frozen=True)
class Samples:
    """Calibration samples: `all` of them in batches, made anew at each call, and a `few` held in memory."""

    all: Callable[[], Iterable[Batch]]
    few: Sequence[Batch]


def improvements(samples: Samples, *, learn: bool) -> tuple[tuple[Improvement[Draft], ...], ...]:
    """In the order to try them: those that take seconds, then with `learn` those that take minutes, where the first are not enough."""

    def calibrated(draft: Draft, method: calibration.Method) -> dict[str, Range]:
        wanted = quantize.tensors_to_calibrate(draft.base, draft.flavour)
        return calibration.calibrate(draft.base, samples.all(), wanted, method=method, flavour=draft.flavour)

    def rescaled(draft: Draft) -> Draft:
        base = smooth.smooth(equalize.equalize(draft.base, samples.few), samples.few)
        if base.SerializeToString() == draft.base.SerializeToString():
            raise ExportError("no channels stand between two layers that could share their scale")
        draft = replace(draft, base=base, model=base)
        return replace(draft, ranges=calibrated(draft, "auto"))

    def ranged(draft: Draft) -> Draft:
        return replace(draft, ranges=calibrated(draft, "auto"))

    def rounded(draft: Draft) -> Draft:
        """From the weights themselves: learnt with corrected biases, rounding has less to gain than it loses."""
        fresh = replace(draft, model=draft.base)
        return replace(draft, model=_adjusted(rounding.learn_rounding, fresh, samples))

    def centred(draft: Draft) -> Draft:
        def correct(model: onnx.ModelProto, *args: object, **options: object) -> onnx.ModelProto:
            return bias.correct_biases(model, *args, reference=draft.base, **options)  # type: ignore[arg-type]

        return replace(draft, model=_adjusted(correct, draft, samples))

    rounds = (
        (
            Improvement("each range by its least measured error", ranged),
            Improvement("channels rescaled (equalisation, SmoothQuant)", rescaled),
            Improvement("means corrected in the biases", centred),
        ),
        (
            Improvement("rounding learnt (AdaRound)", rounded),
            Improvement("means corrected in the biases", centred),
        ),
    )
    return rounds if learn else rounds[:1]


def _adjusted(adjust: Callable[..., onnx.ModelProto], draft: Draft, samples: Samples) -> onnx.ModelProto:
    return adjust(
        draft.model,
        samples.few,
        draft.ranges,
        draft.flavour,
        exclude=draft.fixed,
        reduce_range=draft.reduce_range,
    )


def _with_constants(
    model: onnx.ModelProto, base: onnx.ModelProto, layers: Collection[str]
) -> onnx.ModelProto:
    """The graph whose products named have the constants of `base`; a bias that only `model` has becomes zero."""
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
        elif tensor.name in read:
            zeros = np.zeros_like(numpy_helper.to_array(tensor))
            tensor.CopyFrom(numpy_helper.from_array(zeros, tensor.name))
    return result
