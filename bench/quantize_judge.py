"""Judging INT8 graphs of one run: each maker's on the same test split, by the statistics that `tlexport verify` uses."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tlexport.backends import registry
from tlexport.errors import TlexportError
from tlexport.evidence.accuracy import bootstrap, comparison, flips
from tlexport.graph import cost, inspect
from tlexport.modalities import metrics
from tlexport.recipe import Recipe
from tlexport.run import Run

OURS = "tlexport"


@dataclass(frozen=True)
class Made:
    """One INT8 graph, or why there is none."""

    maker: str
    flavour: str
    graph: Path | None
    seconds: float | None
    settings: dict[str, Any]
    versions: dict[str, str]
    reason: str = ""


class Judge:
    """The reference's side, read once."""

    def __init__(self, run: Run) -> None:
        self.run, self.recipe = run, run.recipe
        self.folder = run / "reference"
        self.reference = comparison.Comparison.read(self.folder, rule_of(self.recipe))
        self.task = run.manifest["stages"]["finetune"]["result"]["task"]
        self.one_flip = 1 / len(self.reference)

    def judged(self, made: list[Made]) -> Iterator[dict[str, Any]]:
        """One row a graph; rivals' rows know how far behind them tlexport's graph of the same flavour is."""
        own: dict[str, np.ndarray] = {}
        for one in made:
            row: dict[str, Any] = {"maker": one.maker, "flavour": one.flavour}
            row |= dict.fromkeys(
                ("metric", "drop", "drop_low", "drop_high", "flips", "int8_macs", "size_bytes", "beyond")
            )
            row |= {"seconds": one.seconds, "settings": one.settings, "reason": one.reason}
            if one.graph is not None:
                try:
                    outputs = self.outputs(one.graph, one.flavour)
                    row |= self.numbers(one.graph, outputs)
                except TlexportError as error:
                    yield row | {"reason": " ".join(str(error).split())[:300]}
                    continue
                if one.maker == OURS:
                    own[one.flavour] = outputs
                elif one.flavour in own:
                    row["beyond"] = self.beyond(outputs, own[one.flavour])
            yield row

    def outputs(self, graph: Path, flavour: str) -> np.ndarray:
        """float32 [n, K] of the test split. Raises CompileError where ONNX Runtime refuses the graph."""
        names = tuple(spec.name for spec in inspect.io(onnx.load(graph))[0])
        with tempfile.TemporaryDirectory(prefix="tlexport-quantize-") as temporary:
            found = Path(temporary) / "outputs.npy"
            registry.predict(
                "onnxruntime",
                graph.resolve(),
                self.folder / "inputs.npy",
                found,
                input_names=names,
                batch_size=16,
                judge=flavour == "trt",
            )
            answers: np.ndarray = np.load(found, allow_pickle=False)
        return answers

    def numbers(self, graph: Path, outputs: np.ndarray) -> dict[str, Any]:
        drop = self.reference.drop(outputs)
        flipped = flips.between(
            metrics.decisions(self.reference.outputs, self.task),
            metrics.decisions(outputs, self.task),
            self.reference.labels,
        )
        return {
            "metric": self.reference.value - self.reference.rule.sign * drop.estimate,
            "drop": round(drop.estimate, 12),  # five of a thousand samples are 0.005, not a rounding more
            "drop_low": drop.low,
            "drop_high": round(drop.high, 12),
            "flips": flipped.count,
            "int8_macs": cost.share(named(onnx.load(graph))),
            "size_bytes": graph.stat().st_size,
        }

    def beyond(self, theirs: np.ndarray, own: np.ndarray) -> dict[str, float]:
        """How much lower tlexport's metric is than the rival's, on the same resamples."""
        rule = self.reference.rule
        found = bootstrap.paired_bootstrap(
            rule.prepare(self.reference.labels, theirs),
            rule.prepare(self.reference.labels, own),
            len(self.reference),
            resamples=rule.resamples,
            confidence=rule.confidence,
            seed=rule.seed,
            sign=rule.sign,
            groups=self.reference.groups,
        )
        return {"ratio": found.estimate, "low": found.low, "high": found.high}


def rule_of(recipe: Recipe) -> comparison.Rule:
    return comparison.Rule.of(recipe, metrics.METRICS, metrics.HIGHER_IS_BETTER, metrics.UNBOUNDED)


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a name of its own for each node: products are counted by name, and not every maker gives names."""
    for index, node in enumerate(model.graph.node):
        node.name = f"{index}/{node.name}"
    return model
