"""Series: the forecasts a trading desk already has. HAR, EWMA and GARCH for a variance; majority and momentum for a
direction; logistic regression on HAR terms for an event.

Each takes the same windows of raw prices as the network. All but GARCH are graphs: what they see of a window is computed by
one small graph (`_terms`), in fitting and in serving.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport.baselines.fitted import Fitted, checked
from tlexport.errors import NotInstalledError
from tlexport.modalities.series_windows import LEAST_VARIANCE, SeriesData, Split, Windows

if TYPE_CHECKING:
    import onnx

Floats = NDArray[np.float64]

INPUT = "prices"
TERMS = (1, 5, 22)  # days: Corsi 2009, J. Financial Econometrics 7, eq. 4
DECAY = 0.94  # of daily data: RiskMetrics Technical Document 1996, table 5.5
CHECKED = 2048  # validation samples that a graph has to answer as the library did
_ROWS = 4096
_OPSET = 18


def har(data: SeriesData, seed: int) -> Fitted:
    """Least squares of the log variance on its daily, weekly and monthly means, over all assets; unbiased by smearing."""
    started = time.monotonic()
    front = _terms(data.preprocessing, "logs")
    train = _answers(front, data.train)
    design = np.column_stack([np.ones(len(train)), train])
    weights = np.linalg.lstsq(design, np.log(data.train.labels[:, 0].astype(np.float64)), rcond=None)[0]
    # Duan 1983: the mean of y over exp(fitted log y).
    weights[0] += np.log(np.mean(data.train.labels[:, 0] / np.exp(design @ weights)))
    graph = _linear(front, weights[1:, None], weights[:1], "Exp", "values")
    return _fitted("har", _sentence("log-HAR", weights), graph, data, started)


def ewma(data: SeriesData, seed: int) -> Fitted:
    """Exponentially weighted mean of the window's daily variances; nothing is fitted."""
    started = time.monotonic()
    front = _terms(data.preprocessing, "variances")
    width = data.preprocessing.window - 1
    weights = DECAY ** np.arange(width)[::-1]
    graph = _linear(front, (weights / weights.sum())[:, None], np.zeros(1), "Identity", "values")
    return _fitted("ewma", f"EWMA of daily variances, decay {DECAY}", graph, data, started)


def garch(data: SeriesData, seed: int) -> Fitted:
    """GARCH(1,1) (Bollerslev 1986) of each asset's changes of the close, fitted on its training days.

    It forecasts the close's variance; one factor over all assets, from train, brings that to the label's kind of variance.
    Raises NotInstalledError without `arch`.
    """
    if importlib.util.find_spec("arch") is None:
        raise NotInstalledError("arch, which fits GARCH", "series", "baselines=[har, ewma] goes without")
    started = time.monotonic()
    known = {
        asset: _garch_of(data.train, asset, data.preprocessing) for asset in np.unique(data.train.assets)
    }
    fallback = np.median(list(known.values()), axis=0)
    train, val, test = (
        _garch_forecasts(split, known, fallback, data.preprocessing)
        for split in (data.train, data.val, data.test)
    )
    factor = float(np.mean(data.train.labels[:, 0] / train))
    return Fitted(
        name="garch",
        description=f"GARCH(1,1) of each of {len(known)} assets, times {factor:.3f} to match the label's variance",
        val=(factor * val).astype(np.float32)[:, None],
        test=(factor * test).astype(np.float32)[:, None],
        graph=None,
        inputs=(INPUT,),
        why_not="each asset has parameters of its own, and the graph's input does not name the asset",
        seconds=time.monotonic() - started,
    )


def majority(data: SeriesData, seed: int) -> Fitted:
    """The training split's share of each class, whatever the prices."""
    started = time.monotonic()
    shares = np.bincount(data.train.labels, minlength=2) / len(data.train)
    front = _terms(data.preprocessing, "logs")
    graph = _linear(
        front, np.zeros((len(TERMS), 2)), np.log(np.maximum(shares, 1e-9)), "Softmax", "probabilities"
    )
    return _fitted(
        "majority", f"the training split's shares: {shares[1]:.3f} are class 1", graph, data, started
    )


def momentum(data: SeriesData, seed: int) -> Fitted:
    """Logistic regression on the last day's, week's and month's change, in the window's standard deviations."""
    return _logistic(data, "momentum", "moves", "past changes of a day, a week and a month")


def har_logistic(data: SeriesData, seed: int) -> Fitted:
    """Logistic regression on the daily, weekly and monthly means of the log variance, and the window's."""
    return _logistic(
        data, "har_logistic", "events", "HAR terms: mean log variance of a day, a week, a month, the window"
    )


def _logistic(data: SeriesData, name: str, kind: str, what: str) -> Fitted:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    started = time.monotonic()
    front = _terms(data.preprocessing, kind)
    train = _answers(front, data.train)
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(max_iter=1000).fit(scaler.transform(train), data.train.labels)
    slope = model.coef_[0] / scaler.scale_
    offset = float(model.intercept_[0] - slope @ scaler.mean_)
    weights = np.stack([np.zeros_like(slope), slope], axis=1)
    graph = _linear(front, weights, np.array([0.0, offset]), "Softmax", "probabilities")
    return _fitted(name, f"logistic regression on {what}", graph, data, started)


def _terms(windows: Windows, kind: str) -> onnx.ModelProto:
    """float32 prices [n, W, C] -> `x` [n, T] of a window.

    variances: each day's but the first; logs: means of their logarithms over TERMS; events: these and the whole window's;
    moves: changes of the close over TERMS, in standard deviations of the window.
    """
    import onnx.parser

    width, place = windows.window, {name: index for index, name in enumerate(windows.channels)}
    joined, columns = {
        "variances": ("x = Identity(variance)", width - 1),
        "logs": (f"x = Concat<axis = 1>({_each('mean')})", len(TERMS)),
        "events": (f"x = Concat<axis = 1>({_each('mean')}, level)", len(TERMS) + 1),
        "moves": (f"sums = Concat<axis = 1>({_each('move')})\n x = Div(sums, deviation)", len(TERMS)),
    }[kind]
    averages = "\n".join(
        f"""log{n} = Slice(log, last{n}, end, one)
        mean{n} = ReduceMean<keepdims = 1>(log{n}, one)
        step{n} = Slice(step, last{n}, end, one)
        move{n} = ReduceSum<keepdims = 1>(step{n}, one)"""
        for n in TERMS
    )
    text = f"""
    <ir_version: 9, opset_import: ["" : {_OPSET}]>
    terms (float[batch, {width}, {len(place)}] {INPUT}) => (float[batch, {columns}] x)
    <int64 close = {{{place["close"]}}}, int64 high = {{{place.get("high", 0)}}}, int64 low = {{{place.get("low", 0)}}},
     float parkinson = {{{1 / (4 * np.log(2)):.9g}}}, float least = {{{LEAST_VARIANCE}}}, float half = {{0.5}},
     int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] minus = {{-1}}, int64[1] end = {{{width}}},
     {", ".join(f"int64[1] last{n} = {{{-n}}}" for n in TERMS)}>
    {{
        closes = Gather<axis = 2>({INPUT}, close)
        before = Slice(closes, zero, minus, one)
        after = Slice(closes, one, end, one)
        ratio = Div(after, before)
        step = Log(ratio)
        {_PARKINSON if "high" in place else "raw = Mul(step, step)"}
        variance = Max(raw, least)
        log = Log(variance)
        level = ReduceMean<keepdims = 1>(log, one)
        halved = Mul(level, half)
        deviation = Exp(halved)
        {averages}
        {joined}
    }}"""
    return _pruned(onnx.parser.parse_model(text))


# Of every day but the first, for which a change of the close is not known.
_PARKINSON = f"""later = Slice({INPUT}, one, end, one)
        top = Gather<axis = 2>(later, high)
        bottom = Gather<axis = 2>(later, low)
        reach = Div(top, bottom)
        range = Log(reach)
        square = Mul(range, range)
        raw = Mul(square, parkinson)"""


def _each(name: str) -> str:
    return ", ".join(f"{name}{n}" for n in TERMS)


def _pruned(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the nodes and constants that lead to no output."""
    wanted = {output.name for output in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    constants = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(kept))
    model.graph.initializer.extend(constants)
    return model


def _linear(front: onnx.ModelProto, weights: Floats, bias: Floats, link: str, output: str) -> onnx.ModelProto:
    """`front`, then x @ weights [T, K] + bias [K], then the operator `link`, served as `output`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    made = onnx.ModelProto()
    made.CopyFrom(front)
    made.graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), name)
        for name, array in (("w", weights), ("b", bias))
    )
    product = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="linear")
    made.graph.node.extend([product, helper.make_node(link, ["y"], [output])])
    del made.graph.output[:]
    made.graph.output.append(
        helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", weights.shape[1]])
    )
    return made


def _answers(graph: onnx.ModelProto, split: Split) -> NDArray[np.float64]:
    """[n, ...] of the graph's only output, some thousand windows at a time."""
    import onnxruntime as ort

    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    parts = [
        session.run(None, {INPUT: split.batch(np.arange(start, min(start + _ROWS, len(split))))})[0]
        for start in range(0, len(split), _ROWS)
    ]
    return np.concatenate(parts).astype(np.float64)


def _fitted(name: str, description: str, graph: onnx.ModelProto, data: SeriesData, started: float) -> Fitted:
    val, test = (_answers(graph, split).astype(np.float32) for split in (data.val, data.test))
    few = np.arange(min(len(data.val), CHECKED))
    content, why_not = checked(graph, data, data.val.batch(few), INPUT, val[few])
    return Fitted(
        name=name,
        description=description,
        val=val,
        test=test,
        graph=content,
        inputs=(INPUT,),
        why_not=why_not,
        seconds=time.monotonic() - started,
    )


def _sentence(kind: str, weights: Floats) -> str:
    terms = ", ".join(f"{w:.3f} x {n} d" for w, n in zip(weights[1:], TERMS, strict=True))
    return f"{kind} over all assets: {terms}"


def _garch_of(train: Split, asset: str, windows: Windows) -> Floats:
    """omega, alpha, beta of an asset's daily changes, per cent squared, on the days its training windows cover."""
    from arch import arch_model

    starts = train.inputs[train.assets == asset]
    close = train.bars[starts.min() : starts.max() + windows.window, windows.channels.index("close")]
    changes = 100 * np.diff(np.log(close.astype(np.float64)))
    found = arch_model(changes, mean="Zero", vol="GARCH", p=1, q=1, rescale=False).fit(
        disp="off", show_warning=False
    )
    return np.asarray(found.params.to_numpy(), np.float64)


def _garch_forecasts(split: Split, known: dict[str, Floats], fallback: Floats, windows: Windows) -> Floats:
    """float64 [n]: mean daily variance over the horizon, the recursion run through each window from its own variance."""
    omega, alpha, beta = np.stack([known.get(asset, fallback) for asset in split.assets], axis=1)
    found = np.empty(len(split))
    for start in range(0, len(split), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(split)))
        close = split.batch(rows)[:, :, windows.channels.index("close")].astype(np.float64)
        changes = 100 * np.diff(np.log(close), axis=1)
        variance = changes.var(axis=1)
        for day in range(changes.shape[1]):
            variance = omega[rows] + alpha[rows] * changes[:, day] ** 2 + beta[rows] * variance
        total = variance.copy()
        for _ in range(windows.horizon - 1):
            variance = omega[rows] + (alpha + beta)[rows] * variance
            total += variance
        found[rows] = total / windows.horizon / 1e4
    return np.maximum(found, LEAST_VARIANCE)


BASELINES: dict[str, Callable[[Any, int], Fitted]] = {
    "har": har,
    "ewma": ewma,
    "garch": garch,
    "majority": majority,
    "momentum": momentum,
    "har_logistic": har_logistic,
}
_FOR = {"variance": ("har", "ewma", "garch"), "direction": ("majority", "momentum")}


def offered(windows: Windows) -> dict[str, Callable[[Any, int], Fitted]]:
    """The baselines that forecast this target."""
    return {name: BASELINES[name] for name in _FOR.get(windows.target, ("majority", "har_logistic"))}
