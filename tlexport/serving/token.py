"""The token that a caller shows and a server wants: from a file or the environment, never from the command line."""

from __future__ import annotations

import os
from pathlib import Path

from tlexport.errors import RecipeError

VARIABLE = "TLEXPORT_TOKEN"
LONGEST = 4096
SHORTEST = 16  # of a token that a server wants; a shorter one is soon guessed


def read(file: Path | None, *, shortest: int = 1) -> str | None:
    """The token in `file`, else in the variable; None without either. Raises RecipeError, which does not repeat it."""
    if file is None:
        token, where = os.environ.get(VARIABLE, "").strip(), f"the variable {VARIABLE}"
        if not token:
            return None
    else:
        where = str(file)
        try:
            with file.open(encoding="ascii") as handle:
                token = handle.read(LONGEST + 1).strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{file} holds no token: {error}") from error
    if (
        not shortest <= len(token) <= LONGEST
        or not token.isascii()
        or not token.isprintable()
        or " " in token
    ):
        raise RecipeError(
            f"{where} must hold one token of {shortest} to {LONGEST} printable ASCII characters and nothing else; "
            "make one with: openssl rand -hex 32"
        )
    return token
