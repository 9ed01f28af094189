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
    """The fastest measured variant by median latency at batch 1; where none could run here, the smallest artifact.

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
    best = min(candidates, key=lambda v: (v.size_bytes or 0, v.name))
    return Chosen(
        best,
        f"smallest of {len(candidates)} within the gates ({(best.size_bytes or 0) / 1e6:.1f} MB); "
        f"its latency was not measured: no {target} here",
    )


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
