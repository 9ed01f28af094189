"""Protocol Buffers' text format, as far as a Triton config.pbtxt uses it: written with every string escaped, and read back.

A message is a dict: field -> value, a list for a repeated field. Values are str, int, bool, `Enum` or another message.
Source of the grammar: protobuf.dev/reference/protobuf/textformat-spec.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any


class Enum(str):
    """The name of an enum's value, written bare."""

    __slots__ = ()


_TOKEN = re.compile(
    r'\s+|#[^\n]*|(?P<string>"(?:[^"\\\n]|\\.)*")|(?P<word>[A-Za-z_][A-Za-z0-9_]*)|(?P<number>-?\d+)|(?P<mark>[{}\[\]:,;])'
)
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_UNESCAPED = {"n": 10, "r": 13, "t": 9, '"': 34, "'": 39, "\\": 92}
_DEEPEST = 16


def write(message: Mapping[str, Any], indent: str = "") -> str:
    """One field a line, nested by two spaces."""
    lines = []
    for field, value in message.items():
        for own in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(own, Mapping):
                lines.append(f"{indent}{field} {{\n{write(own, indent + '  ')}{indent}}}\n")
            else:
                lines.append(f"{indent}{field}: {_scalar(own)}\n")
    return "".join(lines)


def read(text: str) -> dict[str, list[Any]]:
    """Every field as a list, of one value where it stands once. Raises ValueError for what is not text format."""
    tokens = list(_tokens(text))
    message, end = _message(tokens, 0, 0)
    if end != len(tokens):
        raise ValueError(f"a stray {tokens[end][1]!r}")
    return message


def _scalar(value: str | int | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, Enum)):
        return str(value)
    escaped = "".join(_ESCAPES.get(c) or (c if c.isprintable() else _octal(c)) for c in value)
    return f'"{escaped}"'


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in character.encode())


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            raise ValueError(f"not understood: {text[at : at + 20]!r}")
        if found.lastgroup:
            yield found.lastgroup, found.group()
        at = found.end()


def _message(tokens: list[tuple[str, str]], at: int, depth: int) -> tuple[dict[str, list[Any]], int]:
    if depth > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} messages")
    fields: dict[str, list[Any]] = {}
    while at < len(tokens) and tokens[at][1] != "}":
        kind, field = tokens[at]
        if kind != "word":
            raise ValueError(f"{field!r} where a field's name was due")
        at += 1
        if _mark(tokens, at) == ":":
            at += 1
        if _mark(tokens, at) == "[":
            at += 1
            while _mark(tokens, at) != "]":
                value, at = _value(tokens, at, depth)
                fields.setdefault(field, []).append(value)
                at += _mark(tokens, at) == ","
            at += 1
        else:
            value, at = _value(tokens, at, depth)
            fields.setdefault(field, []).append(value)
        at += _mark(tokens, at) in (",", ";")
    return fields, at


def _value(tokens: list[tuple[str, str]], at: int, depth: int) -> tuple[Any, int]:
    if at >= len(tokens):
        raise ValueError("it ends in the middle of a field")
    kind, token = tokens[at]
    if token == "{":
        message, at = _message(tokens, at + 1, depth + 1)
        if _mark(tokens, at) != "}":
            raise ValueError("a message is not closed")
        return message, at + 1
    if kind == "string":
        return _unquoted(token[1:-1]), at + 1
    if kind == "number":
        return int(token), at + 1
    if kind == "word":
        return {"true": True, "false": False}.get(token, Enum(token)), at + 1
    raise ValueError(f"{token!r} where a value was due")


def _mark(tokens: list[tuple[str, str]], at: int) -> str:
    return tokens[at][1] if at < len(tokens) and tokens[at][0] == "mark" else ""


def _unquoted(text: str) -> str:
    """Escapes stand for bytes, which together are UTF-8."""
    out = bytearray()
    for part in re.finditer(r"\\([0-7]{1,3})|\\x([0-9a-fA-F]{1,2})|\\(.)|([^\\]+)", text):
        octal, hexadecimal, escape, plain = part.groups()
        if plain is not None:
            out += plain.encode()
        elif escape is not None:
            if escape not in _UNESCAPED:
                raise ValueError(f"an unknown escape: \\{escape}")
            out.append(_UNESCAPED[escape])
        else:
            out.append(int(octal, 8) & 255 if octal else int(hexadecimal, 16))
    return out.decode()
