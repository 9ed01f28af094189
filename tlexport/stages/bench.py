"""bench: the reference and every passing variant that runs here, timed in turns in one process."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from tlexport.backends import Runner, eager, registry
from tlexport.evidence import latency, machine
from tlexport.models.checkpoint import load_checkpoint
from tlexport.models.image import ServingModel
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import BenchResult, Variant, VerifyResult
from tlexport.run import Run, read_json, replacing, write_json

REFERENCE = "torch-eager"
RAW = "bench-samples.npz"
BUSY = 20.0  # percent of all cores; torch's threads stall far more than in proportion when they must share


def run(run: Run, recipe: Recipe, progress: Progress) -> BenchResult:
    """Latency at batch 1 and throughput by batch size; the latency gates are applied. Writes bench.json and raw samples."""
    verified = run.result("verify", VerifyResult)
    files = [run / variant.file for variant in verified.variants if variant.file]
    threads = recipe.bench.threads or machine.usable_cores()
    config = recipe.model_dump(mode="json", include={"bench", "gates"}) | {"threads": threads}
    record = run.stage("bench", config, inputs=[run / "checkpoint", run / "verify.json", *files])
    if (finished := record.unchanged(BenchResult)) is not None:
        progress.say("bench: unchanged, skipped")
        return finished
    busy = machine.busy_percent()
    if busy > BUSY:
        progress.warn(
            f"others use {busy:g}% of this machine: take these times for a rough guide, and bench again when it is idle"
        )
    timed = [v for v in verified.variants if v.verdict == "pass"]
    images = np.load(run.require("reference/inputs.npy", "finetune"), mmap_mode="r", allow_pickle=False)
    model, _, _ = load_checkpoint(run / "checkpoint")
    with ExitStack() as stack:
        runners: dict[str, Runner] = {
            REFERENCE: stack.enter_context(eager.runner_for(ServingModel(model).eval(), threads=threads))
        }
        for variant in timed:
            assert variant.file is not None
            device = "cpu" if variant.target == "cpu" else "cuda"
            runners[variant.name] = stack.enter_context(
                registry.BACKENDS[variant.backend].runner(run / variant.file, threads=threads, device=device)
            )
        raw, throughput = _measure(runners, images, recipe, progress)
    result = _result(run, verified, raw, throughput, recipe, threads, busy)
    with replacing(run / RAW) as beside, beside.open("wb") as handle:
        np.savez(handle, allow_pickle=False, **raw)
    write_json(run / "bench.json", result.model_dump(mode="json"))
    record.finish(result, outputs=[run / "bench.json", run / RAW])
    return result


def load(run: Run) -> BenchResult:
    """What bench wrote. Raises RunError if it has not run."""
    return BenchResult.model_validate(read_json(run.require("bench.json", "bench")))


def _measure(
    runners: dict[str, Runner], images: np.ndarray, recipe: Recipe, progress: Progress
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """Seconds of every counted call at batch 1, and images per second by batch size for those still in the race."""
    one = {"images": np.array(images[:1])}
    with progress.bar("timing, batch 1") as step:
        raw = latency.interleave(
            {name: partial(runner.run, one) for name, runner in runners.items()},
            samples=recipe.bench.samples,
            seed=recipe.seed,
            protected=(REFERENCE,),
            progress=step,
        )
    kept = [name for name in runners if name not in raw.dropped]
    throughput: dict[str, dict[str, float]] = {name: {} for name in kept}
    with progress.bar("throughput") as step:
        for done, size in enumerate(recipe.bench.batch_sizes, start=1):
            batch = {"images": np.resize(np.array(images[:size]), (size, *images.shape[1:]))}
            calls = {name: partial(runners[name].run, batch) for name in kept}
            for name, rate in latency.throughput(calls, size, seed=recipe.seed).items():
                throughput[name][str(size)] = round(rate.items_per_s, 2)
            step(done, len(recipe.bench.batch_sizes))
    return raw, throughput


def _result(
    run: Run,
    verified: VerifyResult,
    raw: dict[str, np.ndarray],
    throughput: dict[str, dict[str, float]],
    recipe: Recipe,
    threads: int,
    busy: float,
) -> BenchResult:
    withheld: list[str] = []
    size = (run / "checkpoint" / "model.safetensors").stat().st_size
    reference = Variant(
        name=REFERENCE,
        backend="eager",
        target="cpu",
        precision="fp32",
        metric=verified.reference,
        drop=0.0,
        verdict="reference",
        size_bytes=size,
        **_timing(REFERENCE, raw, throughput, withheld),
    )
    variants = [
        _gated(variant.model_copy(update=_timing(variant.name, raw, throughput, withheld)), recipe)
        if variant.name in raw
        else variant
        for variant in verified.variants
    ]
    return BenchResult(
        run=str(run.path),
        reference=reference,
        variants=tuple(variants),
        threads=threads,
        machine=machine.describe().model_dump(mode="json"),
        busy_percent=busy,
        withheld=tuple(withheld),
        raw=RAW,
    )


def _timing(
    name: str, raw: dict[str, np.ndarray], throughput: dict[str, dict[str, float]], withheld: list[str]
) -> dict[str, Any]:
    """A variant's latency fields; a percentile that the count does not support is null and listed in `withheld`."""
    found = {f"p{q}_ms": latency.percentile(raw[name], q / 100) for q in (50, 90, 99)}
    withheld += [
        f"{name} {key.removesuffix('_ms')}: {p.reason}" for key, p in found.items() if p.value_ms is None
    ]
    speedup = latency.speedup(raw[REFERENCE], raw[name])
    return {
        **{key: p.value_ms for key, p in found.items()},
        "count": len(raw[name]),
        "speedup": speedup.ratio,
        "throughput": throughput.get(name),
    }


def _gated(variant: Variant, recipe: Recipe) -> Variant:
    """Apply the latency gates. A percentile that is gated and could not be measured fails the gate."""
    missed = []
    for key, limit in (("p50_ms", recipe.gates.max_p50_ms), ("p99_ms", recipe.gates.max_p99_ms)):
        value = getattr(variant, key)
        if limit is not None and value is None:
            missed.append(f"{key} needs more runs than the {variant.count} made (bench.samples)")
        elif limit is not None and value > limit:
            missed.append(f"{key} {value:.2f} over max_{key} {limit:g}")
    return variant.model_copy(update={"verdict": "fail", "reason": "; ".join(missed)}) if missed else variant
