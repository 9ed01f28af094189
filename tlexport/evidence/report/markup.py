"""HTML of a section: tables, facts, captions, and numbers as a reader would write them. Every text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

LONGEST = 160  # characters of a text in a cell


@dataclass(frozen=True)
class Section:
    """A heading's `content` (HTML), and the files that its numbers were read from."""

    key: str
    title: str
    content: str
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """A cell that is more than text: its class, or HTML that is already escaped."""

    text: object = ""
    kind: str = ""
    html: str = ""
    span: int = 1  # columns


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[object]],
    label: str,
    *,
    numeric: Iterable[int] = (),
    kinds: Sequence[str] = (),
) -> str:
    """A table that scrolls within the page. `numeric`: columns set right; `kinds`: a class a row. Empty without rows."""
    right = set(numeric)
    body = []
    for index, row in enumerate(rows):
        cells = "".join(_cell(value, column in right) for column, value in enumerate(row))
        kind = f' class="{kinds[index]}"' if index < len(kinds) and kinds[index] else ""
        body.append(f"<tr{kind}>{cells}</tr>")
    if not body:
        return ""
    head = "".join(
        f'<th scope="col"{" class=number" if column in right else ""}>{escape(name)}</th>'
        for column, name in enumerate(heads)
    )
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return scroll(whole, label)


def scroll(content: str, label: str) -> str:
    """A part that may be wider than the page: it scrolls by itself, also by keyboard."""
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">{content}</div>'


def figure(drawing: str, caption: str, legend: str = "") -> str:
    """A drawing with what it shows and how to read it; nothing without a drawing."""
    if not drawing:
        return ""
    held = scroll(drawing, caption) if 'class="wide"' in drawing else drawing
    return f"<figure>{legend}{held}<figcaption>{escape(caption)}</figcaption></figure>"


def beside(*parts: str) -> str:
    kept = [part for part in parts if part]
    return f'<div class="beside">{"".join(kept)}</div>' if kept else ""


def legend(kinds: Mapping[str, str]) -> str:
    """Which colour is whom."""
    items = "".join(
        f'<li><span class="key {kind}"></span>{escape(name)}</li>' for name, kind in kinds.items()
    )
    return f'<ul class="legend">{items}</ul>'


def paragraph(text: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f"<p{style}>{escape(text)}</p>" if text else ""


def details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def present(values: Mapping[str, object]) -> dict[str, object]:
    """Without what says nothing: no value, no text, nothing listed."""
    return {key: value for key, value in values.items() if value not in (None, "", [], (), {})}


def facts(values: Mapping[str, object], caption: str = "") -> str:
    """A nested dict as tables of keys and values, one for each dict inside it."""
    tables = _tables(caption, values)
    return f'<div class="columns">{"".join(tables)}</div>' if tables else ""


def _tables(caption: str, values: Mapping[str, object]) -> list[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    tables = [_pairs(caption, plain)] if plain else []
    for key, value in values.items():
        if isinstance(value, Mapping):
            tables += _tables(f"{caption} {key}".strip(), value)
    return tables


def _pairs(caption: str, values: Mapping[str, object]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(words(key))}</th><td>{escape(text(value))}</td></tr>'
        for key, value in values.items()
    )
    return f"<table>{f'<caption>{escape(words(caption))}</caption>' if caption else ''}{rows}</table>"


def _cell(value: object, right: bool) -> str:
    held = value if isinstance(value, Cell) else Cell(value)
    kinds = " ".join(kind for kind in ("number" if right else "", held.kind) if kind)
    style = f' class="{kinds}"' if kinds else ""
    style += f' colspan="{held.span}"' if held.span > 1 else ""
    return f"<td{style}>{held.html or escape(text(held.text))}</td>"


def words(key: object) -> str:
    return str(key).replace("_", " ")


def text(value: object) -> str:
    """Any value as a reader would write it."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value, ".5g")
    if isinstance(value, Mapping):
        return ", ".join(f"{words(key)}: {text(part)}" for key, part in value.items()) or "–"
    if isinstance(value, (list, tuple)):
        return ", ".join(text(part) for part in value) or "–"
    return str(value)


def shortened(text: str) -> str:
    """A long text's beginning, and how much more there is."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)"


def number(value: object, form: str, unit: str = "") -> str:
    """A finite number in this format, else a dash."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        told = format(value, form)
        # A difference that rounds to zero has no direction.
        zero = told.startswith("-") and not told.strip("-0.%e+")
        return (told.replace("-", "+" if "+" in form else "", 1) if zero else told) + unit
    return "–"


def interval(values: Mapping[str, object], key: str, form: str, low: str = "", high: str = "") -> str:
    """`+0.0012 [-0.0008, +0.0031]`."""
    middle = number(values.get(key), form)
    ends = [number(values.get(name), form) for name in (low or f"{key}_low", high or f"{key}_high")]
    return middle if ends == ["–", "–"] else f"{middle} [{ends[0]}, {ends[1]}]"


def p_value(value: object) -> str:
    """`0.031`, `< 0.0001`."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return "< 0.0001" if value < 1e-4 else f"{value:.4f}" if value < 0.1 else f"{value:.2f}"
    return "–"


def megabytes(size: object) -> str:
    """Bytes as megabytes: `3.6`, and small ones with the digits they need."""
    return number(size / 1e6, ".1f" if size >= 1e6 else ".2g") if isinstance(size, (int, float)) else "–"
