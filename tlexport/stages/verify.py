"""verify: every variant runs the test split and is held against the reference, sample by sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tlexport import targets
from tlexport.backends import Options, registry
from tlexport.errors import CompileError, DataError, ExportError, RunError
from tlexport.evidence.accuracy import noninferiority, operating, parity
from tlexport.evidence.accuracy.assessment import Assessed, Assessor, Question, adjusted
from tlexport.evidence.accuracy.comparison import Rule
from tlexport.graph import inspect, trace
from tlexport.modalities import metrics
from tlexport.models.checkpoint import Description, describe_checkpoint
from tlexport.progress import Progress
from tlexport.recipe import Gates, Recipe
from tlexport.results import AccuracyEvidence, CompileResult, Decision, Variant, VerifyResult
from tlexport.run import Run, digest, replacing, write_json

BATCH = 16
PREDICTIONS = "predictions"  # float32 [n, K] of each variant, for the report and for gates between runs
TIMEOUT = 3600.0
CHANCE = 0.05  # of a slice whose drop is taken for real, after Holm over the slices
NOT_RUN_HERE = "compiled, not run here"


def run(run: Run, recipe: Recipe, progress: Progress) -> VerifyResult:
    """Judge each compiled variant on accuracy, flips and size; writes verify.json and the variants' predictions."""
    compiled = run.result("compile", CompileResult)
    reference = run.require("reference", "finetune")
    files = [run / variant.file for variant in compiled.variants if variant.file]
    config = recipe.model_dump(
        mode="json", include={"gates", "verify", "metric", "seed", "bench", "decision"}
    )
    record = run.stage("verify", config, inputs=[reference, run / "graphs", *files])
    if (finished := record.unchanged(VerifyResult)) is not None:
        progress.say("verify: unchanged, skipped")
        return finished
    judge = Judge(run, recipe, describe_checkpoint(run / "checkpoint"), len(compiled.variants))
    tried: list[Tried] = []
    with progress.bar("verifying") as step:
        for done, variant in enumerate(compiled.variants, start=1):
            tried.append(judge.tried(variant) if variant.verdict == "unjudged" else Tried(variant))
            step(done, len(compiled.variants), variant.name)
    judged = judge.judged(tried)
    for variant, _ in judged:
        if variant.verdict in ("fail", "undecided"):
            progress.warn(f"{variant.name}: {variant.reason}")
    result = VerifyResult(
        run=str(run.path),
        metric=recipe.metric,
        reference=judge.assessor.reference.value,
        samples=len(judge.assessor.reference),
        confidence=recipe.verify.confidence,
        gates=recipe.gates.model_dump(),
        variants=tuple(variant for variant, _ in judged),
        decision=judge.assessor.question.decision,
        evidence=tuple(evidence for _, evidence in judged if evidence is not None),
    )
    write_json(run / "verify.json", result.model_dump(mode="json"))
    answers = [run / PREDICTIONS / f"{own.variant.name}.npy" for own in tried if own.assessed]
    record.finish(result, outputs=[run / "verify.json", *answers])
    return result


@dataclass(frozen=True)
class Tried:
    """A variant with its numbers; `assessed` is None where there are none, and the verdict stands already."""

    variant: Variant
    assessed: Assessed | None = None
    here: bool = False


class Judge:
    """The reference's side of every comparison, read once."""

    def __init__(self, run: Run, recipe: Recipe, description: Description, variants: int) -> None:
        self.run, self.recipe = run, recipe
        self.inputs = run / "reference/inputs.npy"
        self.input_names = tuple(spec.name for spec in inspect.io(trace.load(run / "graphs/fp32.onnx"))[0])
        names = tuple(description.extra["class_names"])
        question = Question(
            metric=recipe.metric,
            task=description.task,
            class_names=names,
            decision=_decision(run, recipe, description.task, names),
            horizon=recipe.data.series.horizon,
            least=recipe.verify.least_samples,
        )
        rule = Rule.of(recipe, metrics.METRICS, metrics.HIGHER_IS_BETTER, metrics.UNBOUNDED)
        # Resamples tell no p below one in their number, and Holm multiplies it by that of the variants.
        least = math.ceil(2 * variants / (1 - rule.confidence))
        rule = replace(rule, resamples=max(rule.resamples, least))
        self.assessor = Assessor(run / "reference", rule, question)

    def tried(self, variant: Variant) -> Tried:
        """The variant with its numbers. A crash of its backend is a failed verdict, not an error."""
        assert variant.file is not None
        artifact = self.run / variant.file
        if digest(artifact) != variant.sha256:
            changed = f"{variant.file} was changed after it was compiled; compile again"
            return Tried(variant.model_copy(update={"verdict": "fail", "reason": changed}))
        here = variant.target in registry.BACKENDS[variant.backend].availability().runs
        here = here and not variant.options.get("strip_weights")  # it runs where it is refitted
        reference = self.assessor.reference
        try:
            outputs, judged_by = self._predict(variant, artifact, here)
            found = parity.compare(reference.outputs, outputs)
        except (CompileError, ExportError) as error:
            said = " ".join(str(error).split())
            return Tried(variant.model_copy(update={"verdict": "fail", "reason": said}))
        assessed = self.assessor.assess(variant.name, outputs)
        drop, flips = assessed.drop, assessed.evidence.flips
        numbers = {
            "metric": reference.value - reference.rule.sign * drop.estimate,
            "drop": drop.estimate,
            "drop_low": drop.low,
            "drop_high": drop.high,
            "flips": flips.count if flips else None,
            "flips_upper": flips.upper if flips else None,
            "max_abs_error": found.max_abs_error,
            "usual_error": self.usual_error(outputs),
            "judged_by": judged_by,
        }
        return Tried(variant.model_copy(update=numbers), assessed, here)

    def usual_error(self, outputs: np.ndarray) -> float | None:
        """Synthetic golden samples are not of the test split's kind, so that its usual error says nothing of theirs."""
        if self.recipe.golden.source == "synthetic":
            return None
        return parity.usual_error(self.assessor.reference.outputs, outputs)

    def judged(self, tried: list[Tried]) -> list[tuple[Variant, AccuracyEvidence | None]]:
        """Each with its verdict. The variants of a target are so many chances to pass wrongly, and are corrected for that."""
        corrected: dict[str, Assessed] = {}
        for target in dict.fromkeys(own.variant.target for own in tried):
            corrected |= adjusted(
                {
                    own.variant.name: own.assessed
                    for own in tried
                    if own.assessed and own.variant.target == target
                }
            )
        return [
            self._verdict(own, corrected[own.variant.name]) if own.assessed else (own.variant, None)
            for own in tried
        ]

    def _verdict(self, tried: Tried, assessed: Assessed) -> tuple[Variant, AccuracyEvidence]:
        reference, variant = self.assessor.reference, tried.variant
        judgement = noninferiority.decide(
            assessed.drop,
            reference.limit,
            n=len(reference),
            p_adjusted=assessed.evidence.p_adjusted or 0.0,
            units=None if reference.groups is None else len(np.unique(reference.groups)),
            metric=self.recipe.metric,
            share_of=reference.value if reference.rule.unbounded else None,
        )
        missed = _missed(variant, assessed.evidence, self.recipe.gates)
        if judgement.verdict == "fail":
            missed.insert(0, judgement.reason)
        evidence = assessed.evidence.model_copy(update={"needed": judgement.needed})
        if missed:
            verdict, reason = "fail", "; ".join(missed)
        elif judgement.verdict == "undecided":
            verdict, reason = "undecided", judgement.reason
        elif tried.here:
            verdict, reason = "pass", ""
        else:
            verdict = NOT_RUN_HERE
            reason = f"accuracy judged by {variant.judged_by} on the same typed graph"
        return variant.model_copy(update={"verdict": verdict, "reason": reason}), evidence

    def _predict(self, variant: Variant, artifact: Path, here: bool) -> tuple[np.ndarray, str]:
        """float32 [n,K] from the artifact, or from its typed graph in ONNX Runtime where the artifact cannot run here."""
        graph = targets.graph(variant.precision, variant.target)
        source = artifact if here else self.run.require(f"graphs/{graph}.onnx", "quantize")
        backend = variant.backend if here else "onnxruntime"
        device = "cpu" if variant.target == "cpu" or not here else "cuda"
        with replacing(self.run / PREDICTIONS / f"{variant.name}.npy") as partial:
            provider = registry.predict(
                backend,
                source,
                self.inputs,
                partial,
                input_names=self.input_names,
                batch_size=BATCH,
                threads=self.recipe.bench.threads,
                device=device,
                judge=not here,
                options=Options(self.recipe.tensorrt.placed(self.run / "cache")),
                timeout=TIMEOUT,
            )
            return np.load(partial, allow_pickle=False), f"{backend} ({provider})"


def _decision(run: Run, recipe: Recipe, task: str, names: tuple[str, ...]) -> Decision | None:
    """The cut-off, chosen on the validation samples that the run keeps; None in a regression. Raises DataError, RunError."""
    if task == "regression":
        return None
    asked = recipe.decision
    if asked.rule == "half":
        return operating.half(task, len(names))
    if task == "multiclass":
        raise DataError(
            f"decision.rule={asked.rule} needs a task of yes or no; of several classes the most probable one is decided for (half)"
        )
    folder = run / "reference/validation"
    if not folder.is_dir():
        raise RunError(
            f"{run.path} keeps no validation samples to choose a cut-off on; fine-tune again into a new --out"
        )
    labels, outputs = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("labels", "outputs"))
    return operating.choose(labels, outputs, task, asked.rule, asked.value or 0.0, names=names)


def _missed(variant: Variant, evidence: AccuracyEvidence, gates: Gates) -> list[str]:
    """Which of the other gates are missed, and by how much."""
    missed = []
    if gates.max_flips is not None and evidence.flips and evidence.flips.share > gates.max_flips:
        missed.append(f"{evidence.flips.share:.2%} of the decisions flip, over max_flips {gates.max_flips:g}")
    limit = gates.max_slice_drop
    missed += [
        f"drop {part.drop:.4g} where {part.slice} ({part.samples} samples), over max_slice_drop {limit:g}"
        for part in evidence.slices
        if limit is not None and part.drop is not None and part.drop > limit and (part.p or 0.0) <= CHANCE
    ]
    drift = evidence.calibration
    if gates.max_ece_drift is not None and drift and drift.ece_drift_high > gates.max_ece_drift:
        missed.append(
            f"calibration error {drift.ece_drift:+.4g} against the reference, at worst {drift.ece_drift_high:+.4g}, "
            f"over max_ece_drift {gates.max_ece_drift:g}"
        )
    size = variant.size_bytes
    if gates.max_size_mb is not None and size is not None and size > gates.max_size_mb * 1e6:
        missed.append(f"{size / 1e6:.1f} MB, over max_size_mb {gates.max_size_mb:g}")
    return missed
