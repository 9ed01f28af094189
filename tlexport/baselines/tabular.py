"""Tables: a linear model on one-hot categories and scaled numbers, and gradient boosted trees."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tlexport.baselines.fitted import Fitted, checked
from tlexport.errors import NotInstalledError
from tlexport.modalities.dataset import Dataset

if TYPE_CHECKING:
    import onnx

INPUT = "features"
MISSING = -1e6  # a code that no category has
OPSET = {"": 18, "ai.onnx.ml": 3}
_TREES = {"learning_rate": 0.05, "num_leaves": 31, "min_child_samples": 20}
_ROUNDS, _PATIENCE = 1000, 50


def linear(data: Dataset, seed: int) -> Fitted:
    """Logistic or ridge regression: medians and a flag for missing numbers, scaling, one-hot categories."""
    from sklearn.linear_model import LogisticRegression, Ridge

    started = time.monotonic()
    regression = data.task == "regression"
    estimator = Ridge() if regression else LogisticRegression(max_iter=2000)
    model = _pipeline(data, estimator)
    model.fit(data.train.inputs, data.train.labels)
    val, test = (_served(model, split.inputs, regression) for split in (data.val, data.test))
    graph, why_not = _converted(model, data, val)
    kind = "ridge regression" if regression else "logistic regression"
    return Fitted(
        name="ridge" if regression else "logistic_regression",
        description=f"{kind} on scaled numbers and one-hot categories, missing numbers as medians with a flag",
        val=val,
        test=test,
        graph=graph,
        inputs=(INPUT,),
        why_not=why_not,
        seconds=time.monotonic() - started,
    )


def lightgbm(data: Dataset, seed: int) -> Fitted:
    """Gradient boosted trees with early stopping on val. Raises NotInstalledError without LightGBM."""
    if importlib.util.find_spec("lightgbm") is None:
        raise NotInstalledError(
            "LightGBM, the trees that stand beside", "tabular", "baselines=[linear] goes without"
        )
    import lightgbm as library

    started = time.monotonic()
    regression = data.task == "regression"
    kind: Any = library.LGBMRegressor if regression else library.LGBMClassifier
    model = kind(n_estimators=_ROUNDS, random_state=seed, n_jobs=-1, verbose=-1, deterministic=True, **_TREES)
    labels = data.train.labels[:, 0] if regression else data.train.labels
    judged = data.val.labels[:, 0] if regression else data.val.labels
    stop = library.early_stopping(_PATIENCE, verbose=False)
    model.fit(data.train.inputs, labels, eval_X=data.val.inputs, eval_y=judged, callbacks=[stop])
    _floor_thresholds(model)
    val, test = (_served(model, split.inputs, regression) for split in (data.val, data.test))
    graph, why_not = _converted(model, data, val)
    settings = ", ".join(f"{key} {value}" for key, value in _TREES.items())
    return Fitted(
        name="lightgbm",
        description=f"LightGBM, {model.best_iteration_ or _ROUNDS} trees ({settings}, early stopping on val)",
        val=val,
        test=test,
        graph=graph,
        inputs=(INPUT,),
        why_not=why_not,
        seconds=time.monotonic() - started,
    )


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


def _served(model: Any, inputs: np.ndarray, regression: bool) -> np.ndarray:
    if regression:
        return np.asarray(model.predict(inputs), np.float32).reshape(len(inputs), -1)
    return np.asarray(model.predict_proba(inputs), np.float32)


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
