"""Which variant a target gets, and why, in one line."""

from __future__ import annotations

from dataclasses import dataclass

from tlexport.errors import GateError
from tlexport.results import Variant


@dataclass(frozen=True)
class Chosen:
    variant: Variant
    reason: str


def passes(variant: Variant) -> bool:
    """Within every gate, and compiled; whether it could also be run here is for the reader of the verdict."""
    return variant.file is not None and variant.verdict in ("pass", "compiled, not run here")


def choose(target: str, variants: tuple[Variant, ...]) -> Chosen:
    """The fastest measured variant by median latency at batch 1; where none could run here, the smallest artifact.

    Raises GateError if none passes.
    """
    candidates = [variant for variant in variants if variant.target == target and passes(variant)]
    if not candidates:
        raise GateError(f"no variant for {target} passes its gates")
    timed = sorted((v for v in candidates if v.p50_ms is not None), key=lambda v: (v.p50_ms, v.size_bytes))
    if timed:
        best, *others = timed
        against = f"; next {others[0].name} at {others[0].p50_ms:.2f} ms" if others else ""
        return Chosen(
            best,
            f"fastest of {len(timed)} passing: p50 {best.p50_ms:.2f} ms, {best.speedup:.2f}x torch eager{against}",
        )
    best = min(candidates, key=lambda v: (v.size_bytes or 0, v.name))
    return Chosen(
        best,
        f"smallest of {len(candidates)} within the gates ({(best.size_bytes or 0) / 1e6:.1f} MB); "
        f"its latency was not measured: no {target} here",
    )
