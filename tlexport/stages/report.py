"""report: what the run measured, as one HTML file without outside references."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tlexport.bundle import choice
from tlexport.errors import GateError, RunError
from tlexport.evidence.report import page
from tlexport.evidence.report.document import Answers, Array, Document, Source
from tlexport.models.checkpoint import describe_checkpoint
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import (
    BaselinesResult,
    BenchResult,
    Decision,
    FinetuneResult,
    QuantizeResult,
    ReportResult,
    VerifyResult,
)
from tlexport.run import Run, digest, read_json, write_text

NAME = "report.html"
STARTED = "started/"  # of an array's name among the raw samples: when each sample started
NO_ANSWERS = (
    "The variants' answers are not in the run any more (predictions); run tlexport verify to have them."
)


def run(run: Run, recipe: Recipe, progress: Progress, *, out: Path | None = None) -> ReportResult:
    """Write `out` (default: report.html in the run) from what verify, bench and the earlier stages left.

    Raises RunError where a file is missing, cannot be read, or does not belong to the results beside it.
    """
    files = _Files(run)
    document = _document(files, recipe)
    path = out or run / NAME
    write_text(path, page.render(document))
    size = path.stat().st_size
    progress.say(f"report: {path}, {size / 1e6:.2f} MB")
    return ReportResult(
        run=str(run.path),
        path=str(path),
        bytes=size,
        sections=tuple(section.title for section in page.sections(document)),
        sources={source.file: source.sha256 for source in document.sources.values()},
    )


class _Files:
    """The run's files, each noted with its hash when it is read."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.stages: dict[str, Any] = run.manifest["stages"]
        self.sources: dict[str, Source] = {}
        self._intact: dict[str, bool] = {}

    def read(self, relative: str, stage: str) -> Path:
        """The path of a file that `stage` made; its hash is held against what the manifest records."""
        path = self.run.require(relative, stage)
        if relative not in self.sources:
            told, changed = self._recorded(relative, stage)
            self.sources[relative] = Source(relative, digest(path), told, changed)
        return path

    def array(self, relative: str, stage: str, *, mapped: bool = False) -> Array:
        """A .npy file. Raises RunError if it is truncated or no array."""
        path = self.read(relative, stage)
        try:
            found = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise RunError(
                f"{path} cannot be read ({error}); run: tlexport {stage} {self.run.path}"
            ) from error
        return np.asarray(found) if not mapped else found

    def again(self, stage: str) -> str:
        """What makes a stage's files anew."""
        return f"run: tlexport {stage} {self.run.path}"

    def _recorded(self, relative: str, stage: str) -> tuple[str, bool]:
        """By the stage that made it, itself or the folder that it stands in."""
        outputs = self.stages.get(stage, {}).get("outputs", {})
        name = next((n for n in (relative, *map(str, Path(relative).parents)) if n in outputs), None)
        if name is None:
            return "as it is now", False
        if name not in self._intact:
            self._intact[name] = digest(self.run / name) == outputs[name]
        intact = self._intact[name]
        return (f"as {stage} recorded it", False) if intact else (f"changed since {stage} recorded it", True)


def _document(files: _Files, recipe: Recipe) -> Document:
    run = files.run
    measured = BenchResult.model_validate(read_json(files.read("bench.json", "bench")))
    verified = VerifyResult.model_validate(read_json(files.read("verify.json", "verify")))
    tuned = run.result("finetune", FinetuneResult)
    files.read("recipe.yaml", "finetune")
    files.read("manifest.json", "finetune")
    beside = run.result("baselines", BaselinesResult) if "baselines" in files.stages else None
    quantized = run.result("quantize", QuantizeResult) if "quantize" in files.stages else None
    samples, started = _samples(files, measured)
    answers, why_none = _answers(files, verified, tuned, recipe)
    chosen, losers = _chosen(measured)
    return Document(
        recipe=run.recipe.model_dump(mode="json"),
        changed=_changed(run.recipe.model_dump(mode="json"), recipe.model_dump(mode="json")),
        finetune=tuned.model_dump(mode="json"),
        verify=verified.model_dump(mode="json"),
        bench=measured.model_dump(mode="json"),
        baselines=beside.model_dump(mode="json") if beside else {},
        quantize=quantized.model_dump(mode="json") if quantized else {},
        history=_history(files),
        receipts=_receipts(files, measured),
        latency_ms=samples,
        started_s=started,
        chosen=chosen,
        losers=losers,
        answers=answers,
        no_answers=why_none,
        inputs_shown=_shown(recipe)[1],
        flips=recipe.report.flips,
        versions=files.stages["bench"]["versions"] if "bench" in files.stages else {},
        sources=files.sources,
    )


def _changed(own: dict[str, Any], used: dict[str, Any], above: str = "") -> list[str]:
    """`key.path=value` of what a command line changed of the run's own recipe."""
    found = []
    for key, value in used.items():
        if isinstance(value, dict) and isinstance(own.get(key), dict):
            found += _changed(own[key], value, f"{above}{key}.")
        elif value != own.get(key):
            found.append(f"{above}{key}={json.dumps(value)}")
    return found


def _shown(recipe: Recipe) -> tuple[bool, str]:
    """Whether copies of test samples may stand on the page, and in words why."""
    asked = str(recipe.report.images).lower()
    if recipe.shows_samples:
        return True, f"samples whose decision changed (report.images: {asked})"
    if asked == "auto":
        return False, "none: golden.source is synthetic, so that no data leaves"
    return False, "none (report.images: false)"


def _chosen(measured: BenchResult) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Target -> its variant and why; every other variant -> why not."""
    chosen: dict[str, tuple[str, str]] = {}
    losers: dict[str, str] = {}
    for target in dict.fromkeys(variant.target for variant in measured.variants):
        try:
            picked = choice.choose(target, measured.variants)
        except GateError:
            losers |= {v.name: v.reason or v.verdict for v in measured.variants if v.target == target}
            continue
        chosen[target] = (picked.variant.name, picked.reason)
        losers |= choice.losers(target, measured.variants, picked.variant)
    return chosen, losers


def _samples(files: _Files, measured: BenchResult) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Timed calls in ms, and when they started in s, by variant."""
    path = files.read(measured.raw, "bench")
    try:
        with np.load(path, allow_pickle=False) as held:
            arrays = {name: np.asarray(held[name]) for name in held.files}
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise RunError(f"{path} cannot be read ({error}); {files.again('bench')}") from error
    times = {name: (a * 1e3).round(5).tolist() for name, a in arrays.items() if not name.startswith(STARTED)}
    began = {name.removeprefix(STARTED): a.tolist() for name, a in arrays.items() if name.startswith(STARTED)}
    return times, began


def _history(files: _Files) -> list[dict[str, Any]]:
    if not (files.run / "checkpoint/history.jsonl").is_file():
        return []
    text = files.read("checkpoint/history.jsonl", "finetune").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _receipts(files: _Files, measured: BenchResult) -> dict[str, Any]:
    """Variant -> its receipt, of those that were compiled."""
    held = {v.name: (Path(v.file).parent / "receipt.json").as_posix() for v in measured.variants if v.file}
    return {n: read_json(files.read(p, "compile")) for n, p in held.items() if (files.run / p).is_file()}


def _answers(
    files: _Files, verified: VerifyResult, tuned: FinetuneResult, recipe: Recipe
) -> tuple[Answers | None, str]:
    """Labels and outputs of the reference and of every variant that verify ran, or why there are none."""
    labels = files.array("reference/labels.npy", "finetune")
    reference = files.array("reference/outputs.npy", "finetune")
    variants = {}
    for variant in verified.variants:
        relative = f"predictions/{variant.name}.npy"
        if variant.max_abs_error is None or not (files.run / relative).is_file():
            continue
        outputs = files.array(relative, "verify")
        _belongs(files, files.run / relative, outputs, reference, variant.max_abs_error)
        variants[variant.name] = outputs
    if not variants:
        return None, NO_ANSWERS
    times = files.run / "reference/times.npy"
    answers = Answers(
        task=tuned.task,
        classes=tuned.classes,
        labels=labels,
        reference=reference,
        variants=variants,
        decision=_decision(verified, tuned),
        times=files.array("reference/times.npy", "finetune") if times.is_file() else None,
        inputs=files.array("reference/inputs.npy", "finetune", mapped=True) if _shown(recipe)[0] else None,
        preprocessing=describe_checkpoint(files.run / "checkpoint").extra.get("preprocessing", {}),
    )
    return answers, ""


def _decision(verified: VerifyResult, tuned: FinetuneResult) -> Decision | None:
    """What verify wrote; earlier versions wrote none and decided for the most probable class, or for labels from 0.5."""
    if tuned.task == "regression" or verified.decision is not None:
        return verified.decision
    half = (0.5,) * len(tuned.classes) if tuned.task == "multilabel" else None
    return Decision(rule="the most probable class" if half is None else "0.5", thresholds=half)


def _belongs(files: _Files, path: Path, outputs: Array, reference: Array, error: float) -> None:
    """Raises RunError unless these are the outputs that verify judged: as many, and off by what it wrote."""
    if outputs.shape != reference.shape:
        wrong = f"holds outputs {list(outputs.shape)}, the reference {list(reference.shape)}"
    else:
        found = float(np.abs(outputs.astype(np.float64) - reference.astype(np.float64)).max())
        if np.isclose(found, error, rtol=1e-6, atol=0):
            return
        wrong = f"is off by {found:.6g} from the reference, verify wrote {error:.6g}"
    raise RunError(f"{path} {wrong}: it is not what verify judged; {files.again('verify')}")
