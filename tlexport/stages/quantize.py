"""quantize: typed graphs from the FP32 one, each the fastest found whose drop on validation samples keeps gates.max_drop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx

from tlexport import targets, tensors
from tlexport.backends import registry, typed
from tlexport.errors import DataError, ExportError, GateError
from tlexport.evidence import machine
from tlexport.evidence.accuracy import comparison
from tlexport.graph import (
    budget,
    calibration,
    cast,
    cost,
    draft,
    inspect,
    int4,
    quantize,
    sensitivity,
    trace,
    versions,
)
from tlexport.graph.grid import Flavour
from tlexport.modalities import metrics
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import GraphInfo, GraphSearch, QuantizeResult
from tlexport.run import Run

BATCH = 16
TIMEOUT = 3600.0
FEWEST = 16  # calibration samples; below, the ranges of a tensor are those of a handful of samples
PROBED = 16  # calibration samples that every layer is asked with, and an improvement is judged by
LEAST_PROBED = 4
ASKED = 4  # passes over the validation samples that asking every layer may cost
ADJUSTED = 32  # calibration samples that weights and biases are adjusted on


def run(run: Run, recipe: Recipe, progress: Progress) -> QuantizeResult:
    """Make every graph that the recipe's precisions and targets need, under graphs/.

    One that cannot be made, whose calibration samples are too few or all of one class, or that misses the budget whatever
    is left in FP32, is in `refused` with the reason.
    """
    source = run.require("graphs/fp32.onnx", "export")
    reference = run.require("reference", "finetune")
    wanted = graphs_for(recipe)
    config = recipe.model_dump(mode="json", include={"calibration", "search", "verify", "seed", "metric"}) | {
        "graphs": wanted,
        "max_drop": recipe.gates.max_drop,
        "vnni": machine.has_vnni(),
    }
    record = run.stage("quantize", config, inputs=[source, reference])
    if (finished := record.unchanged(QuantizeResult)) is not None:
        progress.say("quantize: unchanged, skipped")
        return finished
    workshop = _Workshop(run, recipe, progress, trace.load(source))
    made, searches, refused = [_info(run, "fp32", "fp32", workshop.model)], [], {}
    for name in wanted:
        try:
            graph, found = workshop.typed(name)
        except (ExportError, GateError, DataError) as error:
            # One precision that weights, samples or the budget do not allow leaves the others standing; its variants carry the reason.
            refused[name] = str(error)
            (run / f"graphs/{name}.onnx").unlink(missing_ok=True)
            progress.warn(f"graphs/{name}.onnx: {error}")
            continue
        trace.save(graph, run / f"graphs/{name}.onnx")
        made.append(_info(run, name, name.partition("-")[0], graph))
        searches += [found] if found is not None else []
        progress.say(
            f"quantize: graphs/{name}.onnx, {made[-1].size_bytes / 1e6:.1f} MB, compute {_counts(made[-1])}"
        )
    result = QuantizeResult(
        run=str(run.path),
        graphs=tuple(made),
        searches=tuple(searches),
        refused=refused,
        calibration_samples=len(workshop.drawn),
        calibration_method=recipe.calibration.method,
    )
    bases = [run / f"graphs/{info.name}.base.onnx" for info in made[1:]]
    record.finish(
        result, outputs=[*(run / info.file for info in made[1:]), *(path for path in bases if path.is_file())]
    )
    return result


def graphs_for(recipe: Recipe) -> list[str]:
    """Names of the typed graphs needed beside fp32: the flavour of INT8 and INT4 depends on the target."""
    wanted = [name for name in ("fp16", "bf16", "fp8", "int8", "int4") if name in recipe.precision]
    cpu_first = sorted(recipe.targets, key=lambda target: target != "cpu")
    return list(dict.fromkeys(targets.graph(precision, t) for precision in wanted for t in cpu_first))


@dataclass
class _Workshop:
    """What every typed graph of the run is made from."""

    run: Run
    recipe: Recipe
    progress: Progress
    model: onnx.ModelProto

    def typed(self, name: str) -> tuple[onnx.ModelProto, GraphSearch | None]:
        """The graph of that name, and how it was found if there was a budget to keep."""
        if name in ("fp16", "bf16"):
            return self._within_budget(name, self._in_16_bits("bf16" if name == "bf16" else "fp16"), ())
        self._require_samples()
        if name.startswith("int4"):
            return self._within_budget(name, self._int4(for_cpu=name == "int4-cpu"), ())
        flavours: dict[str, Flavour] = {"int8-cpu": "cpu", "int8-trt": "trt", "fp8": "fp8"}
        plain = self._in_8_bits(name, flavours[name])
        return self._within_budget(name, plain, draft.improvements(learn=self.recipe.search.learn))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in inspect.io(self.model)[0])

    @cached_property
    def drawn(self) -> np.ndarray:
        """The calibration samples."""
        rows: np.ndarray = np.load(self.run / "reference/calibration.npy", mmap_mode="r", allow_pickle=False)
        return rows[: self.recipe.calibration.samples]

    def _require_samples(self) -> None:
        """Raises DataError if the calibration samples cannot calibrate anything."""
        if (count := len(self.drawn)) < FEWEST:
            raise DataError(
                f"{count} calibration samples (calibration.samples, at most the training split): ranges need at least "
                f"{FEWEST}; give more, or use a precision that is not calibrated (fp32, fp16, bf16)"
            )
        labels = np.load(self.run / "reference/calibration-labels.npy", allow_pickle=False)[:count]
        if labels.dtype == np.int64 and len(np.unique(labels)) == 1:
            raise DataError(
                f"all {count} calibration samples are of one class: the ranges of the others' activations would be guessed; "
                "raise calibration.samples, or use a precision that is not calibrated (fp32, fp16, bf16)"
            )

    def _in_16_bits(self, name: cast.HalfName) -> budget.Cast:
        fixed = self.recipe.search.keep
        return budget.Cast(self.model, lambda kept: cast.to_half(self.model, name, exclude={*fixed, *kept}))

    def _in_8_bits(self, name: str, flavour: Flavour) -> draft.Draft:
        chosen = self.recipe.calibration
        # A float's steps grow with it, so that clipping wins nothing.
        method: calibration.Method = "max" if flavour == "fp8" else chosen.method
        with self.progress.bar(f"calibrating {name} ({method}, {len(self.drawn)} samples)") as step:
            ranges = calibration.calibrate(
                self.model,
                self._batches(0, len(self.drawn), step),
                method=method,
                percentile=chosen.percentile,
                flavour=flavour,
                tensors=quantize.tensors_to_calibrate(self.model, flavour),
            )
        narrow = flavour == "cpu" and not machine.has_vnni()
        fixed = self.recipe.search.keep
        return draft.Draft(self.model, self.model, ranges, flavour, narrow, fixed, self._samples)

    def _int4(self, *, for_cpu: bool) -> budget.Cast:
        """Everything but the weights stays FP32 for CPUs, and becomes FP16 for GPUs."""
        model = versions.at_least(self.model, int4.OPSET)
        fixed = self.recipe.search.keep
        with self.progress.bar(f"calibrating int4 ({len(self.drawn)} samples)") as step:
            importance = int4.mean_squares(model, self._batches(0, len(self.drawn), step))

        def make(kept: Collection[str]) -> onnx.ModelProto:
            exclude = {*fixed, *kept}
            floats = model if for_cpu else cast.to_half(model, "fp16", exclude=exclude)
            return int4.weights_to_int4(floats, importance, for_cpu=for_cpu, exclude=exclude)

        return budget.Cast(model, make)

    def _batches(
        self, first: int, last: int, step: Callable[[int, int], None] | None = None
    ) -> Iterator[dict[str, np.ndarray]]:
        for start in range(first, last, BATCH):
            stop = min(start + BATCH, last)
            yield tensors.named(self.drawn[start:stop], self.names)
            if step is not None:
                step(stop - first, last - first)

    @cached_property
    def _samples(self) -> draft.Samples:
        """All, and a few to adjust weights on: none of those that `_answers` judges the adjustment by, if there are others."""
        count = min(ADJUSTED, max(len(self.drawn) - PROBED, PROBED))
        return draft.Samples(
            lambda: self._batches(0, len(self.drawn)), list(self._batches(0, min(count, len(self.drawn))))
        )

    @cached_property
    def _probes(self) -> int:
        """Samples that every layer is asked with: fewer where validation has so few that they would cost more than ASKED passes."""
        folder = self.run / "reference/validation"
        judged = len(np.load(folder / "labels.npy", mmap_mode="r")) if folder.is_dir() else PROBED
        layers = max(1, len(inspect.compute_dtypes(self.model)))
        return int(np.clip(ASKED * judged // layers, LEAST_PROBED, PROBED))

    @cached_property
    def _answers(self) -> sensitivity.Answers:
        """The scores of the last calibration samples."""
        batches = list(self._batches(max(0, len(self.drawn) - self._probes), len(self.drawn)))
        return sensitivity.Answers(self.model, batches, typed.executable)

    def _within_budget(
        self, name: str, plain: budget.L, rounds: Sequence[Sequence[budget.Improvement[budget.L]]]
    ) -> tuple[onnx.ModelProto, GraphSearch | None]:
        config, folder = self.recipe.search, self.run / "reference/validation"
        if not config.enabled or not folder.is_dir():
            return plain.make(()), None
        rule = comparison.Rule.of(self.recipe, metrics.METRICS, metrics.HIGHER_IS_BETTER, metrics.UNBOUNDED)
        reference = comparison.Comparison.read(folder, rule)
        hunt = budget.Hunt(
            name,
            lambda graph: self._verdict(name, graph, reference),
            self._answers,
            cost.CPU if name.endswith("-cpu") else cost.GPU,
            budget.Effort(len(reference), config.evaluations, config.least, config.report),
            self.progress,
        )
        try:
            found = hunt.fastest(plain, rounds)
        except DataError as error:
            # Validation has too few samples to judge by; verify will say what test can say.
            found = budget.Found(plain.make(()), plain.base, note=f"not searched: {error}")
        if found.note:
            self.progress.warn(f"search {name}: {found.note}")
        self._keep_base(name, found.base)
        return found.graph, GraphSearch(
            graph=name,
            budget=reference.limit,
            samples=len(reference),
            cost_model=hunt.machine.name,
            trials=tuple(hunt.trials),
            layers=found.layers,
            kept=found.kept,
            evaluations=round(hunt.evaluations, 2),
            note=found.note,
        )

    def _keep_base(self, name: str, base: onnx.ModelProto) -> None:
        """The FP32 graph that the typed one was made from, if its weights were rescaled: explain-drop compares with it."""
        path = self.run / f"graphs/{name}.base.onnx"
        path.unlink(missing_ok=True)
        if base is not self.model and not name.startswith("int4"):
            trace.save(base, path)

    def _verdict(
        self, name: str, graph: onnx.ModelProto, reference: comparison.Comparison
    ) -> budget.Verdict | None:
        """The graph's drop on the validation samples, run as verify would run it."""
        folder = self.run / "cache" / "search"
        trace.save(graph, folder / f"{name}.onnx")
        outputs = folder / f"{name}.npy"
        registry.predict(
            "onnxruntime",
            folder / f"{name}.onnx",
            self.run / "reference/validation/inputs.npy",
            outputs,
            input_names=self.names,
            batch_size=BATCH,
            threads=self.recipe.bench.threads,
            judge=not name.endswith("-cpu"),
            timeout=TIMEOUT,
        )
        found = np.load(outputs, allow_pickle=False)
        if not np.isfinite(found).all():
            return None
        drop = reference.drop(found)
        return budget.Verdict(drop.estimate, drop.low, drop.high, reference.limit)


def _info(run: Run, name: str, precision: str, model: onnx.ModelProto) -> GraphInfo:
    path = run / f"graphs/{name}.onnx"
    compute = dict(Counter(inspect.compute_dtypes(model).values()))
    return GraphInfo(
        name=name,
        precision=precision,
        file=run.relative(path),
        size_bytes=path.stat().st_size,
        compute=compute,
    )


def _counts(info: GraphInfo) -> str:
    return ", ".join(f"{dtype} x {count}" for dtype, count in info.compute.items())
