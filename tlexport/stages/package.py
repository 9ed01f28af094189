"""package: the chosen variant of each target, with its evidence, becomes a bundle."""

from __future__ import annotations

import platform
from pathlib import Path

from tlexport import hardware
from tlexport.bundle import bom, card, choice, fit, manifest
from tlexport.bundle.facts import Facts
from tlexport.bundle.signing import Sign
from tlexport.errors import BundleError, GateError
from tlexport.graph import inspect, trace
from tlexport.models.checkpoint import describe_checkpoint
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import BenchResult, FinetuneResult, PackageResult, Variant, VerifyResult
from tlexport.run import Run, digest, read_json, storage_errors

EVIDENCE = ("recipe.yaml", "verify.json", "bench.json")
JUDGED = ("finetune", "export", "quantize", "compile", "verify", "bench")


def run(
    run: Run, recipe: Recipe, progress: Progress, *, out: Path, sign: Sign | None = None
) -> PackageResult:
    """Write the bundle directory `out`, signed by `sign` before it gets its name.

    Raises GateError if a target has no passing variant for exactly the files at hand, RunError if what the verdicts rest on
    was changed since, BundleError if `out` holds something that is not a bundle.
    """
    measured = BenchResult.model_validate(read_json(run.require("bench.json", "bench")))
    targets = list(dict.fromkeys(variant.target for variant in measured.variants))
    if without := failures(measured.variants, targets):
        raise GateError(
            "no bundle: "
            + "; ".join(f"{target} has no passing variant ({why})" for target, why in without.items())
        )
    chosen = {target: choice.choose(target, measured.variants) for target in targets}
    for picked in chosen.values():
        _same_file(run, picked.variant)
    for stage in JUDGED:
        run.require_unchanged(stage)
    with storage_errors(out):
        written = _write(run, recipe, out, chosen, measured, sign)
    progress.say(
        f"package: {out}, {len(written.files)} files, {sum(f.bytes for f in written.files.values()) / 1e6:.1f} MB"
    )
    return PackageResult(
        run=str(run.path),
        bundle=str(out),
        chosen={target: picked.variant.name for target, picked in chosen.items()},
        reasons={target: picked.reason for target, picked in chosen.items()},
        losers={
            name: why
            for target, picked in chosen.items()
            for name, why in choice.losers(target, measured.variants, picked.variant).items()
        },
        signed=sign is not None,
        files=len(written.files),
        size_bytes=sum(file.bytes for file in written.files.values()),
    )


def failures(variants: tuple[Variant, ...], targets: list[str] | tuple[str, ...]) -> dict[str, str]:
    """Target -> why nothing passed, for each target without a passing variant."""
    found = {}
    for target in targets:
        of_target = [variant for variant in variants if variant.target == target]
        if not any(choice.passes(variant) for variant in of_target):
            found[target] = (
                "; ".join(f"{v.name}: {v.reason or v.verdict}" for v in of_target) or "none was compiled"
            )
    return found


def _same_file(run: Run, variant: Variant) -> None:
    """The verdict is about one file; any other one has none."""
    assert variant.file is not None
    path = run.require(variant.file, "compile")
    if digest(path) != variant.sha256:
        raise GateError(f"{path} is not the file that was verified; run: tlexport build {run.path}")


def _write(
    run: Run,
    recipe: Recipe,
    out: Path,
    chosen: dict[str, choice.Chosen],
    measured: BenchResult,
    sign: Sign | None,
) -> manifest.Manifest:
    description = describe_checkpoint(run / "checkpoint")
    extra = description.extra
    verified = run.result("verify", VerifyResult)
    inputs, outputs = inspect.io(trace.load(run / "graphs/fp32.onnx"))
    sources: dict[str, Path | bytes] = {"graphs/fp32.onnx": run / "graphs/fp32.onnx"}
    for name in ("inputs.npy", "outputs.npy"):
        sources[f"golden/{name}"] = run / "golden" / name
    for name in EVIDENCE:
        sources[f"evidence/{name}"] = run.require(name, "bench")
    if (run / "report.html").is_file():
        sources["evidence/report.html"] = run / "report.html"
    entries = {}
    for target, picked in chosen.items():
        variant = picked.variant
        assert variant.file is not None
        artifact = run / variant.file
        sources[f"models/{target}/{artifact.name}"] = artifact
        sources[f"models/{target}/receipt.json"] = artifact.parent / "receipt.json"
        entries[target] = manifest.Entry(
            variant=variant,
            file=f"models/{target}/{artifact.name}",
            receipt=f"models/{target}/receipt.json",
            reason=picked.reason,
            needs=_needs(run, variant),
        )
    document = manifest.Manifest(
        name=recipe.name,
        modality=recipe.modality,
        backbone=description.backbone,
        task=description.task,
        classes=tuple(extra["class_names"]),
        preprocessing=extra["preprocessing"],
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        batch=recipe.export.batch,
        decision=verified.decision,
        metric=recipe.metric,
        reference=measured.reference.metric,
        gates=verified.gates,
        targets=entries,
        platform=manifest.Platform(
            system=platform.system(), machine=platform.machine(), isa=hardware.instruction_sets()
        ),
        provenance={
            "stages": {name: record["versions"] for name, record in run.manifest["stages"].items()},
            "data_sha256": extra["data"]["sha256"],
        },
    )
    facts = _facts(run, recipe, document, measured, sources)
    sources[bom.NAME] = bom.build(facts)
    sources[card.NAME] = card.build(facts)
    if out.exists() and any(out.iterdir()) and not manifest.stands_in(out):
        raise BundleError(f"{out} is not empty and is not a bundle; choose another --out")
    return manifest.write(document, sources, out, sign=sign)


def _facts(
    run: Run,
    recipe: Recipe,
    document: manifest.Manifest,
    measured: BenchResult,
    sources: dict[str, Path | bytes],
) -> Facts:
    description = describe_checkpoint(run / "checkpoint")
    listed = {name: source for name, source in sources.items() if isinstance(source, Path)}
    return Facts(
        document=document,
        recipe=recipe,
        tuned=run.result("finetune", FinetuneResult),
        verified=run.result("verify", VerifyResult),
        measured=measured,
        data=description.extra["data"],
        checkpoint_sha256=description.sha256,
        hashes={
            name: digest(source)
            for name, source in listed.items()
            if name.startswith(("graphs/", "models/", "golden/"))
        },
        finished=run.manifest["stages"]["bench"]["finished"],
        images_in_report="evidence/report.html" in sources and recipe.shows_samples,
    )


def _needs(run: Run, variant: Variant) -> manifest.Needs:
    """What the runtime must read, by the library that compiled the variant and, of a graph, by its own header."""
    assert variant.file is not None
    compiled = run.manifest["stages"]["compile"]["versions"]
    names = fit.PACKAGES.get(variant.backend, (variant.backend,))
    package = next((name for name in names if name in compiled), names[0])
    model = trace.load(run / variant.file) if variant.file.endswith(".onnx") else None
    return manifest.Needs(
        opset=inspect.opset(model) if model else None,
        ir=model.ir_version if model else None,
        package=package,
        version=compiled.get(package),
    )
