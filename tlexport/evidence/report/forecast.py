"""How good values are, before and after: forecasts over time, predicted against actual, errors and their tails."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from tlexport.evidence.report import markup, scores
from tlexport.evidence.report.accuracy import VERIFY, files
from tlexport.evidence.report.document import Answers, Document
from tlexport.evidence.report.figures import curves
from tlexport.evidence.report.markup import Cell, Section

DRAWN = 1500  # samples in a scatter
SPANS = 60  # of time
VALUES = 3  # of several, the first


def forecasts(document: Document) -> Section:
    answers = document.answers
    if answers is None or answers.task != "regression":
        return Section("forecasts", "Forecasts and errors", "")
    kinds = {name: document.kinds[name] for name in (document.reference, *document.compared)}
    content = markup.legend(kinds) if answers.times is None else ""
    for k, value in enumerate(answers.classes[:VALUES]):
        content += f"<h3>{escape(value)}</h3>" if len(answers.classes) > 1 else ""
        content += _one(document, answers, k, kinds)
    if len(answers.classes) > VALUES:
        content += markup.paragraph(
            f"The first {VALUES} of {len(answers.classes)} values are drawn.", "quiet"
        )
    content += _tails(document) + _diebold_mariano(document)
    times = ("reference/times.npy",) if answers.times is not None else ()
    return Section("forecasts", "Forecasts and errors", content, (*files(document), *times, VERIFY))


def _one(document: Document, answers: Answers, k: int, kinds: Mapping[str, str]) -> str:
    """All figures of one value."""
    actual = answers.labels[:, k].astype(np.float64)
    made = {document.reference: answers.reference[:, k].astype(np.float64)}
    made |= {name: outputs[:, k].astype(np.float64) for name, outputs in document.compared.items()}
    rows = scores.drawn_rows(len(actual), DRAWN)
    panels = [
        markup.figure(
            curves.scatter(
                list(zip(actual[rows].tolist(), values[rows].tolist(), strict=True)),
                kinds[name], across="actual", up=f"{name}: predicted", label=f"predicted against actual, {name}",
            ),
            f"{name}: a dot a test sample, {len(rows)} of {len(actual)}; on the dashed line the prediction is exact.",
        )
        for name, values in made.items()
    ]  # fmt: skip
    for name in document.compared:
        points = scores.quantiles(made[document.reference] - actual, made[name] - actual)
        drawn = curves.scatter(
            points,
            kinds[name],
            across="reference: error",
            up=f"{name}: error",
            label=f"quantiles of the errors, {name}",
        )
        panels.append(
            markup.figure(
                drawn,
                f"Equal quantiles of both models' errors (predicted minus actual): on the dashed line {name} errs as the "
                "reference does, in the tails as in the middle.",
            )
        )
    return _over_time(answers, actual, made, kinds) + markup.beside(*panels)


def _over_time(answers: Answers, actual: Any, made: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    """Where times are known: what was forecast and what came, and the error, by time."""
    if answers.times is None:
        return ""
    when = answers.times.astype("datetime64[D]")
    marks = _dates(when)
    every = {"actual": actual, **made}
    means = {name: scores.over_time(when, values, SPANS) for name, values in every.items()}
    squares = {name: scores.over_time(when, (values - actual) ** 2, SPANS) for name, values in made.items()}
    forecast = curves.lines(
        {name: list(zip(*found, strict=True)) for name, found in means.items()},
        {"actual": "ink", **kinds}, across="time", up="mean of the value", marks=marks,
    )  # fmt: skip
    errors = curves.lines(
        {name: [(x, float(np.sqrt(y))) for x, y in zip(*found, strict=True)] for name, found in squares.items()},
        kinds, across="time", up="root mean squared error", marks=marks,
    )  # fmt: skip
    spans = len(means["actual"][0])
    return markup.figure(
        forecast,
        f"Means over {spans} spans of time with equally many test samples; black: what came.",
        markup.legend({"actual": "ink", **kinds}),
    ) + markup.figure(
        errors, "Errors over the same spans: a variant whose line leaves the reference's fails at that time."
    )


def _dates(when: Any, count: int = 6) -> dict[float, str]:
    """Places on the time axis (days since 1970) and their dates."""
    days = np.linspace(when.min().astype(int), when.max().astype(int), count).round()
    return {float(day): str(np.datetime64(int(day), "D")) for day in days}


def _tails(document: Document) -> str:
    rows = []
    for found in document.verify.get("evidence") or []:
        tails = found.get("tails") or {}
        for key in ("rmse", "rmse_low_decile", "rmse_high_decile", "p99_error"):
            if tails:
                before, after = tails.get(f"{key}_reference"), tails.get(key)
                rows.append(
                    [
                        Cell(found["variant"], "word"),
                        TAILS[key],
                        markup.number(before, ".5g"),
                        markup.number(after, ".5g"),
                        markup.number(after / before - 1 if before and after is not None else None, "+.2%"),
                    ]
                )
    heads = ["variant", "error", "before", "after", "change"]
    return markup.table(heads, rows, "errors in the tails", numeric=range(2, 5))


TAILS = {
    "rmse": "root mean squared error",
    "rmse_low_decile": "the same over the smallest tenth of labels",
    "rmse_high_decile": "the same over the largest tenth of labels",
    "p99_error": "99% of the absolute errors are below",
}


def _diebold_mariano(document: Document) -> str:
    rows = [
        [
            Cell(found["variant"], "word"),
            test.get("loss"),
            markup.number(test.get("mean_difference"), "+.3g"),
            markup.number(test.get("statistic"), ".3f"),
            markup.p_value(test.get("p")),
            f"{markup.text(test.get('periods'))} periods, {markup.text(test.get('lags'))} lags",
        ]
        for found in document.verify.get("evidence") or []
        if (test := found.get("forecast"))
    ]
    heads = ["variant", "loss", "after minus before", "Diebold-Mariano", "p", "over"]
    return markup.table(heads, rows, "Diebold and Mariano's test", numeric=range(2, 5))
