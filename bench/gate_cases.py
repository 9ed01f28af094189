"""What bench/gate.py gates: answers of a real classifier with rounding noise, graphs to time, a slow-down, and a neighbour.

`load` and `inputs` are made in the child that times, so they live in a module that it can import.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tlexport.backends import Options, registry
from tlexport.evidence.gate.sessions import Build

NOISE = 0.4  # of a logit, on either side: three decisions in a hundred change
DRAWS = 400  # of the noise, to know the population's metrics by
GRAPHS = {
    "small": (64, 256, 256, 2),
    "wide": (64, 1024, 1024, 2),
}  # widths; within a core's cache, and beyond it
LOAD = """
import random, sys, time
rng = random.Random(int(sys.argv[1]))
while True:
    until = time.perf_counter() + rng.uniform(0.02, 1.0)
    while time.perf_counter() < until: pass
    time.sleep(rng.uniform(0.02, 1.0))
"""


@dataclass(frozen=True)
class Population:
    """1797 real digits, odd or even, as a logistic regression answers when it has not seen them: labels [N], logits [N]."""

    labels: np.ndarray
    logits: np.ndarray

    @cached_property
    def truth(self) -> dict[str, float]:
        """Metrics of an answer with noise, over the population and the noise."""
        rng = np.random.default_rng(1)
        draws = [evaluated(self.labels, noisy(self.logits, rng)) for _ in range(DRAWS)]
        return {metric: float(np.mean([of[metric] for of in draws])) for metric in draws[0]}

    def replaced(self, metric: str, drop: float) -> float:
        """Share of the answers that must be those of another, random sample for the metric to drop by `drop`."""
        base, positive = self.truth[metric], float(self.labels.mean())
        if metric == "auc":
            return _root(
                lambda q: base - ((1 - q) ** 2 * base + q * (1 - q) * (base + 0.5) + q * q / 2), drop
            )
        said = float(np.mean(self.logits > 0))
        chance = positive * said + (1 - positive) * (1 - said)
        return drop / (base - chance)

    def sample(
        self, n: int, replaced: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """labels [n], old and new probabilities [n, 2], drawn with replacement; each side has noise of its own."""
        drawn = rng.integers(len(self.labels), size=n)
        old, new = (noisy(self.logits[drawn], rng) for _ in range(2))
        other = rng.random(n) < replaced
        new[other] = noisy(self.logits[rng.integers(len(self.labels), size=int(other.sum()))], rng)
        return self.labels[drawn], probabilities(old), probabilities(new)


def population() -> Population:
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    digits = load_digits()
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    logits = cross_val_predict(model, digits.data, digits.target % 2, cv=5, method="decision_function")
    return Population(digits.target % 2, logits)


def noisy(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return logits + rng.normal(scale=NOISE, size=logits.shape)


def probabilities(logits: np.ndarray) -> np.ndarray:
    positive = 1 / (1 + np.exp(-logits))
    return np.column_stack([1 - positive, positive])


def evaluated(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    from scipy.stats import rankdata

    positive = labels == 1
    ranks, ones = rankdata(logits), int(positive.sum())
    auc = (ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones))
    return {"accuracy": float(np.mean((logits > 0) == positive)), "auc": float(auc)}


def _root(drop: Callable[[float], float], wanted: float) -> float:
    """q in [0, 1] where the increasing `drop` is `wanted`."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if drop(middle) < wanted else (low, middle)
    return low


def write_graph(path: Path, widths: tuple[int, ...]) -> None:
    """A table's network in ONNX: products, ReLU and a softmax, with random weights, which cost as much as trained ones."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng, nodes, weights, last = np.random.default_rng(0), [], [], "x"
    for index, (wide, narrow) in enumerate(pairwise(widths)):
        values = {f"w{index}": rng.normal(size=(wide, narrow)) / wide**0.5, f"b{index}": np.zeros(narrow)}
        weights += [numpy_helper.from_array(array.astype(np.float32), name) for name, array in values.items()]
        nodes.append(helper.make_node("Gemm", [last, *values], [f"h{index}"], name=f"gemm{index}"))
        nodes.append(helper.make_node("Relu", [f"h{index}"], [f"r{index}"]))
        last = f"r{index}"
    nodes[-1] = helper.make_node("Softmax", [f"h{len(widths) - 2}"], ["y"])
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", widths[0]), ("y", widths[-1]))
    ]
    graph = helper.make_graph(nodes, "table", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def build(folder: Path, graph: str, slower: float = 1.0) -> Build:
    """A graph in ONNX Runtime on one thread; `slower`: each call is followed by waiting until it took so many times as long."""
    path = folder / f"{graph}.onnx"
    if not path.is_file():
        write_graph(path, GRAPHS[graph])
    load = registry.loader("onnxruntime", path, "cpu", Options())
    return Build(
        model="table",
        variant=graph,
        sha256="",
        threads=1,
        batch=1,
        load=partial(slowed, load, slower),
        inputs=partial(rows, GRAPHS[graph][0]),
    )


def rows(width: int, batch: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(2).normal(size=(batch, width)).astype(np.float32)}


@contextmanager
def slowed(load: Callable[[int], AbstractContextManager[Any]], times: float, threads: int) -> Iterator[Any]:
    """The runner, each of whose calls is followed by waiting for the rest of `times` its own time."""
    with load(threads) as runner:
        yield Slowed(runner, times)


@dataclass(frozen=True)
class Slowed:
    runner: Any
    times: float

    def bind(self, inputs: dict[str, np.ndarray]) -> Slowed:
        return Slowed(self.runner.bind(inputs), self.times)

    def call(self) -> None:
        started = time.perf_counter_ns()
        self.runner.call()
        until = started + self.times * (time.perf_counter_ns() - started)
        while time.perf_counter_ns() < until:
            pass


@contextmanager
def neighbour(present: bool, seed: int) -> Iterator[None]:
    """Where `present`, a process that works and rests in turns, each for up to a second."""
    if not present:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", LOAD, str(seed)])
    try:
        yield
    finally:
        process.kill()
        process.wait()
