"""Molecules: a random forest on Morgan fingerprints, the plain model of MoleculeNet (Wu et al., Chem. Sci. 2018, 9, 513)."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport import cores
from tlexport.baselines.fitted import Fitted, checked
from tlexport.modalities.dataset import Dataset

if TYPE_CHECKING:
    import onnx

INPUT = "fingerprint"
TREES, TREES_A_LABEL = 500, 100
OPSET = {"": 18, "ai.onnx.ml": 3}

Floats = NDArray[np.float32]


def forest(data: Dataset, seed: int) -> Fitted:
    """A random forest on the fingerprint's bits; for several labels one each, grown on the molecules it was measured of."""
    started = time.monotonic()
    made = _grown(data, seed)
    val, test = (_served(made, split.inputs[INPUT], data.task) for split in (data.val, data.test))
    graph, why_not = _converted(made, data, val)
    trees = f"{TREES_A_LABEL} trees a label" if data.task == "multilabel" else f"{TREES} trees"
    bits = data.train.inputs[INPUT].shape[1]
    return Fitted(
        name="forest",
        description=f"random forest, {trees}, on a Morgan fingerprint (radius {data.preprocessing.radius}, {bits} bits)",
        val=val,
        test=test,
        graph=graph,
        inputs=(INPUT,),
        why_not=why_not,
        seconds=time.monotonic() - started,
    )


def _grown(data: Dataset, seed: int) -> list[Any]:
    """One forest, or one a label."""
    from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

    bits, labels = _bits(data.train.inputs[INPUT]), data.train.labels
    settings = {"random_state": seed, "n_jobs": cores.usable()}
    if data.task == "regression":
        values = labels[:, 0] if labels.shape[1] == 1 else labels
        return [RandomForestRegressor(TREES, **settings).fit(bits, values)]
    if data.task != "multilabel":
        return [RandomForestClassifier(TREES, **settings).fit(bits, labels)]
    measured = labels >= 0
    return [
        RandomForestClassifier(TREES_A_LABEL, **settings).fit(bits[known], column[known])
        for column, known in zip(labels.T, measured.T, strict=True)
    ]


def _bits(fingerprint: NDArray[np.uint8]) -> Floats:
    """Whether a substructure is there, however often."""
    return (fingerprint > 0).astype(np.float32)


def _served(made: list[Any], fingerprint: NDArray[np.uint8], task: str) -> Floats:
    bits = _bits(fingerprint)
    if task == "regression":
        return np.asarray(made[0].predict(bits), np.float32).reshape(len(bits), -1)
    if task != "multilabel":
        return np.asarray(made[0].predict_proba(bits), np.float32)
    return np.stack([_of_positive(model, bits) for model in made], axis=1)


def _of_positive(model: Any, bits: Floats) -> Floats:
    """[n] of the label 1; a label that was measured but never 1 in train has no such column."""
    shares = model.predict_proba(bits)
    classes = model.classes_.tolist()
    return np.asarray(shares[:, classes.index(1)] if 1 in classes else np.zeros(len(bits)), np.float32)


def _converted(made: list[Any], data: Dataset, val: Floats) -> tuple[bytes | None, str]:
    """One graph of all forests, if the converter is there and it answers alike."""
    if importlib.util.find_spec("skl2onnx") is None:
        return None, "its ONNX converter is not installed; pip install 'tlexport[molecule]'"
    if any(hasattr(model, "classes_") and len(model.classes_) < 2 for model in made):
        return None, "a label has the same value in all of train"
    fingerprint = data.val.inputs[INPUT]
    parts = [_part(model, fingerprint.shape[1]) for model in made]
    output = "values" if data.task == "regression" else "probabilities"
    graph = _joined(parts, data.task == "multilabel", output, (fingerprint.shape[1], val.shape[1]))
    return checked(graph, data, np.ascontiguousarray(fingerprint), INPUT, val)


def _part(model: Any, bits: int) -> onnx.ModelProto:
    """One forest: bits float32 [n, bits] in; probabilities, or values, are the last output."""
    from skl2onnx import to_onnx
    from skl2onnx.common.data_types import FloatTensorType

    graph: onnx.ModelProto = to_onnx(
        model,
        initial_types=[("bits", FloatTensorType([None, bits]))],
        options={id(model): {"zipmap": False}} if hasattr(model, "classes_") else None,
        target_opset=OPSET,
    )
    return graph


def _joined(
    parts: list[onnx.ModelProto], several: bool, output: str, widths: tuple[int, int]
) -> onnx.ModelProto:
    """fingerprint uint8 [batch, bits] -> what the only part answers, or the column of label 1 of each of `several`."""
    from onnx import TensorProto, compose, helper, numpy_helper

    nodes = [
        helper.make_node("Cast", [INPUT], ["counts"], to=TensorProto.FLOAT),
        helper.make_node("Greater", ["counts", "none"], ["present"]),
        helper.make_node("Cast", ["present"], ["bits"], to=TensorProto.FLOAT),
    ]
    constants = [numpy_helper.from_array(np.zeros(1, np.float32), "none")]
    answers = []
    for number, part in enumerate(parts):
        graph = compose.add_prefix(part, f"forest{number}_").graph
        for node in graph.node:
            node.input[:] = ["bits" if name == graph.input[0].name else name for name in node.input]
        nodes += graph.node
        constants += graph.initializer
        answers.append(graph.output[-1].name)
    if several:
        constants.append(numpy_helper.from_array(np.ones(1, np.int64), "positive"))
        nodes += [helper.make_node("Gather", [name, "positive"], [f"{name}_1"], axis=1) for name in answers]
        nodes.append(helper.make_node("Concat", [f"{name}_1" for name in answers], [output], axis=1))
    else:
        nodes.append(helper.make_node("Identity", answers, [output]))
    graph = helper.make_graph(
        nodes,
        "forest",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["batch", widths[0]])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", widths[1]])],
        constants,
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in OPSET.items()]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model


BASELINES: dict[str, Callable[[Dataset, int], Fitted]] = {"forest": forest}
