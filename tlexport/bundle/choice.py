"""Which variant a target gets, and why, in one line; and whether a GPU is worth the way at batch 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tlexport.errors import GateError
from tlexport.results import Variant

# What a GPU's answer costs before it computes anything, in microseconds, each at the lower end of what is published:
COPY_US = 5.0  # one cudaMemcpyAsync, 5 to 7 (Wu et al. 2026, DualPath, arXiv:2602.21548, section 5.2)
LAUNCH_US = 4.0  # one launch of a kernel or of a CUDA graph, 4 to 6 on an RTX 5070 Ti (CUDA 13.0)
KERNEL_US = 1.1  # the least time a kernel runs: x + y of 1024 numbers (pytorch/pytorch issue 161104)


@dataclass(frozen=True)
class Chosen:
    variant: Variant
    reason: str


def passes(variant: Variant) -> bool:
    """Within every gate, and compiled; whether it could also be run here is for the reader of the verdict."""
    return variant.file is not None and variant.verdict in ("pass", "compiled, not run here")


def choose(target: str, variants: tuple[Variant, ...]) -> Chosen:
    """The fastest measured variant by median latency at batch 1; where none could run here, the cheapest by the cost model.

    Raises GateError if none passes.
    """
    candidates = [variant for variant in variants if variant.target == target and passes(variant)]
    if not candidates:
        raise GateError(f"no variant for {target} passes its gates")
    timed = sorted((v for v in candidates if v.p50_ms is not None), key=lambda v: (v.p50_ms, v.size_bytes))
    if timed:
        best, *others = timed
        beside = "" if best.speedup is None else f", {best.speedup:.2f}x torch eager"
        against = f"; next {others[0].name} at {shown(others[0].p50_ms)}" if others else ""
        return Chosen(best, f"fastest of {len(timed)} passing: p50 {shown(best.p50_ms)}{beside}{against}")
    best = min(candidates, key=lambda v: (*_rank(v), v.size_bytes or 0, v.name))
    size = f"{(best.size_bytes or 0) / 1e6:.1f} MB"
    cost = (
        f"cheapest by the cost model ({shown(best.cost_ms)}, {size})"
        if best.cost_ms
        else f"smallest ({size})"
    )
    return Chosen(
        best, f"{cost} of {len(candidates)} within the gates; its latency was not measured: no {target} here"
    )


def losers(target: str, variants: tuple[Variant, ...], chosen: Variant) -> dict[str, str]:
    """Every other variant of the target -> why it was not chosen, in one line."""
    return {v.name: _why_not(v, chosen) for v in variants if v.target == target and v.name != chosen.name}


def _why_not(variant: Variant, chosen: Variant) -> str:
    if not passes(variant):
        return f"{variant.verdict}: {variant.reason}" if variant.reason else variant.verdict
    if variant.dropped:
        return f"not timed to the end: {variant.dropped}"
    if variant.p50_ms is not None and chosen.p50_ms:
        return f"{variant.p50_ms / chosen.p50_ms:.2f}x the time: p50 {shown(variant.p50_ms)}"
    if variant.cost_ms and chosen.cost_ms and variant.cost_ms != chosen.cost_ms:
        return f"{variant.cost_ms / chosen.cost_ms:.2f}x the cost by the model, {(variant.size_bytes or 0) / 1e6:.1f} MB"
    return f"no cheaper by the model, {(variant.size_bytes or 0) / 1e6:.1f} MB"


def front(variants: tuple[Variant, ...]) -> tuple[str, ...]:
    """Names of the compiled variants that no other one for the same target beats: in drop, time and size at once.

    Time is the median latency where it was measured; a target that is not here has the cost model for all its variants.
    """
    known = [v for v in variants if v.drop_high is not None and v.file is not None and not v.dropped]
    return tuple(
        v.name for v in known if not any(_beats(other, v) for other in known if other.target == v.target)
    )


def _beats(one: Variant, other: Variant) -> bool:
    """Nowhere worse and somewhere better."""
    ours, theirs = (((v.drop_high or 0.0), *_rank(v), v.size_bytes or 0) for v in (one, other))
    return all(a <= b for a, b in zip(ours, theirs, strict=True)) and ours != theirs


def _rank(variant: Variant) -> tuple[float, float]:
    """Measured before modelled, and less before more."""
    if variant.p50_ms is not None:
        return 0.0, variant.p50_ms
    return 1.0, variant.cost_ms or 0.0


def shown(ms: float | None) -> str:
    """A latency with three digits: `12.3 µs`, `4.56 ms`."""
    if ms is None:
        return "not measured"
    value, unit = (1e3 * ms, "µs") if ms < 1 else (ms, "ms")
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def against_gpu(variants: tuple[Variant, ...], layers: Mapping[str, int]) -> tuple[str, ...]:
    """Where the CPU answers one sample sooner than a GPU can: one line, or none where that cannot be said.

    A GPU variant that was timed here is compared as measured, copies included. Else the CPU is held against what the
    published costs of a round trip add up to, for `layers` [GPU variant's name -> layers of its engine] or for a single
    kernel; the line says that this was not measured.
    """
    on_cpu = [v for v in variants if v.target == "cpu" and passes(v) and v.p50_ms is not None]
    if not on_cpu:
        return ()
    cpu = min(on_cpu, key=lambda v: v.p50_ms or 0.0)
    assert cpu.p50_ms is not None
    begin = f"one sample takes {shown(cpu.p50_ms)} on the CPU ({cpu.name})"
    gpu = [v for v in variants if v.target != "cpu" and v.p50_ms is not None]
    if gpu:
        best = min(gpu, key=lambda v: v.p50_ms or 0.0)
        if best.p50_ms is None or cpu.p50_ms >= best.p50_ms:
            return ()
        return (
            f"{begin} and {shown(best.p50_ms)} on the GPU, copies included ({best.name}): keep it on the CPU",
        )
    name = min(layers, key=lambda name: layers[name], default=None)
    kernels = layers[name] if name else 1
    least = 1e-3 * (2 * COPY_US + LAUNCH_US + KERNEL_US * kernels)
    usual = 1e-3 * (2 * COPY_US + LAUNCH_US * kernels)
    rests_on = (
        f"not measured here but added up from published costs: {kernels} kernel{'s' * (kernels > 1)}"
        f"{f' of {name}' if name else ''} at {KERNEL_US:g} µs or more, two copies at {COPY_US:g} µs, a launch at {LAUNCH_US:g} µs"
    )
    if cpu.p50_ms < least:
        return (
            f"{begin}; the round trip to a GPU takes at least {shown(least)}: keep it on the CPU ({rests_on})",
        )
    if cpu.p50_ms < usual:
        return (
            f"{begin}; the round trip to a GPU takes {shown(usual)} launched kernel by kernel, and at least {shown(least)} as one "
            f"CUDA graph: measure before shipping it to a GPU ({rests_on})",
        )
    return ()
