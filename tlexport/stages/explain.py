"""explain: where the error of a variant enters, by stage and by layer, ending in one sentence a person can act on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx

from tlexport import targets, tensors
from tlexport.backends import registry, typed
from tlexport.errors import RunError
from tlexport.evidence.accuracy import flips
from tlexport.graph import attribution, inspect, probe, search, sensitivity, splice, trace
from tlexport.modalities import metrics
from tlexport.models.checkpoint import describe_checkpoint
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import CompileResult, Culprit, ErrorStep, ExplainResult, LayerNoise, Variant
from tlexport.run import Run, digest

BATCH = 4  # every layer's output of so many samples is held at once
EXPLAINED = 0.5  # of the squared error: where a culprit leaves more, the rest is asked too
ROUNDS = 3
EXACT = 1e-8  # of the outputs' variance: FP32's own rounding

Export = Callable[[], onnx.ModelProto]


def run(
    run: Run, recipe: Recipe, progress: Progress, *, name: str, samples: int, export: Export
) -> ExplainResult:
    """Explain the graph (`int8-trt`) or variant (`cpu-openvino-int8`) of that name on validation samples.

    `export` makes the FP32 graph anew from the checkpoint: it is asked only where the run's own disagrees with PyTorch.
    Raises RunError if there is no graph or variant of that name, or no samples.
    """
    graph, variant = _named(run, name)
    evidence = _Evidence(run, recipe, samples)
    steps = evidence.steps(graph, variant)
    worst = max(steps, key=_size)
    right, wrong = evidence.base(graph), evidence.graph(graph)
    if worst is steps[0]:
        right, wrong = export(), evidence.graph("fp32")
    culprits: list[Culprit] = []
    asked = 0
    in_artifact = variant is not None and worst is steps[-1]  # no graph has that error
    if _size(worst) > EXACT and not in_artifact:
        with progress.bar(f"looking for the layer in {name}"):
            culprits, asked = evidence.culprits(right, wrong)
    return ExplainResult(
        run=str(run.path),
        graph=graph,
        samples=len(evidence.outputs),
        steps=tuple(steps),
        layers=tuple(
            LayerNoise(
                layer=layer.layer,
                operator=layer.operator,
                db=None if layer.db is None or math.isinf(layer.db) else round(layer.db, 2),
                finite=layer.db is None or not math.isinf(layer.db),
            )
            for layer in attribution.ratios(right, wrong, evidence.batches, typed.executable)
        ),
        culprits=tuple(culprits),
        evaluations=asked,
        sentence=_sentence(name, worst, culprits, in_artifact),
    )


@dataclass
class _Evidence:
    """The run's graphs and the samples they are compared on."""

    run: Run
    recipe: Recipe
    wanted: int

    @cached_property
    def folder(self) -> str:
        return "reference/validation" if (self.run / "reference/validation").is_dir() else "reference"

    @cached_property
    def outputs(self) -> np.ndarray:
        """float32 [n, K]: what PyTorch serves."""
        path = self.run.require(f"{self.folder}/outputs.npy", "finetune")
        found: np.ndarray = np.load(path, allow_pickle=False)[: self.wanted]
        return found

    @cached_property
    def labels(self) -> np.ndarray:
        found: np.ndarray = np.load(self.run / self.folder / "labels.npy", allow_pickle=False)[: self.wanted]
        return found

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in inspect.io(self.graph("fp32"))[0])

    @cached_property
    def batches(self) -> list[dict[str, np.ndarray]]:
        rows = np.load(self.run / self.folder / "inputs.npy", mmap_mode="r", allow_pickle=False)
        rows = rows[: self.wanted]
        return [tensors.named(rows[at : at + BATCH], self.names) for at in range(0, len(rows), BATCH)]

    def graph(self, name: str) -> onnx.ModelProto:
        return trace.load(self.run.require(f"graphs/{name}.onnx", "quantize"))

    def base(self, name: str) -> onnx.ModelProto:
        """The FP32 graph that the typed one was made from: with its weights rescaled, where quantize found that better."""
        return self.graph(f"{name}.base" if (self.run / f"graphs/{name}.base.onnx").is_file() else "fp32")

    def steps(self, graph: str, variant: Variant | None) -> list[ErrorStep]:
        """Each step's own error: PyTorch, FP32 graph, typed graph, artifact."""
        answers = [("torch", self.outputs), ("fp32", self._answers("fp32"))]
        if graph != "fp32":
            answers.append((graph, self._answers(graph)))
        if variant is not None:
            answers.append((variant.name, self._artifact(variant)))
        return [
            self._step(f"{before} -> {after}", right, wrong)
            for (before, right), (after, wrong) in itertools.pairwise(answers)
        ]

    def _answers(self, name: str) -> np.ndarray:
        """What ONNX Runtime makes of a graph as it is written."""
        model = self.graph(name)
        session = probe.showing(typed.executable(model), [model.graph.output[0].name])
        return np.concatenate([session.run(None, dict(batch))[0] for batch in self.batches])

    def _artifact(self, variant: Variant) -> np.ndarray:
        assert variant.file is not None
        path = self.run.require(variant.file, "compile")
        if digest(path) != variant.sha256:
            raise RunError(f"{path} was changed after it was compiled; compile again")
        device = "cpu" if variant.target == "cpu" else "cuda"
        threads = self.recipe.bench.threads or 1
        with registry.BACKENDS[variant.backend].runner(path, threads=threads, device=device) as runner:
            return np.concatenate([next(iter(runner.run(batch).values())) for batch in self.batches])

    def _step(self, words: str, right: np.ndarray, wrong: np.ndarray) -> ErrorStep:
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.square(wrong.astype(np.float64) - right)
        power = float(np.square(right - right.mean(axis=0, dtype=np.float64)).mean())
        noise = float(error.mean()) / power if power > 0 else math.inf
        finite = math.isfinite(noise)
        task = describe_checkpoint(self.run / "checkpoint").task
        flipped = None
        if task != "regression":
            flipped = flips.between(
                metrics.decisions(right, task), metrics.decisions(wrong, task), self.labels
            ).count
        return ErrorStep(
            step=words,
            noise=noise if finite else None,
            db=-10 * math.log10(noise) if finite and noise > 0 else None,
            max_abs_error=float(np.sqrt(error.max())) if finite else None,
            flips=flipped,
        )

    def culprits(self, right: onnx.ModelProto, wrong: onnx.ModelProto) -> tuple[list[Culprit], int]:
        """The products that most of the error comes from, one after the other until they explain it, and the graphs run."""
        groups = splice.groups(right, wrong)
        if not groups:
            return [], 0
        answers = sensitivity.Answers(right, self.batches, typed.executable)

        def noise(low: frozenset[int]) -> float:
            return answers.noise(splice.lowered(right, wrong, [n for g in sorted(low) for n in groups[g]]))

        found: list[Culprit] = []
        suspects, asked = frozenset(range(len(groups))), 0
        while suspects and len(found) < ROUNDS:
            located = search.locate(noise, suspects)
            asked += located.evaluations
            if not found and math.isfinite(located.total) and located.total < EXACT:
                break
            group = groups[located.group]
            why = attribution.cause(right, wrong, group[0], self.batches)
            found.append(Culprit(layers=group, share=located.share, cause=why, advice=self._advice(group)))
            if located.share >= EXPLAINED:
                break
            suspects -= {located.group}
        return found, asked

    def _advice(self, layers: tuple[str, ...]) -> str:
        """What to type. A shell reads brackets and commas, so the list is quoted."""
        keep = f"'search.keep=[{', '.join(layers)}]'"
        return f"leave it in FP32: tlexport quantize {self.run.path} {keep}, or let build search: --max-drop"


def _named(run: Run, name: str) -> tuple[str, Variant | None]:
    """The typed graph of a graph's or a variant's name, and the variant."""
    graphs = sorted(p.stem for p in (run / "graphs").glob("*.onnx") if not p.stem.endswith(".base"))
    if name in graphs:
        return name, None
    variants = run.result("compile", CompileResult).variants if "compile" in run.manifest["stages"] else ()
    for variant in variants:
        if variant.name == name:
            runs_here = variant.target in registry.BACKENDS[variant.backend].availability().runs
            graph = targets.graph(variant.precision, variant.target)
            return graph, variant if runs_here and variant.file is not None else None
    raise RunError(
        f"{run.path} has no graph or variant {name!r} (graphs: {', '.join(graphs) or 'none'}; variants: "
        f"{', '.join(v.name for v in variants) or 'none'})"
    )


def _size(step: ErrorStep) -> float:
    return math.inf if step.noise is None else step.noise


def _sentence(name: str, worst: ErrorStep, culprits: list[Culprit], in_artifact: bool) -> str:
    if _size(worst) <= EXACT:
        return f"{name} answers as PyTorch does, to FP32's own rounding: no step adds an error."
    size = (
        "values that are not finite"
        if worst.noise is None
        else f"an error of {worst.noise:.2g} of the variance"
    )
    where = f"The step {worst.step} adds most: {size}"
    if not culprits:
        return (
            f"{where}; no product explains it: the artifact's own arithmetic does, compare another backend on the same graph"
            if in_artifact
            else f"{where}; no product explains it: look at the layers' ratios, the first that falls is where it enters."
        )
    first = culprits[0]
    if first.share < EXPLAINED:
        layers = ", ".join(layer for culprit in culprits for layer in culprit.layers)
        return (
            f"{where}, spread over many layers: the largest parts are {layers}; no single one explains it. Search with "
            "--max-drop, or use a higher precision."
        )
    return f"{where}, {first.share:.0%} of it in {' and '.join(first.layers)}: {first.cause}. To mend it, {first.advice}."
