"""The exit code of a result that was shown: a gate that failed, or could not be decided."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from tlexport.cli import show
from tlexport.errors import GateError, LatencyGateError, TlexportError, UndecidedError

if TYPE_CHECKING:
    from tlexport.results import Variant


def fail(error: TlexportError | None) -> None:
    """Exit with its code, after the result has been shown."""
    if error:
        show.error(str(error))
        raise typer.Exit(error.exit_code)


def gate(failed: dict[str, str], code: int = GateError.exit_code) -> None:
    """Exit with `code`, after the result has been shown, if anything failed."""
    if failed:
        show.error("; ".join(f"{name}: {why}" for name, why in failed.items()))
        raise typer.Exit(code)


def code(failed: dict[str, str], variants: tuple[Variant, ...]) -> int:
    """Of targets that failed, by the variant that came nearest: 13 if each has one that is only too slow, 14 if each has one
    that is that or undecided, else 10.
    """
    slow = {variant.target for variant in variants if variant.too_slow}
    undecided = {variant.target for variant in variants if variant.verdict == "undecided"}
    if failed.keys() <= slow:
        return LatencyGateError.exit_code
    return UndecidedError.exit_code if failed.keys() <= slow | undecided else GateError.exit_code
