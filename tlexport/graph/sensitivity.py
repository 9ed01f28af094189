"""What a layer's low precision costs: the output's error, on real samples, when only that layer is in low precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx

from tlexport.graph import probe, splice

Step = Callable[[int, int], None]  # done, of how many
SCORES = ("Softmax", "Sigmoid", "LogSoftmax")  # what saturates: the error is measured on what goes in


class Answers:
    """What the FP32 graph makes of some samples: what other graphs of the network are held against.

    `batches`: input name -> array [n, ...] each. `executable` turns a graph into one that ONNX Runtime's CPU code computes
    in the graph's own types (it drops roundings to FP16). Errors are measured on the scores before a last softmax or
    sigmoid, which would hide them where the network is sure.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        batches: Sequence[Mapping[str, np.ndarray]],
        executable: Callable[[onnx.ModelProto], onnx.ModelProto] = lambda model: model,
    ) -> None:
        self.batches, self.executable = batches, executable
        self.scores = scores(model)
        self.reference = self.of(model)
        self.power = float(np.square(self.reference - self.reference.mean(axis=0)).mean())

    def __len__(self) -> int:
        return len(self.reference)

    def of(self, model: onnx.ModelProto) -> np.ndarray:
        """float64 [n, K]: the scores that a graph gives the samples."""
        session = probe.showing(self.executable(model), [self.scores])
        found = [session.run(None, dict(batch))[0] for batch in self.batches]
        return np.concatenate(found).astype(np.float64)

    def noise(self, model: onnx.ModelProto) -> float:
        """Mean squared error of the scores as a share of their variance over the samples; infinite where one is NaN or infinite."""
        with np.errstate(invalid="ignore", over="ignore"):
            error = float(np.square(self.of(model) - self.reference).mean())
        return error / self.power if math.isfinite(error) and self.power > 0 else math.inf


def sensitivities(
    answers: Answers,
    base: onnx.ModelProto,
    typed: onnx.ModelProto,
    groups: Sequence[Collection[str]],
    step: Step | None = None,
) -> list[float]:
    """For each group: the noise of the FP32 graph `base` in which only its products are as `typed` has them."""
    found = []
    for done, group in enumerate(groups, start=1):
        found.append(answers.noise(splice.lowered(base, typed, group)))
        if step is not None:
            step(done, len(groups))
    return found


def scores(model: onnx.ModelProto) -> str:
    """Name of the tensor that goes into the last softmax or sigmoid; the output's own where there is none."""
    output = str(model.graph.output[0].name)
    last = next(node for node in model.graph.node if output in node.output)
    return str(last.input[0]) if last.op_type in SCORES else output
