"""verify: every variant runs the test split and is held against the reference, sample by sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tlexport import targets
from tlexport.backends import Options, registry
from tlexport.errors import CompileError, ExportError
from tlexport.evidence.accuracy import bootstrap, comparison, flips, parity
from tlexport.graph import inspect, trace
from tlexport.modalities import metrics
from tlexport.models.checkpoint import describe_checkpoint
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import CompileResult, Variant, VerifyResult
from tlexport.run import Run, digest, replacing, write_json

BATCH = 16
TIMEOUT = 3600.0
NOT_RUN_HERE = "compiled, not run here"


def run(run: Run, recipe: Recipe, progress: Progress) -> VerifyResult:
    """Judge each compiled variant on accuracy, flips and size; writes verify.json and the variants' predictions."""
    compiled = run.result("compile", CompileResult)
    reference = run.require("reference", "finetune")
    files = [run / variant.file for variant in compiled.variants if variant.file]
    config = recipe.model_dump(mode="json", include={"gates", "verify", "metric", "seed", "bench"})
    record = run.stage("verify", config, inputs=[reference, run / "graphs", *files])
    if (finished := record.unchanged(VerifyResult)) is not None:
        progress.say("verify: unchanged, skipped")
        return finished
    judge = Judge(run, recipe, describe_checkpoint(run / "checkpoint").task)
    variants = []
    with progress.bar("verifying") as step:
        for done, variant in enumerate(compiled.variants, start=1):
            variants.append(judge.judged(variant) if variant.verdict == "unjudged" else variant)
            step(done, len(compiled.variants))
            if variants[-1].verdict == "fail":
                progress.warn(f"{variant.name}: {variants[-1].reason}")
    result = VerifyResult(
        run=str(run.path),
        metric=recipe.metric,
        reference=judge.reference.value,
        samples=len(judge.reference),
        confidence=recipe.verify.confidence,
        gates=recipe.gates.model_dump(),
        variants=tuple(variants),
    )
    write_json(run / "verify.json", result.model_dump(mode="json"))
    record.finish(result, outputs=[run / "verify.json"])
    return result


class Judge:
    """The reference's side of every comparison, read once."""

    def __init__(self, run: Run, recipe: Recipe, task: str) -> None:
        self.run, self.recipe, self.task = run, recipe, task
        self.inputs = run / "reference/inputs.npy"
        rule = comparison.Rule.of(recipe, metrics.METRICS, metrics.HIGHER_IS_BETTER, metrics.UNBOUNDED)
        self.reference = comparison.Comparison.read(run / "reference", rule)
        self.input_names = tuple(spec.name for spec in inspect.io(trace.load(run / "graphs/fp32.onnx"))[0])

    def judged(self, variant: Variant) -> Variant:
        """The variant with its numbers and verdict. A crash of its backend is a failed verdict, not an error."""
        assert variant.file is not None
        artifact = self.run / variant.file
        if digest(artifact) != variant.sha256:
            return variant.model_copy(
                update={
                    "verdict": "fail",
                    "reason": f"{variant.file} was changed after it was compiled; compile again",
                }
            )
        here = variant.target in registry.BACKENDS[variant.backend].availability().runs
        here = here and not variant.options.get("strip_weights")  # it runs where it is refitted
        try:
            outputs, judged_by = self._predict(variant, artifact, here)
            found = parity.compare(self.reference.outputs, outputs)
        except (CompileError, ExportError) as error:
            return variant.model_copy(update={"verdict": "fail", "reason": " ".join(str(error).split())})
        drop = self.reference.drop(outputs)
        flipped = self._flips(outputs)
        numbers = {
            "metric": self.reference.value - self.reference.rule.sign * drop.estimate,
            "drop": drop.estimate,
            "drop_low": drop.low,
            "drop_high": drop.high,
            "flips": flipped.count if flipped else None,
            "flips_upper": flipped.upper if flipped else None,
            "max_abs_error": found.max_abs_error,
            "judged_by": judged_by,
        }
        failed = self._failed(drop, flipped.share if flipped else None, variant)
        passed = "pass" if here else NOT_RUN_HERE
        reason = failed or ("" if here else f"accuracy judged by {judged_by} on the same typed graph")
        return variant.model_copy(
            update={**numbers, "verdict": "fail" if failed else passed, "reason": reason}
        )

    def _predict(self, variant: Variant, artifact: Path, here: bool) -> tuple[np.ndarray, str]:
        """float32 [n,K] from the artifact, or from its typed graph in ONNX Runtime where the artifact cannot run here."""
        graph = targets.graph(variant.precision, variant.target)
        source = artifact if here else self.run.require(f"graphs/{graph}.onnx", "quantize")
        backend = variant.backend if here else "onnxruntime"
        device = "cpu" if variant.target == "cpu" or not here else "cuda"
        with replacing(self.run / "cache" / "predictions" / f"{variant.name}.npy") as partial:
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

    def _flips(self, outputs: np.ndarray) -> flips.Flips | None:
        """None in a regression, where nothing is decided."""
        if self.task == "regression":
            return None
        return flips.between(
            metrics.decisions(self.reference.outputs, self.task),
            metrics.decisions(outputs, self.task),
            self.reference.labels,
            confidence=self.recipe.verify.confidence,
        )

    def _failed(self, drop: bootstrap.Interval, flipped: float | None, variant: Variant) -> str:
        """Which gates are missed, and by how much; empty if none is."""
        gates = self.recipe.gates
        missed = []
        if not self.reference.within(drop):
            of = f" of the reference's {self.reference.value:.4g}" if self.reference.rule.unbounded else ""
            missed.append(
                f"{self.recipe.metric} drop {drop.estimate:.4g}, at worst {drop.high:.4g} "
                f"({self.recipe.verify.confidence:.0%} interval), over max_drop {gates.max_drop:g}{of}"
            )
        if gates.max_flips is not None and flipped is not None and flipped > gates.max_flips:
            missed.append(f"{flipped:.2%} of the decisions flip, over max_flips {gates.max_flips:g}")
        if (
            gates.max_size_mb is not None
            and variant.size_bytes is not None
            and variant.size_bytes > gates.max_size_mb * 1e6
        ):
            missed.append(f"{variant.size_bytes / 1e6:.1f} MB, over max_size_mb {gates.max_size_mb:g}")
        return "; ".join(missed)
