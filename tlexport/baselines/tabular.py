"""Tables: a linear model on one-hot categories and scaled numbers, and gradient boosted trees."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport import cores
from tlexport.baselines.fitted import Fitted, checked
from tlexport.errors import NotInstalledError
from tlexport.modalities.dataset import UNKNOWN, Dataset, Split

if TYPE_CHECKING:
    import onnx

INPUT = "features"
MISSING = -1e6  # a code that no category has
OPSET = {"": 18, "ai.onnx.ml": 3}
_TREES = {"learning_rate": 0.05, "num_leaves": 31, "min_child_samples": 20}
_ROUNDS, _PATIENCE = 1000, 50
_SMALL = 500_000  # cells


def linear(data: Dataset, seed: int) -> Fitted:
    """Logistic or ridge regression: medians and a flag for missing numbers, scaling, one-hot categories."""
    from sklearn.linear_model import LogisticRegression, Ridge

    started = time.monotonic()
    regression = data.task == "regression"

    def fitted(label: int | None) -> Any:
        estimator = Ridge() if regression else LogisticRegression(max_iter=2000)
        return _pipeline(data, estimator).fit(*_rows(data.train, label))

    kind = "ridge regression" if regression else "logistic regression"
    return _fitted(
        "ridge" if regression else "logistic_regression",
        lambda _: f"{kind} on scaled numbers and one-hot categories, missing numbers as medians with a flag",
        fitted,
        data,
        apart=data.task == "multilabel",
        started=started,
    )


def lightgbm(data: Dataset, seed: int) -> Fitted:
    """Gradient boosted trees with early stopping on val. Raises NotInstalledError without LightGBM."""
    if importlib.util.find_spec("lightgbm") is None:
        raise NotInstalledError(
            "LightGBM, the trees that stand beside", "tabular", "baselines=[linear] goes without"
        )
    import lightgbm as library

    started = time.monotonic()
    kind: Any = library.LGBMRegressor if data.task == "regression" else library.LGBMClassifier
    # On a small table threads wait for each other longer than they compute.
    threads = cores.usable() if data.train.inputs.size > _SMALL else 1
    settings = {"random_state": seed, "n_jobs": threads, "verbose": -1, "deterministic": True, **_TREES}

    def fitted(label: int | None) -> Any:
        model = kind(n_estimators=_ROUNDS, **settings)
        inputs, labels = _rows(data.val, label)
        stop = library.early_stopping(_PATIENCE, verbose=False)
        model.fit(*_rows(data.train, label), eval_X=inputs, eval_y=labels, callbacks=[stop])
        _floor_thresholds(model)
        return model

    def described(models: list[Any]) -> str:
        trees = sum(getattr(model, "best_iteration_", None) or _ROUNDS for model in models)
        shown = ", ".join(f"{key} {value}" for key, value in _TREES.items())
        return f"LightGBM, {trees} trees ({shown}, early stopping on val)"

    columns = data.train.labels.shape[1:]
    return _fitted("lightgbm", described, fitted, data, apart=columns not in ((), (1,)), started=started)


def _fitted(
    name: str,
    described: Callable[[list[Any]], str],
    fitted: Callable[[int | None], Any],
    data: Dataset,
    *,
    apart: bool,
    started: float,
) -> Fitted:
    """The model of all labels, or, where they are taken `apart`, one of each; only a single model has a graph."""
    if apart:
        models = [
            fitted(label) if _varies(data, label) else _frequency(data, label)
            for label in range(data.train.labels.shape[1])
        ]
        val, test = (
            np.concatenate([_served(model, split.inputs, data.task) for model in models], axis=1)
            for split in (data.val, data.test)
        )
        graph, why_not = None, "it is one model a label, and only a single one becomes a graph"
    else:
        models = [fitted(None)]
        val, test = (_served(models[0], split.inputs, data.task) for split in (data.val, data.test))
        graph, why_not = _converted(models[0], data, val)
    return Fitted(
        name=name,
        description=described(models),
        val=val,
        test=test,
        graph=graph,
        inputs=(INPUT,),
        why_not=why_not,
        seconds=time.monotonic() - started,
    )


def _rows(split: Split, label: int | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs and labels; of one label or value where it was measured. A single value comes without its dimension."""
    labels = split.labels if label is None else split.labels[:, label]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    known = labels != UNKNOWN if labels.dtype == np.int8 else np.ones(len(labels), bool)
    return split.inputs[known], labels[known]


def _varies(data: Dataset, label: int) -> bool:
    """Whether there is anything to learn of a label, and anything to stop by."""
    return len(np.unique(_rows(data.train, label)[1])) > 1 and len(_rows(data.val, label)[1]) > 0


def _frequency(data: Dataset, label: int) -> Any:
    from sklearn.dummy import DummyClassifier, DummyRegressor

    model = DummyRegressor() if data.task == "regression" else DummyClassifier(strategy="prior")
    inputs, labels = _rows(data.train, label)
    return model.fit(inputs, labels) if len(labels) else model.fit(data.train.inputs[:1], [0])


def _floor_thresholds(model: Any) -> None:
    """Thresholds as float32, rounded down, in place.

    A float32 cell is at most a threshold exactly if it is at most the next float32 below, so no answer changes here; in
    an ONNX graph, where thresholds are float32, rounding to the nearest one would send some rows the other way.
    """
    import lightgbm as library

    lines = model.booster_.model_to_string().splitlines()
    for index, line in enumerate(lines):
        if line.startswith("threshold="):
            exact = np.array(line.removeprefix("threshold=").split(), np.float64)
            near = exact.astype(np.float32)
            floored = np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)
            lines[index] = "threshold=" + " ".join(repr(float(value)) for value in floored)
    text = "\n".join(line for line in lines if not line.startswith("tree_sizes="))
    model._Booster = library.Booster(model_str=text + "\n")


def _pipeline(data: Dataset, estimator: Any) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    kinds = [column.kind for column in data.preprocessing.columns]
    numeric, categorical = (
        [i for i, kind in enumerate(kinds) if kind == of] for of in ("numeric", "categorical")
    )
    known = [sorted({*data.preprocessing.columns[i].codes(), MISSING}) for i in categorical]
    parts: list[Any] = []
    if numeric:
        fill = SimpleImputer(strategy="median", keep_empty_features=True)
        parts.append(("numbers", make_pipeline(fill, StandardScaler()), numeric))
    if categorical:
        # A missing category is one of its own.
        fill = SimpleImputer(strategy="constant", fill_value=MISSING)
        encode = OneHotEncoder(categories=known, handle_unknown="ignore", sparse_output=False)
        parts.append(("categories", make_pipeline(fill, encode), categorical))
    return make_pipeline(ColumnTransformer(parts), estimator)


def _served(model: Any, inputs: NDArray[Any], task: str) -> NDArray[np.float32]:
    """float32 [n, K]: values, probabilities of the classes, or [n, 1] of one label of several."""
    if task == "regression":
        return np.asarray(model.predict(inputs), np.float32).reshape(len(inputs), -1)
    shares = np.asarray(model.predict_proba(inputs), np.float32)
    if task != "multilabel":
        return shares
    positive = [index for index, known in enumerate(model.classes_) if known == 1]
    return shares[:, positive] if positive else np.zeros((len(inputs), 1), np.float32)


def _converted(model: Any, data: Dataset, val: np.ndarray) -> tuple[bytes | None, str]:
    """The model as ONNX, if the converters are there and it answers alike."""
    if any(importlib.util.find_spec(name) is None for name in ("skl2onnx", "onnxmltools")):
        return None, "its ONNX converters are not installed; pip install 'tlexport[tabular]'"
    from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm
    from skl2onnx import to_onnx, update_registered_converter
    from skl2onnx.common.data_types import FloatTensorType
    from skl2onnx.common.shape_calculator import (
        calculate_linear_classifier_output_shapes,
        calculate_linear_regressor_output_shapes,
    )

    if type(model).__module__.startswith("lightgbm"):
        regression = data.task == "regression"
        shapes = (
            calculate_linear_regressor_output_shapes
            if regression
            else calculate_linear_classifier_output_shapes
        )
        options = None if regression else {"zipmap": [False, True, "columns"], "nocl": [True, False]}
        update_registered_converter(
            type(model), f"LightGbm{type(model).__name__}", shapes, convert_lightgbm, options=options
        )
    settings = None if data.task == "regression" else {id(model): {"zipmap": False}}
    width = data.train.inputs.shape[1]
    graph = to_onnx(
        model, initial_types=[(INPUT, FloatTensorType([None, width]))], options=settings, target_opset=OPSET
    )
    return checked(
        _tidied(graph, "values" if data.task == "regression" else "probabilities", val.shape[1]),
        data,
        data.val.inputs,
        INPUT,
        val,
    )


def _tidied(graph: onnx.ModelProto, output: str, width: int) -> onnx.ModelProto:
    """One output of the name that every model of ours has, its batch free."""
    import onnx

    kept = graph.graph.output[-1]
    old = kept.name
    del graph.graph.output[:]
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, ["batch", width])
    )
    for node in graph.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = output
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    return graph


BASELINES: dict[str, Callable[[Dataset, int], Fitted]] = {"linear": linear, "lightgbm": lightgbm}
