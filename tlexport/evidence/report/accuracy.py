"""How good the decisions are, before and after: flips, slices, calibration, ROC, precision and recall, confusion."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from tlexport.evidence.accuracy import calibration
from tlexport.evidence.report import markup, scores
from tlexport.evidence.report.document import Answers, Document
from tlexport.evidence.report.figures import curves, matrix
from tlexport.evidence.report.markup import Cell, Section

LARGEST_MATRIX = 20  # classes that a confusion matrix can show
CONFUSIONS = 20  # pairs that are listed beyond
SLICES = 15
BINS = 10
VERIFY = "verify.json"


def files(document: Document) -> tuple[str, ...]:
    """Where the answers that are drawn stand."""
    own = [f"predictions/{name}.npy" for name in document.compared]
    return ("reference/labels.npy", "reference/outputs.npy", *own)


def slices(document: Document) -> Section:
    """The drop on parts of the test split; of each variant that is compared, the worst named."""
    parts = []
    for name in document.compared or {}:
        found = document.evidence(name)
        listed = found.get("slices") or []
        if not listed:
            continue
        worst = str(found.get("worst_slice") or "")
        rows = [
            [
                Cell(s["slice"]),
                markup.text(s.get("samples")),
                markup.number(s.get("reference"), ".4f"),
                markup.interval(s, "drop", "+.4f"),
                markup.p_value(s.get("p")),
                Cell(html=escape(s.get("note") or " ")),
            ]
            for s in listed
        ]
        heads = ["slice", "samples", f"reference {document.metric}", "drop [interval]", "p, Holm", "note"]
        kinds = ["chosen" if s["slice"] == worst else "" for s in listed]
        told = f"Worst slice: {worst}" if worst else "No slice could be judged: too few samples."
        shown = markup.table(heads, rows[:SLICES], f"slices of {name}", numeric=range(1, 5), kinds=kinds)
        rest = markup.table(heads, rows[SLICES:], f"further slices of {name}", numeric=range(1, 5))
        parts.append(f"<h3>{escape(name)}</h3>{markup.paragraph(told)}{shown}")
        parts.append(markup.details(f"the other slices ({len(rows) - SLICES})", rest))
    return Section("slices", "Drop by slice", "".join(parts), (VERIFY,))


def reliability(document: Document) -> Section:
    """Reliability diagrams before and after, and the tests of calibration."""
    answers = document.answers
    if answers is None or answers.task == "regression":
        return Section("calibration", "Calibration", "")
    panels = []
    for name, outputs in _all(document, answers).items():
        confidence, right = scores.stated(answers.labels, outputs, answers.task)
        bins = [held.model_dump() for held in calibration.reliability(confidence, right, BINS)]
        kind = document.kinds.get(name, "s1")
        panels.append(
            markup.figure(
                curves.reliability(bins, kind, name), f"{name}: {len(right)} statements in {len(bins)} bins"
            )
        )
    what = {
        "binary": f"the probability of {answers.classes[-1]}",
        "multiclass": "the probability of the most probable class",
        "multilabel": "the probability of every label that was measured",
    }[answers.task]
    read = (
        f"Each dot is an equal share of the test samples, by {what}: what was stated across, how often it came true upward, "
        "with Wilson's 95% interval. On the diagonal probabilities mean what they say; below it they claim too much."
    )
    return Section(
        "calibration",
        "Calibration",
        markup.paragraph(read, "quiet") + markup.beside(*panels) + _drifts(document),
        (*files(document), VERIFY),
    )


def _drifts(document: Document) -> str:
    rows = [
        [
            Cell(found["variant"], "word"),
            markup.number(c.get("ece_reference"), ".4f"),
            markup.number(c.get("ece"), ".4f"),
            markup.interval(c, "ece_drift", "+.4f"),
            markup.number(c.get("brier_reference"), ".4f"),
            markup.number(c.get("brier"), ".4f"),
            markup.interval(c, "brier_drift", "+.4f"),
        ]
        for found in document.verify.get("evidence") or []
        if (c := found.get("calibration"))
    ]
    heads = [
        "variant",
        "ECE before",
        "after",
        "drift [interval]",
        "Brier before",
        "after",
        "drift [interval]",
    ]
    return markup.table(heads, rows, "calibration before and after", numeric=range(1, 7))


def discrimination(document: Document) -> Section:
    """ROC and precision against recall, macro over classes or labels, with DeLong's test."""
    answers = document.answers
    if answers is None or answers.task == "regression" or answers.reference.shape[1] > scores.MOST_CURVES:
        return Section("roc", "ROC, precision and recall", "")
    pairs = {n: scores.columns(answers.labels, o, answers.task) for n, o in _all(document, answers).items()}
    pairs = {name: found for name, found in pairs.items() if found}
    if not pairs:
        return Section("roc", "ROC, precision and recall", "")
    kinds = {name: document.kinds[name] for name in pairs}
    first = next(iter(pairs.values()))
    share = float(np.mean([truth.mean() for truth, _ in first]))
    whom = (
        f"of {answers.classes[-1]}"
        if answers.task == "binary"
        else f"mean over {len(first)} one-vs-rest curves"
    )
    roc = curves.unit_curves(
        {name: scores.mean_roc(found) for name, found in pairs.items()},
        kinds, across="false positive rate", up="true positive rate", guide=[(0, 0), (1, 1)], label="ROC curves",
    )  # fmt: skip
    recall = curves.unit_curves(
        {name: scores.mean_precision_recall(found) for name, found in pairs.items()},
        kinds, across="recall", up="precision", guide=[(0, share), (1, share)], label="precision against recall",
    )  # fmt: skip
    pictures = markup.beside(
        markup.figure(
            roc, f"ROC, {whom}. Dashed: chance. Where both lines coincide nothing was lost in ranking."
        ),
        markup.figure(
            recall, f"Precision against recall, {whom}. Dashed: the share of positives, {share:.3g}."
        ),
    )
    return Section(
        "roc",
        "ROC, precision and recall",
        markup.legend(kinds) + pictures + _delong(document),
        (*files(document), VERIFY),
    )


def _delong(document: Document) -> str:
    rows = [
        [
            Cell(found["variant"], "word"),
            markup.number(a.get("reference"), ".4f"),
            markup.number(a.get("variant"), ".4f"),
            markup.interval(a, "drop", "+.4f", "low", "high"),
            markup.p_value(a.get("p")),
        ]
        for found in document.verify.get("evidence") or []
        if (a := found.get("auc"))
    ]
    heads = ["variant", "AUC before", "after", "drop [interval], DeLong", "p"]
    return markup.table(heads, rows, "DeLong's test of the AUC", numeric=range(1, 5))


def confusions(document: Document) -> Section:
    """Who is taken for whom, before and after."""
    answers = document.answers
    if answers is None or answers.task == "regression":
        return Section("confusion", "Confusion, before and after", "")
    decided = {name: answers.decided(outputs) for name, outputs in _all(document, answers).items()}
    if answers.task == "multilabel":
        content = _by_label(answers, decided)
    elif answers.reference.shape[1] <= LARGEST_MATRIX:
        content = _matrices(document, answers, decided)
    else:
        content = _worst_pairs(answers, decided)
    return Section("confusion", "Confusion, before and after", content, files(document))


def _matrices(document: Document, answers: Answers, decided: Mapping[str, Any]) -> str:
    k = answers.reference.shape[1]
    counts = {name: scores.confusion(answers.labels, made, k).tolist() for name, made in decided.items()}
    before = counts[document.reference]
    panels = [
        matrix.confusion(of, answers.classes, name, None if name == document.reference else before)
        for name, of in counts.items()
    ]
    read = (
        "Rows are the truth, columns the decision; green is right, red is wrong, darker is a larger share of the row. A framed "
        "cell differs from the reference by the number below the count."
    )
    drawn = [
        markup.scroll(panel, f"confusion matrix of {name}")
        for name, panel in zip(counts, panels, strict=True)
    ]
    return markup.paragraph(read, "quiet") + markup.beside(*drawn)


def _worst_pairs(answers: Answers, decided: Mapping[str, Any]) -> str:
    """Too many classes for a matrix: the most frequent confusions of any model."""
    k = answers.reference.shape[1]
    counts = {name: scores.confusion(answers.labels, made, k) for name, made in decided.items()}
    for of in counts.values():
        np.fill_diagonal(of, 0)
    total = np.max(np.stack(list(counts.values())), axis=0)
    order = np.argsort(-total, axis=None, kind="stable")[:CONFUSIONS]
    rows: list[list[object]] = [
        [answers.classes[i], answers.classes[j], *(str(of[i, j]) for of in counts.values())]
        for i, j in (divmod(int(at), k) for at in order)
        if total[i, j]
    ]
    note = f"{k} classes are too many for a matrix: the {len(rows)} most frequent confusions, in samples."
    heads = ["truth", "decision", *counts]
    return markup.paragraph(note) + markup.table(heads, rows, "confusions", numeric=range(2, len(heads)))


def _by_label(answers: Answers, decided: Mapping[str, Any]) -> str:
    counts = {name: scores.label_counts(answers.labels, made) for name, made in decided.items()}
    heads = ["label", *(f"{name}: {what}" for name in counts for what in ("TP", "FP", "FN", "TN"))]
    rows = [
        [label, *(str(cell) for of in counts.values() for cell in of[index])]
        for index, label in enumerate(answers.classes)
    ]
    note = "Decisions of each label on the samples where it was measured."
    return markup.paragraph(note, "quiet") + markup.table(
        heads, rows, "decisions by label", numeric=range(1, len(heads))
    )


def _all(document: Document, answers: Answers) -> dict[str, Any]:
    """The reference's outputs and those of the compared variants."""
    return {document.reference: answers.reference, **document.compared}
