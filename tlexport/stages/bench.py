"""bench: the reference and every passing variant that runs here, timed in turns in one process.

What is timed is the session, not the wrapper: inputs and outputs are bound beforehand and a call only computes (on a GPU it
also copies). Each one gets the number of threads that suits it: a small model answers soonest on one. Variants for a GPU take
turns among themselves, with the reference on that GPU: none of them is sped up against a CPU, nor drops one for it.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

import numpy as np

from tlexport import cores, hardware, tensors
from tlexport.backends import Options, Runner, Tensors, eager, registry
from tlexport.bundle import choice
from tlexport.errors import CompileError
from tlexport.evidence import machine
from tlexport.evidence.latency import capacity, closed_loop
from tlexport.evidence.latency.watch import Watcher
from tlexport.graph import inspect, trace
from tlexport.models.checkpoint import WEIGHTS, describe_checkpoint, load_checkpoint
from tlexport.models.network import ServingModel
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import BenchResult, Variant, VerifyResult
from tlexport.run import Run, read_json, replacing, write_json
from tlexport.timings import Memory, Watch

REFERENCE, ON_GPU = "torch-eager", "torch-eager-gpu"
RAW = "bench-samples.npz"
BUSY = 20.0  # percent of all cores; torch's threads stall far more than in proportion when they must share
TRIAL = closed_loop.Schedule(block=5, settle=1, warmup_s=0.3, drop_ratio=None, budget_s=0.5)
TRIAL_SAMPLES = 40

Open = Callable[[int], AbstractContextManager[Runner]]  # threads -> a loaded candidate
Batch = Callable[[int], Tensors]  # samples -> inputs of the graph


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
    options = Options(recipe.tensorrt.placed(run / "cache"), cuda_graphs=recipe.bench.cuda_graphs)
    candidates = _candidates(run, verified.variants, options)
    names = tuple(spec.name for spec in inspect.io(trace.load(run.require("graphs/fp32.onnx", "export")))[0])
    batch: Batch = partial(tensors.first, run.require("reference/inputs.npy", "finetune"), names)
    given = {
        name: threads if recipe.bench.threads else fastest_threads(load, batch(1), threads)
        for together in candidates
        for name, load in together.items()
    }
    with Watcher() as watcher:
        raw, throughput = _timed(candidates, given, batch, recipe, progress, watcher.look)
    timed = [variant for variant in verified.variants if variant.name in throughput]
    memory = _memory(run, timed, batch(max(recipe.bench.batch_sizes, default=1)), given, options, progress)
    timings = _Timings(raw, throughput, given, memory, watcher.record())
    result = _result(run, verified, timings, recipe, threads, busy)
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


def _candidates(run: Run, variants: tuple[Variant, ...], options: Options) -> list[dict[str, Open]]:
    """Those that take turns, for the CPU and for the GPU: the reference, where there is a PyTorch model, and what passes."""
    on_cpu: dict[str, Open] = {}
    on_gpu: dict[str, Open] = {}
    for variant in variants:
        if variant.verdict == "pass" and variant.file is not None:
            own = on_cpu if variant.target == "cpu" else on_gpu
            own[variant.name] = registry.loader(variant.backend, run / variant.file, variant.target, options)
    if describe_checkpoint(run / "checkpoint").file == WEIGHTS:
        serving = ServingModel(load_checkpoint(run / "checkpoint")[0]).eval()
        on_cpu = {REFERENCE: partial(_reference, serving, "cpu")} | on_cpu
        on_gpu = {ON_GPU: partial(_reference, serving, "cuda")} | on_gpu if on_gpu else {}
    return [together for together in (on_cpu, on_gpu) if together]


def _reference(serving: ServingModel, device: str, threads: int) -> AbstractContextManager[Runner]:
    """The network as torch runs it on `device` by default."""
    module = serving if device == "cpu" else copy.deepcopy(serving).to(device)
    return eager.runner_for(module, inputs=serving.model.INPUTS, output=serving.output, threads=threads)


def fastest_threads(load: Open, one: Tensors, most: int) -> int:
    """1 or `most`, by a short timing of each at batch 1, one after the other: torch has one pool for the whole process."""
    medians = {}
    for threads in sorted({1, most}) if most > 1 else []:
        with load(threads) as runner:
            call = runner.bind(one).call
            times = closed_loop.interleave({"it": call}, samples=TRIAL_SAMPLES, seed=0, schedule=TRIAL)["it"]
        medians[threads] = float(np.median(times))
    return min(medians, key=medians.__getitem__, default=most)


def _timed(
    candidates: Sequence[Mapping[str, Open]],
    threads: Mapping[str, int],
    batch: Batch,
    recipe: Recipe,
    progress: Progress,
    look: Callable[[], None],
) -> tuple[closed_loop.Timed, dict[str, dict[str, float]]]:
    """What `_measure` finds of those that take turns, one group after the other."""
    raw, throughput = closed_loop.Timed({}, closed_loop.clock_ns()), dict[str, dict[str, float]]()
    began = time.perf_counter()
    for together in candidates:
        with ExitStack() as stack:
            runners = {name: stack.enter_context(load(threads[name])) for name, load in together.items()}
            times, rates = _measure(runners, batch, recipe, progress, look, began)
        raw, throughput = raw.followed_by(times), throughput | rates
    return raw, throughput


def _measure(
    runners: Mapping[str, Runner],
    batch: Batch,
    recipe: Recipe,
    progress: Progress,
    look: Callable[[], None],
    began: float,
) -> tuple[closed_loop.Timed, dict[str, dict[str, float]]]:
    """Seconds a call of every counted sample at batch 1, and samples per second by batch size for those still in the race.

    look: called between blocks of timed calls. began: the moment that their starts count from.
    """
    one = batch(1)
    bounds = {name: runner.bind(one) for name, runner in runners.items()}
    for name, bound in bounds.items():
        if bound.note:
            progress.say(f"bench: {name}: {bound.note}")
    with progress.bar("timing, batch 1", still=True) as step:

        def between(done: int, total: int) -> None:
            step(done, total)
            look()

        raw = closed_loop.interleave(
            {name: bound.call for name, bound in bounds.items()},
            samples=recipe.bench.samples,
            seed=recipe.seed,
            protected=[name for name in runners if name in (REFERENCE, ON_GPU)],
            progress=between,
            began=began,
        )
    kept = [name for name in runners if name not in raw.dropped]
    throughput: dict[str, dict[str, float]] = {name: {} for name in kept}
    with progress.bar("throughput", still=True) as step:
        for done, size in enumerate(recipe.bench.batch_sizes, start=1):
            inputs = batch(size)
            calls = {name: runners[name].bind(inputs).call for name in kept}
            for name, rate in closed_loop.throughput(calls, size, seed=recipe.seed).items():
                throughput[name][str(size)] = round(rate.items_per_s, 2)
            step(done, len(recipe.bench.batch_sizes))
            look()
    return raw, throughput


def _memory(
    run: Run,
    variants: Sequence[Variant],
    inputs: Tensors,
    threads: Mapping[str, int],
    options: Options,
    progress: Progress,
) -> dict[str, Memory | str]:
    """What each takes in a process of its own, or why that could not be told."""
    found: dict[str, Memory | str] = {}
    with progress.bar("memory") as step:
        for done, variant in enumerate(variants, start=1):
            assert variant.file is not None
            try:
                found[variant.name] = registry.memory(
                    variant.backend, run / variant.file, inputs,
                    target=variant.target, threads=threads[variant.name], options=options,
                )  # fmt: skip
            except CompileError as error:
                found[variant.name] = " ".join(str(error).split())
            step(done, len(variants))
    return found


class _Timings:
    """What was measured of each candidate, as fields of a Variant."""

    def __init__(
        self,
        raw: closed_loop.Timed,
        throughput: dict[str, dict[str, float]],
        threads: dict[str, int],
        memory: dict[str, Memory | str],
        watch: Watch,
    ) -> None:
        self.raw, self.throughput, self.threads, self.watch = raw, throughput, threads, watch
        self.latency = {name: closed_loop.summary(times) for name, times in raw.items()}
        self.memory = {name: known for name, known in memory.items() if isinstance(known, Memory)}
        self.untold = {name: why for name, why in memory.items() if isinstance(why, str)}

    @property
    def withheld(self) -> list[str]:
        """Percentiles that the count does not support: null in the variant."""
        return [
            f"{name} p{100 * p.q:g}: {p.reason}"
            for name, of in self.latency.items()
            for p in (of.p50, of.p90, of.p99)
            if p.value_ms is None
        ]

    def of(self, variant: Variant) -> dict[str, Any]:
        """Latency fields, none if it was not timed; held against the reference of its device."""
        name = variant.name
        if name not in self.raw:
            return {}
        found = self.latency[name]
        reference = self.raw.get(REFERENCE if variant.target == "cpu" else ON_GPU)
        throughput = self.throughput.get(name)
        return {
            "p50_ms": found.p50.value_ms,
            "p90_ms": found.p90.value_ms,
            "p99_ms": found.p99.value_ms,
            "latency": found,
            "unsettled": name in self.raw.unsettled,
            "threads": self.threads[name],
            "count": found.count,
            "dropped": self.raw.dropped.get(name, ""),
            "calls_per_sample": self.raw.calls_per_sample[name],
            "speedup": None if reference is None else closed_loop.speedup(reference, self.raw[name]).ratio,
            "throughput": throughput,
            "knee": capacity.knee({int(size): rate for size, rate in (throughput or {}).items()}),
            "memory": self.memory.get(name),
        }

    def notes(self, backends: Collection[str]) -> list[str]:
        """How the times came about: what was done beforehand, which are means of several calls, and what to doubt."""
        bound = "; ".join(f"{name}: {registry.BACKENDS[name].BOUND}" for name in sorted(backends))
        grouped = {name: calls for name, calls in self.raw.calls_per_sample.items() if calls > 1}
        several = ", ".join(f"{name} {calls}" for name, calls in grouped.items())
        clock = f"since reading the clock takes {self.raw.clock_ns:.0f} ns"
        unsettled = ", ".join(self.raw.unsettled)
        as_torch_does = "runs as torch does by default: convolutions in TF32 where the GPU has it, one kernel launched after the other"
        return [
            *([f"sessions were timed: {bound}"] if bound else []),
            *([f"{ON_GPU} {as_torch_does}"] if ON_GPU in self.raw else []),
            *([f"percentiles are of means of several calls ({several}), {clock}"] if several else []),
            *([f"not settled when the warm-up's time was up: {unsettled}"] if unsettled else []),
            *(f"{name}: {found.drift}" for name, found in self.latency.items() if found.drift),
            *(f"the memory of {name} is not known: {why}" for name, why in self.untold.items()),
            *self.watch.warnings,
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
    )
    variants = tuple(
        _gated(variant.model_copy(update=timings.of(variant)), recipe)
        if variant.name in timings.raw
        else variant
        for variant in verified.variants
    )
    engines = [variant for variant in variants if variant.target != "cpu" and choice.passes(variant)]
    return BenchResult(
        run=str(run.path),
        reference=reference.model_copy(update=timings.of(reference)),
        reference_on_gpu=_on_gpu(reference, timings),
        variants=variants,
        front=choice.front(variants),
        threads=threads,
        machine=machine.describe().model_dump(mode="json"),
        busy_percent=busy,
        clock_ns=timings.raw.clock_ns,
        withheld=tuple(timings.withheld),
        watch=timings.watch,
        notes=(
            *choice.against_gpu(variants, {variant.name: _layers(run, variant) for variant in engines}),
            *timings.notes({variant.backend for variant in variants if variant.name in timings.raw}),
        ),
        raw=RAW,
    )


def _on_gpu(reference: Variant, timings: _Timings) -> Variant | None:
    """The same network as it was timed on this machine's GPU; None if it was not."""
    if ON_GPU not in timings.raw:
        return None
    there = reference.model_copy(update={"name": ON_GPU, "target": hardware.capability()})
    return there.model_copy(update=timings.of(there))


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
    failed = {"verdict": "fail", "reason": "; ".join(missed), "too_slow": True}
    return variant.model_copy(update=failed) if missed else variant
