"""Images: logistic regression on the features of a single layer that nobody trained.

What a sceptic holds against a pretrained backbone: patches drawn at random from the training images and whitened are the
filters, their rectified responses are averaged over a coarse grid (Coates, Ng and Lee, AISTATS 2011, sections 3 and 4.2,
with random patches for a dictionary: Coates and Ng, ICML 2011).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport import cores
from tlexport.baselines.fitted import Fitted, checked
from tlexport.modalities import metrics
from tlexport.modalities.dataset import Dataset, Split

if TYPE_CHECKING:
    import onnx

Floats = NDArray[np.float32]

INPUT, FEATURES, OUTPUT = "images", "features", "probabilities"
OPSET = 20
FILTERS, PATCH, GRID = 256, 6, 2
SIDE = 32  # larger images are averaged down to 32 to 63 pixels a side: the cost of a small one
THRESHOLD = 0.5  # of a filter's standard deviation: responses below it are no match
WHITENING = 0.1  # of the mean variance of a patch's directions, so that noise is not blown up
STRENGTHS = (1e-3, 1e-2, 1e-1)  # inverse regularisation
STEPS = 200  # of the solver; more of them fit the training images alone
MOST = 20_000  # training images: what more of them teach a linear model is not worth the wait
_SOURCES, _PATCHES = 500, 10_000
_BATCH = 64
_CHECKED = 256


@dataclass(frozen=True)
class _Layer:
    """`shrink` x `shrink` pixels are averaged to one, then filters [F, C, p, p] and biases [F]."""

    shrink: int
    filters: Floats
    biases: Floats


def random_features(data: Dataset, seed: int) -> Fitted:
    """Fit it; its regularisation is the one of three with the lowest log loss on val."""
    started = time.monotonic()
    layer = _layer(data, seed)
    nodes, tensors = _feature_part(layer, data.preprocessing.image_size)
    extract = _extractor(_graph(nodes, tensors, data, FEATURES))
    rows = np.sort(np.random.default_rng(seed).permutation(len(data.train))[:MOST])
    train, val, test = (
        extract(data.train, rows),
        extract(data.val, np.arange(len(data.val))),
        extract(data.test, np.arange(len(data.test))),
    )
    weights, biases, strength = _regression(train, data.train.labels[rows], val, data)
    served = [_served(part, weights, biases, data.task) for part in (val, test)]
    nodes, tensors = _with_answer(nodes, tensors, weights, biases, data.task)
    shown = np.arange(min(len(data.val), _CHECKED))
    graph, why_not = checked(
        _graph(nodes, tensors, data, OUTPUT), data, data.val.batch(shown), INPUT, served[0][shown]
    )
    count, _, patch, _ = layer.filters.shape
    fewer = (
        f", fitted on {len(rows)} of {len(data.train)} training images" if len(rows) < len(data.train) else ""
    )
    return Fitted(
        name="random_features",
        description=f"logistic regression (C {strength:g}) on {train.shape[1]} features of one untrained layer: {count} random "
        f"whitened patches of {patch} x {patch} pixels after averaging {layer.shrink} x {layer.shrink}{fewer}",
        val=served[0],
        test=served[1],
        graph=graph,
        inputs=(INPUT,),
        why_not=why_not,
        seconds=time.monotonic() - started,
    )


def _layer(data: Dataset, seed: int) -> _Layer:
    """Patches of training images, whitened (ZCA): [F] unit filters, each scaled to responses of variance 1."""
    random = np.random.default_rng(seed)
    shrink = max(1, data.preprocessing.image_size // SIDE)
    patches = _patches(data.train, shrink, random)
    count, channels, patch, _ = patches.shape
    flat = patches.reshape(count, -1)
    mean = flat.mean(axis=0)
    centred = flat - mean
    variances, directions = np.linalg.eigh(np.cov(centred.T))
    held = variances.clip(0) + WHITENING * variances.mean() + 1e-6  # constant images have no variance at all
    whiten = directions / np.sqrt(held) @ directions.T
    chosen = centred[random.permutation(count)[:FILTERS]] @ whiten
    filters = _unit(chosen) @ whiten
    filters /= (centred @ filters.T).std(axis=0)[:, None] + 1e-6
    biases = -filters @ mean - THRESHOLD
    return _Layer(
        shrink,
        filters.reshape(-1, channels, patch, patch).astype(np.float32),
        biases.astype(np.float32),
    )


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    scaled: NDArray[np.float64] = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-9)
    return scaled


def _patches(split: Split, shrink: int, random: np.random.Generator) -> NDArray[np.float64]:
    """float64 [_PATCHES, C, p, p] from random places of random images, averaged down as the graph does."""
    images = split.batch(np.sort(random.permutation(len(split))[:_SOURCES])).astype(np.float64)
    count, channels, size, _ = images.shape
    side = size // shrink
    kept = images[:, :, : side * shrink, : side * shrink]
    small = kept.reshape(count, channels, side, shrink, side, shrink).mean(axis=(3, 5))
    patch = min(PATCH, side)
    windows = np.lib.stride_tricks.sliding_window_view(small, (patch, patch), axis=(2, 3))
    rows = random.integers(count, size=_PATCHES)
    down, across = random.integers(side - patch + 1, size=(2, _PATCHES))
    taken: NDArray[np.float64] = windows[rows, :, down, across]
    return taken


def _regression(
    train: Floats, labels: NDArray[Any], val: Floats, data: Dataset
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Weights [K, F] and biases [K] on unscaled features, and the strength they were fitted with."""
    mean, scale = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    scale = np.maximum(scale, 1e-2 * scale.mean() + 1e-6)  # a feature that hardly moves gets no large weight
    standard = ((train - mean) / scale).astype(np.float32)
    found = []
    for strength in STRENGTHS:
        weights, biases = _logistic(standard, labels, strength, data)
        weights = weights / scale
        biases = biases - weights @ mean
        judged = metrics.evaluate(data.val.labels, _served(val, weights, biases, data.task), data.task)
        found.append((judged.get("log_loss", 0.0), strength, weights, biases))
    _, strength, weights, biases = min(found, key=lambda entry: entry[:2])
    return weights, biases, strength


def _logistic(
    features: Floats, labels: NDArray[Any], strength: float, data: Dataset
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits of every class; of a binary task 0 and scikit-learn's own, which the softmax makes the same of."""
    if data.task == "multilabel":
        every = [_one_label(features, labels[:, k], strength) for k in range(len(data.class_names))]
        return np.stack([weights for weights, _ in every]), np.array([bias for _, bias in every])
    weights, biases = _fit(features, labels, strength)
    if len(biases) == 1:
        return np.concatenate([np.zeros_like(weights), weights]), np.array([0.0, biases[0]])
    return weights, biases


def _one_label(features: Floats, labels: NDArray[Any], strength: float) -> tuple[NDArray[np.float64], float]:
    """One against the rest, on the samples where it was measured; the mere frequency where it never varies."""
    known = labels >= 0
    if len(np.unique(labels[known])) < 2:
        positives = float((labels == 1).sum()) + 0.5
        return np.zeros(features.shape[1]), float(np.log(positives / (known.sum() + 1.0 - positives)))
    weights, biases = _fit(features[known], labels[known], strength)
    return weights[0], float(biases[0])


def _fit(
    features: Floats, labels: NDArray[Any], strength: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # STEPS are all it is given
        model = LogisticRegression(C=strength, max_iter=STEPS).fit(features, labels)
    return model.coef_.astype(np.float64), model.intercept_.astype(np.float64)


def _served(features: Floats, weights: NDArray[np.float64], biases: NDArray[np.float64], task: str) -> Floats:
    from scipy.special import expit, softmax

    logits = features @ weights.T + biases
    shares = expit(logits) if task == "multilabel" else softmax(logits, axis=1)
    return shares.astype(np.float32)  # type: ignore[no-any-return]


def _feature_part(layer: _Layer, size: int) -> tuple[list[Any], dict[str, Floats]]:
    """Nodes from `images` to `features`, and their tensors."""
    from onnx import TensorProto, helper

    side = size // layer.shrink - layer.filters.shape[2] + 1
    grid = min(GRID, side)
    stride = side // grid
    window = side - stride * (
        grid - 1
    )  # the windows cover everything, overlapping where they do not divide it
    nodes = [
        helper.make_node("Cast", [INPUT], ["pixels"], "cast", to=TensorProto.FLOAT),
        helper.make_node(
            "AveragePool", ["pixels"], ["small"], "shrink", **_windows(layer.shrink, layer.shrink)
        ),
        helper.make_node("Conv", ["small", "filters", "thresholds"], ["matches"], "filters"),
        helper.make_node("Relu", ["matches"], ["rectified"], "rectify"),
        helper.make_node("AveragePool", ["rectified"], ["pooled"], "pool", **_windows(window, stride)),
        helper.make_node("Flatten", ["pooled"], [FEATURES], "flatten"),
    ]
    return nodes, {"filters": layer.filters, "thresholds": layer.biases}


def _windows(side: int, stride: int) -> dict[str, Any]:
    return {"kernel_shape": [side, side], "strides": [stride, stride]}


def _with_answer(
    nodes: list[Any],
    tensors: dict[str, Floats],
    weights: NDArray[np.float64],
    biases: NDArray[np.float64],
    task: str,
) -> tuple[list[Any], dict[str, Floats]]:
    from onnx import helper

    answer = (
        helper.make_node("Sigmoid", ["logits"], [OUTPUT], "answer")
        if task == "multilabel"
        else helper.make_node("Softmax", ["logits"], [OUTPUT], "answer", axis=1)
    )
    linear = helper.make_node("Gemm", [FEATURES, "weights", "biases"], ["logits"], "linear", transB=1)
    own = {"weights": weights.astype(np.float32), "biases": biases.astype(np.float32)}
    return [*nodes, linear, answer], tensors | own


def _graph(nodes: list[Any], tensors: dict[str, Floats], data: Dataset, output: str) -> onnx.ModelProto:
    """The nodes as a graph from uint8 [batch, C, S, S] to float32 [batch, width] of `output`."""
    from onnx import TensorProto, helper, numpy_helper, shape_inference

    size, channels = data.preprocessing.image_size, data.preprocessing.channels
    graph = helper.make_graph(
        nodes,
        "random_features",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", channels, size, size])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", None])],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    inferred: onnx.ModelProto = shape_inference.infer_shapes(model, strict_mode=True)
    del inferred.graph.value_info[:]
    return inferred


def _extractor(graph: onnx.ModelProto) -> Callable[[Split, NDArray[np.intp]], Floats]:
    """Features of some rows of a split, float32 [n, F], a few images at a time."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = cores.usable()
    session = ort.InferenceSession(graph.SerializeToString(), settings, providers=["CPUExecutionProvider"])

    def extract(split: Split, rows: NDArray[np.intp]) -> Floats:
        parts = [
            session.run([FEATURES], {INPUT: split.batch(rows[start : start + _BATCH])})[0]
            for start in range(0, len(rows), _BATCH)
        ]
        return np.concatenate(parts)

    return extract


BASELINES: dict[str, Callable[[Dataset, int], Fitted]] = {"random_features": random_features}
