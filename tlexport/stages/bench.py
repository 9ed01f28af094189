"""bench: the reference and every passing variant that runs here, timed in turns in one process.

What is timed is the session, not the wrapper: inputs and outputs are bound beforehand and a call only computes (on a GPU it
also copies). Each one gets the number of threads that suits it: a small model answers soonest on one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import numpy as np

from tlexport import cores, tensors
from tlexport.backends import Options, Runner, Tensors, eager, registry
from tlexport.bundle import choice
from tlexport.evidence import machine
from tlexport.evidence.latency import closed_loop
from tlexport.graph import inspect, trace
from tlexport.models.checkpoint import WEIGHTS, describe_checkpoint, load_checkpoint
from tlexport.models.network import ServingModel
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import BenchResult, Variant, VerifyResult
from tlexport.run import Run, read_json, replacing, write_json

REFERENCE = "torch-eager"
RAW = "bench-samples.npz"
BUSY = 20.0  # percent of all cores; torch's threads stall far more than in proportion when they must share
TRIAL = closed_loop.Schedule(block=5, settle=1, warmup_s=0.3, drop_ratio=None, budget_s=0.5)
TRIAL_SAMPLES = 40

Open = Callable[[int], AbstractContextManager[Runner]]  # threads -> a loaded candidate


def run(run: Run, recipe: Recipe, progress: Progress) -> BenchResult:
    """Latency at batch 1 and throughput by batch size; the latency gates are applied. Writes bench.json and raw samples."""
    verified = run.result("verify", VerifyResult)
    files = [run / variant.file for variant in verified.variants if variant.file]
    threads = recipe.bench.threads or cores.usable()
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
    candidates = _candidates(run, verified.variants, Options(recipe.tensorrt.placed(run / "cache")))
    batch = _Batches(run)
    given = {
        name: threads if recipe.bench.threads else fastest_threads(load, batch(1), threads)
        for name, load in candidates.items()
    }
    with ExitStack() as stack:
        runners = {name: stack.enter_context(load(given[name])) for name, load in candidates.items()}
        raw, throughput = _measure(runners, batch, recipe, progress)
    result = _result(run, verified, _Timings(raw, throughput, given), recipe, threads, busy)
    for note in result.notes:
        progress.say(f"bench: {note}")
    with replacing(run / RAW) as beside, beside.open("wb") as handle:
        started = {f"started/{name}": times for name, times in raw.started.items()}
        np.savez(handle, allow_pickle=False, **raw, **started)
    write_json(run / "bench.json", result.model_dump(mode="json"))
    record.finish(result, outputs=[run / "bench.json", run / RAW])
    return result


def load(run: Run) -> BenchResult:
    """What bench wrote. Raises RunError if it has not run."""
    return BenchResult.model_validate(read_json(run.require("bench.json", "bench")))


def _candidates(run: Run, variants: tuple[Variant, ...], options: Options) -> dict[str, Open]:
    """The reference, where there is a PyTorch model, and the variants that pass."""
    found: dict[str, Open] = {}
    if describe_checkpoint(run / "checkpoint").file == WEIGHTS:
        serving = ServingModel(load_checkpoint(run / "checkpoint")[0]).eval()
        found[REFERENCE] = lambda threads: eager.runner_for(
            serving, inputs=serving.model.INPUTS, output=serving.output, threads=threads
        )
    for variant in variants:
        if variant.verdict == "pass" and variant.file is not None:
            found[variant.name] = partial(_loaded, run, variant, options)
    return found


def _loaded(run: Run, variant: Variant, options: Options, threads: int) -> AbstractContextManager[Runner]:
    assert variant.file is not None
    device = "cpu" if variant.target == "cpu" else "cuda"
    backend = registry.BACKENDS[variant.backend]
    return backend.runner(run / variant.file, threads=threads, device=device, options=options)


class _Batches:
    """The first test samples as inputs of the graph; a split that is smaller than the batch is repeated."""

    def __init__(self, run: Run) -> None:
        path = run.require("reference/inputs.npy", "finetune")
        self.samples = np.load(path, mmap_mode="r", allow_pickle=False)
        graph = trace.load(run.require("graphs/fp32.onnx", "export"))
        self.names = tuple(spec.name for spec in inspect.io(graph)[0])

    def __call__(self, size: int) -> dict[str, np.ndarray]:
        rows = np.resize(np.array(self.samples[:size]), (size, *self.samples.shape[1:]))
        return tensors.named(rows, self.names)


def fastest_threads(load: Open, one: Tensors, most: int) -> int:
    """1 or `most`, by a short timing of each at batch 1, one after the other: torch has one pool for the whole process."""
    medians = {}
    for threads in sorted({1, most}) if most > 1 else []:
        with load(threads) as runner:
            call = runner.bind(one).call
            times = closed_loop.interleave({"it": call}, samples=TRIAL_SAMPLES, seed=0, schedule=TRIAL)["it"]
        medians[threads] = float(np.median(times))
    return min(medians, key=medians.__getitem__, default=most)


def _measure(
    runners: Mapping[str, Runner], batch: _Batches, recipe: Recipe, progress: Progress
) -> tuple[closed_loop.Timed, dict[str, dict[str, float]]]:
    """Seconds a call of every counted sample at batch 1, and samples per second by batch size for those still in the race."""
    if not runners:
        return closed_loop.Timed({}, closed_loop.clock_ns()), {}
    one = batch(1)
    with progress.bar("timing, batch 1") as step:
        raw = closed_loop.interleave(
            {name: runner.bind(one).call for name, runner in runners.items()},
            samples=recipe.bench.samples,
            seed=recipe.seed,
            protected=[name for name in runners if name == REFERENCE],
            progress=step,
        )
    kept = [name for name in runners if name not in raw.dropped]
    throughput: dict[str, dict[str, float]] = {name: {} for name in kept}
    with progress.bar("throughput") as step:
        for done, size in enumerate(recipe.bench.batch_sizes, start=1):
            inputs = batch(size)
            calls = {name: runners[name].bind(inputs).call for name in kept}
            for name, rate in closed_loop.throughput(calls, size, seed=recipe.seed).items():
                throughput[name][str(size)] = round(rate.items_per_s, 2)
            step(done, len(recipe.bench.batch_sizes))
    return raw, throughput


class _Timings:
    """What was measured of each candidate, as fields of a Variant."""

    def __init__(
        self, raw: closed_loop.Timed, throughput: dict[str, dict[str, float]], threads: dict[str, int]
    ) -> None:
        self.raw, self.throughput, self.threads = raw, throughput, threads
        self.withheld: list[str] = []

    def of(self, name: str) -> dict[str, Any]:
        """Latency fields, none if it was not timed; a percentile that the count does not support is null and in `withheld`."""
        if name not in self.raw:
            return {}
        times = self.raw[name]
        found = {f"p{q}_ms": closed_loop.percentile(times, q / 100) for q in (50, 90, 99)}
        self.withheld += [
            f"{name} {key.removesuffix('_ms')}: {p.reason}" for key, p in found.items() if p.value_ms is None
        ]
        reference = self.raw.get(REFERENCE)
        return {
            **{key: p.value_ms for key, p in found.items()},
            "threads": self.threads[name],
            "count": len(times),
            "dropped": self.raw.dropped.get(name, ""),
            "calls_per_sample": self.raw.calls_per_sample[name],
            "speedup": None if reference is None else closed_loop.speedup(reference, times).ratio,
            "throughput": self.throughput.get(name),
        }

    def notes(self, backends: Collection[str]) -> list[str]:
        """How the times came about: what was done beforehand, and which are means of several calls."""
        bound = "; ".join(f"{name}: {registry.BACKENDS[name].BOUND}" for name in sorted(backends))
        grouped = {name: calls for name, calls in self.raw.calls_per_sample.items() if calls > 1}
        several = ", ".join(f"{name} {calls}" for name, calls in grouped.items())
        clock = f"since reading the clock takes {self.raw.clock_ns:.0f} ns"
        return [
            *([f"sessions were timed: {bound}"] if bound else []),
            *([f"percentiles are of means of several calls ({several}), {clock}"] if several else []),
        ]


def _result(
    run: Run, verified: VerifyResult, timings: _Timings, recipe: Recipe, threads: int, busy: float
) -> BenchResult:
    description = describe_checkpoint(run / "checkpoint")
    network = description.file == WEIGHTS
    reference = Variant(
        name=REFERENCE if network else description.backbone,
        backend="eager" if network else "library",
        target="cpu",
        precision="fp32",
        metric=verified.reference,
        drop=0.0,
        verdict="reference",
        size_bytes=(run / "checkpoint" / description.file).stat().st_size,
        **timings.of(REFERENCE),
    )
    variants = tuple(
        _gated(variant.model_copy(update=timings.of(variant.name)), recipe)
        if variant.name in timings.raw
        else variant
        for variant in verified.variants
    )
    engines = [variant for variant in variants if variant.target != "cpu" and choice.passes(variant)]
    return BenchResult(
        run=str(run.path),
        reference=reference,
        variants=variants,
        front=choice.front(variants),
        threads=threads,
        machine=machine.describe().model_dump(mode="json"),
        busy_percent=busy,
        clock_ns=timings.raw.clock_ns,
        withheld=tuple(timings.withheld),
        notes=(
            *choice.against_gpu(variants, {variant.name: _layers(run, variant) for variant in engines}),
            *timings.notes({variant.backend for variant in variants if variant.name in timings.raw}),
        ),
        raw=RAW,
    )


def _layers(run: Run, variant: Variant) -> int:
    """Layers of a compiled engine, by its receipt."""
    assert variant.file is not None
    return len(read_json((run / variant.file).parent / "receipt.json")["layers"])


def _gated(variant: Variant, recipe: Recipe) -> Variant:
    """Apply the latency gates. A percentile that is gated and could not be measured fails the gate."""
    missed = []
    for key, limit in (("p50_ms", recipe.gates.max_p50_ms), ("p99_ms", recipe.gates.max_p99_ms)):
        value = getattr(variant, key)
        if limit is not None and value is None:
            missed.append(f"{key} needs more runs than the {variant.count} made (bench.samples)")
        elif limit is not None and value > limit:
            missed.append(f"{key} {value:.3g} over max_{key} {limit:g}")
    return variant.model_copy(update={"verdict": "fail", "reason": "; ".join(missed)}) if missed else variant
