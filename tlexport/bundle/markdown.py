"""Markdown made of text from outside: each piece is escaped, so that none can add markup, links or HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_TAKEN = re.compile(r"([\\`*_{}\[\]#!|<>~&$^@])")
_LINKS = re.compile(r"(://|(?<=www)\.)", re.IGNORECASE)  # what GitHub makes a link of without brackets
_STARTS = re.compile(
    r"^([-+=]+(?=\s|$)|\d+[.)](?=\s|$))"
)  # a list, a rule or a heading, at the start of a line


def escaped(text: object) -> str:
    """Text on one line in which no character means anything to Markdown or HTML."""
    line = "".join(character if character.isprintable() else " " for character in str(text))
    marked = _LINKS.sub(r"\\\1", _TAKEN.sub(r"\\\1", " ".join(line.split())))
    return _STARTS.sub(r"&#8203;\1", marked).replace("\\<", "&lt;").replace("\\>", "&gt;")


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def code(text: str) -> str:
    """Within back quotes nothing but a back quote means anything."""
    return "".join(c for c in text if c.isprintable() and c not in "`|")
