"""Decisions that changed: how many, and the worst of them with what the model saw."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from tlexport.evidence.report import markup
from tlexport.evidence.report.accuracy import VERIFY, files
from tlexport.evidence.report.document import Answers, Array, Document
from tlexport.evidence.report.figures import axes
from tlexport.evidence.report.markup import Cell, Section

PIXELS = 160  # longest side of a thumbnail
FEATURES = 8  # of a table's row that are shown
MOST_LIMITS = 8  # thresholds that are written out
CHANGED = {True: ("fail", "harmful"), False: ("quiet", "harmless")}


def flips(document: Document) -> Section:
    answers = document.answers
    if document.finetune.get("task") == "regression":
        return Section("flips", "Decisions that changed", "")
    content = _rule(document) + _counts(document)
    sources = (VERIFY,)
    if answers is None:
        return Section(
            "flips", "Decisions that changed", content + markup.paragraph(document.no_answers), sources
        )
    shown = _shown(document, answers)
    each = max(1, document.flips // max(1, len(shown))) if document.flips else 0
    for name, outputs in shown.items():
        content += _worst(document, answers, name, outputs, each)
    inputs = ("reference/inputs.npy",) if answers.inputs is not None and shown else ()
    read = tuple(f"predictions/{name}.npy" for name in shown)
    return Section(
        "flips",
        "Decisions that changed",
        content,
        tuple(dict.fromkeys((*sources, *files(document), *read, *inputs))),
    )


def _rule(document: Document) -> str:
    decision = document.verify.get("decision") or {}
    if not decision:
        return ""
    limits = decision.get("thresholds")
    told = f"Operating point: {decision.get('rule')}"
    said = not limits or len(limits) > MOST_LIMITS or markup.text(limits) == decision.get("rule")
    told += "" if said else f"; threshold {markup.text(limits)}"
    told += f"; chosen on {decision['samples']} validation samples" if decision.get("samples") else ""
    return markup.paragraph(told + ".")


def _counts(document: Document) -> str:
    rows = []
    for variant in document.verify.get("variants") or []:
        if variant.get("flips") is None:
            continue
        found = document.evidence(variant["name"]).get("flips") or {}
        rows.append(
            [
                Cell(variant["name"], "word"),
                markup.text(variant.get("flips")),
                markup.text(found.get("harmful")),
                markup.text(found.get("harmless")),
                markup.number(variant.get("flips_upper"), ".2%"),
                markup.p_value(found.get("mcnemar_p")),
            ]
        )
    heads = ["variant", "flips", "harmful", "harmless", "share at most", "McNemar p"]
    note = (
        "Harmful: right before, wrong now. “Share at most” bounds the share of flips among all samples of this kind. McNemar: "
        "as many decisions were spoilt as were mended."
    )
    return markup.table(heads, rows, "flips by variant", numeric=range(1, 6)) + (
        markup.paragraph(note, "quiet") if rows else ""
    )


def _shown(document: Document, answers: Answers) -> dict[str, Array]:
    """The compared variants that flip; if none does, the variant that flips most, to see what quantisation changes."""
    before = answers.decided(answers.reference)

    def count(outputs: Array) -> int:
        return int((answers.decided(outputs) != before).sum())

    flipping = {name: outputs for name, outputs in document.compared.items() if count(outputs)}
    if flipping:
        return flipping
    name, outputs = max(answers.variants.items(), key=lambda item: count(item[1]), default=("", before))
    return {name: outputs} if name and count(outputs) else {}


def _worst(document: Document, answers: Answers, name: str, outputs: Array, most: int) -> str:
    """Cards of the worst flips: harmful before harmless, then by how far the probability moved."""
    before, after = answers.decided(answers.reference), answers.decided(outputs)
    cells = np.argwhere(before != after)
    ranked = sorted(cells.tolist(), key=lambda cell: _order(answers, outputs, before, tuple(cell)))
    cards = [_card(answers, outputs, (before, after), tuple(cell)) for cell in ranked[:most]]
    if not cards:
        return ""
    aside = "" if name in {n for n, _ in document.chosen.values()} else ", which was not chosen"
    told = f"{len(cards)} of {len(cells)} changed decisions of {name}{aside}, the worst first. Numbers are probabilities."
    return f'<h3>{escape(name)}</h3>{markup.paragraph(told, "quiet")}<ul class="flips">{"".join(cards)}</ul>'


def _order(answers: Answers, outputs: Array, before: Array, cell: tuple[int, ...]) -> tuple[bool, float, int]:
    row, column = cell[0], cell[1] if len(cell) > 1 else before[cell]
    moved = abs(float(answers.reference[row, column]) - float(outputs[row, column]))
    return not bool(before[cell] == answers.labels[cell]), -moved, row


def _card(answers: Answers, outputs: Array, decided: tuple[Array, Array], cell: tuple[int, ...]) -> str:
    before, after = decided
    row, truth = cell[0], answers.labels[cell]
    kind, word = CHANGED[bool(before[cell] == truth)]
    lines = {
        "truth": ("not measured" if truth < 0 else _named(answers, cell, truth), None),
        "before": (_named(answers, cell, before[cell]), _probability(answers.reference, cell, before[cell])),
        "after": (_named(answers, cell, after[cell]), _probability(outputs, cell, after[cell])),
    }
    body = "".join(
        f'<tr><th scope="row">{key}</th><td>{escape(told)}</td>'
        f'<td class="number">{"" if p is None else markup.number(p, ".4f")}</td></tr>'
        for key, (told, p) in lines.items()
    )
    seen = "" if answers.inputs is None else _seen(answers, row)
    title = f'test sample {row}: <b class="{kind}">{word}</b>'
    return f"<li>{seen}{title}<table><tbody>{body}</tbody></table></li>"


def _named(answers: Answers, cell: tuple[int, ...], decision: int) -> str:
    if len(cell) > 1:
        return f"{answers.classes[cell[1]]}: {'yes' if decision else 'no'}"
    return answers.classes[int(decision)]


def _probability(outputs: Array, cell: tuple[int, ...], decision: int) -> float:
    """Of the label (multilabel), or of the class that was decided."""
    return float(outputs[cell[0], cell[1] if len(cell) > 1 else int(decision)])


def _seen(answers: Answers, row: int) -> str:
    """What the model was given: an image, a window of prices, a molecule, or the first features."""
    assert answers.inputs is not None
    given, prepared = np.asarray(answers.inputs[row]), answers.preprocessing
    if given.dtype.names:
        given = np.asarray(given[given.dtype.names[0]])
    if given.ndim == 3:
        return _image(given, f"test sample {row}")
    if given.ndim == 2:
        return _window(given)
    if "vocabulary" in prepared and given.ndim == 1 and given.dtype.kind in "iu":
        return f"<p><code>{escape(_spelt(given, prepared))}</code></p>"
    return _features(given, prepared)


def _image(pixels: Array, name: str) -> str:
    """[C, H, W] or [H, W, C] as a PNG of at most PIXELS a side, within the page."""
    from PIL import Image

    if pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = ((pixels - low) / (high - low or 1.0) * 255).astype(np.uint8)
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    held = io.BytesIO()
    picture.save(held, "PNG", optimize=True)
    data = base64.b64encode(held.getvalue()).decode("ascii")
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img alt="{escape(name)}" {size} src="data:image/png;base64,{data}">'


def _window(values: Array) -> str:
    """The last channel of a window [steps, channels] as a line."""
    line = [(float(i), float(v)) for i, v in enumerate(values[:, -1]) if np.isfinite(v)]
    across, up = axes.Extent.of(x for x, _ in line), axes.Extent.of(y for _, y in line)
    if across is None or up is None:
        return ""
    x, y = across.scale(4, 216), up.scale(66, 6)
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
    return axes.svg(72, [f'<polyline class="curve" fill="none" points="{path}"/>'], "what the model saw", 220)


def _spelt(tokens: Array, prepared: Mapping[str, Any]) -> str:
    """A SMILES of its tokens; padding is left out."""
    vocabulary = list(prepared["vocabulary"])
    kept = [int(token) for token in tokens if int(token) != int(prepared.get("padding", 0))]
    return "".join(str(vocabulary[t]) if t < len(vocabulary) else "?" for t in kept)


def _features(values: Array, prepared: Mapping[str, Any]) -> str:
    """The first features of a table's row, by name; the rest folded away."""
    columns = list(prepared.get("columns") or [])
    named = [
        (
            str(columns[i]["name"]) if i < len(columns) else f"feature {i}",
            _cell(value, columns[i] if i < len(columns) else {}),
        )
        for i, value in enumerate(values.ravel().tolist())
    ]
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in named[:64]
    ]
    first = f"<table><tbody>{''.join(rows[:FEATURES])}</tbody></table>"
    rest = f"<table><tbody>{''.join(rows[FEATURES:])}</tbody></table>" if rows[FEATURES:] else ""
    return first + markup.details(f"{len(rows) - FEATURES} more", rest)


def _cell(value: float, column: Mapping[str, Any]) -> str:
    """A feature's value; a category's code as the word it stands for."""
    words = column.get("vocabulary") or []
    if words and not column.get("numbers") and math.isfinite(value):
        return str(words[int(value)]) if 0 <= value < len(words) else "unknown"
    return markup.number(value, ".5g") if math.isfinite(value) else "missing"
