"""Which names a file of a bundle or an archive may have: such that every file system keeps them apart and inside."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

LONGEST_NAME = 240  # characters; Windows allows 260 of a whole path, ext4 255 bytes of a part
DEEPEST = 16
# What Windows refuses, or takes for a device whatever follows the dot (Microsoft: Naming Files, Paths, and Namespaces).
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\\]')


def problem(name: str) -> str:
    """Why `name`, relative with forward slashes, may not be a file's name; empty if it may.

    It is refused where it leads outside, or is read differently by POSIX, Windows and macOS: backslashes and drive letters,
    devices of Windows, trailing dots and spaces, control characters, and letters beyond ASCII, which macOS normalises.
    """
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name) or name.startswith("\\"):
        return "leads outside the bundle"
    if not name or any(part in ("", ".") for part in parts):
        return "names no file of a bundle"
    if not name.isascii() or _FORBIDDEN.search(name):
        return "names no file of a bundle: it has a character that not every system takes"
    if len(name) > LONGEST_NAME or len(parts) > DEEPEST:
        return f"names no file of a bundle: longer than {LONGEST_NAME} characters or deeper than {DEEPEST} folders"
    for part in parts:
        if _RESERVED.fullmatch(part) or part[-1] in ". ":
            return f"names no file of a bundle: Windows takes {part!r} for something else"
    return ""


def collisions(names: Iterable[str]) -> list[str]:
    """Names that a file system without upper and lower case takes for another one, or for another one's folder."""
    names = list(names)
    folded = Counter(name.casefold() for name in names)
    folders: dict[str, str] = {}
    wrong = {name for name in names if folded[name.casefold()] > 1}
    for name in names:
        parts = name.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if folders.setdefault(folder.casefold(), folder) != folder or folder.casefold() in folded:
                wrong.add(name)
    return sorted(wrong)
