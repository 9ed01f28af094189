"""export: the checkpoint becomes one FP32 graph that agrees with the reference on real images, and golden samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from tlexport.backends import eager, registry
from tlexport.errors import ExportError
from tlexport.evidence import parity
from tlexport.graph import inspect, trace
from tlexport.models.checkpoint import load_checkpoint
from tlexport.models.image import ServingModel
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import ExportParity, ExportResult
from tlexport.run import Run, replacing, versions

GRAPH = "graphs/fp32.onnx"


def run(run: Run, recipe: Recipe, progress: Progress) -> ExportResult:
    """Trace, check against eager PyTorch at batch 1, 2 and the largest, keep golden samples. Raises ExportError."""
    checkpoint = run.require("checkpoint", "finetune")
    reference = run.require("reference", "finetune")
    record = run.stage(
        "export", recipe.model_dump(mode="json", include={"export", "golden"}), inputs=[checkpoint, reference]
    )
    if (finished := record.unchanged(ExportResult)) is not None:
        progress.say("export: unchanged, skipped")
        return finished
    model, spec, extra = load_checkpoint(checkpoint)
    serving = ServingModel(model).eval()
    images = np.load(reference / "inputs.npy", mmap_mode="r", allow_pickle=False)
    progress.say(f"exporting {spec.backbone} (opset {recipe.export.opset})")
    metadata = {
        "tlexport_version": versions().get("tlexport", "unknown"),
        "task": spec.task,
        "backbone": spec.backbone,
        "class_names": json.dumps(extra["class_names"]),
        "preprocessing": json.dumps(extra["preprocessing"]),
    }
    two = np.resize(
        np.array(images[:2]), (2, *images.shape[1:])
    )  # an example batch of one would fix the batch
    graph = trace.trace(serving, torch.from_numpy(two), opset=recipe.export.opset, metadata=metadata)
    trace.save(graph, run / GRAPH)
    agreement = _parity(run / GRAPH, serving, images, recipe)
    golden = _golden(run / "golden", serving, images, recipe)
    about = inspect.summary(graph)
    result = ExportResult(
        run=str(run.path),
        graph=GRAPH,
        opset=recipe.export.opset,
        parameters=about.parameters,
        size_bytes=(run / GRAPH).stat().st_size,
        parity=tuple(agreement),
        golden=golden,
    )
    record.finish(result, outputs=[run / GRAPH, run / "golden"])
    worst = max(entry.relative for entry in agreement)
    progress.say(
        f"export: {GRAPH}, worst error {worst:.1e} of the output's scale at batch {', '.join(str(e.batch) for e in agreement)}"
    )
    return result


def _parity(graph: Path, serving: ServingModel, images: np.ndarray, recipe: Recipe) -> list[ExportParity]:
    """Each output at each batch size. The batches together hold different images, so that a constant graph is noticed."""
    batches = sorted({1, 2, recipe.export.batch.max})
    found = []
    with (
        eager.runner_for(serving) as reference,
        registry.BACKENDS["onnxruntime"].runner(graph, threads=1) as candidate,
    ):
        samples = np.array(images[: max(batches)])
        # A split smaller than the largest batch is repeated: the batch size is what is under test.
        samples = np.resize(samples, (max(batches), *samples.shape[1:]))
        for batch in batches:
            count = min(len(samples) // batch, 4) if batch < max(batches) else 1
            chunks = [samples[i * batch : (i + 1) * batch] for i in range(max(count, 2 if batch == 1 else 1))]
            expected = [reference.run({"images": chunk}) for chunk in chunks]
            got = [candidate.run({"images": chunk}) for chunk in chunks]
            for output in expected[0]:
                measured = parity.compare(
                    np.concatenate([e[output] for e in expected]), np.concatenate([g[output] for g in got])
                )
                if measured.relative > recipe.export.tolerance:
                    raise ExportError(
                        f"the exported graph disagrees with PyTorch at batch {batch}: output {output!r} differs "
                        f"by {measured.max_abs_error:.3g}, {measured.relative:.2g} of its scale "
                        f"{measured.scale:.3g} (export.tolerance {recipe.export.tolerance:g})"
                    )
                found.append(
                    ExportParity(
                        output=output,
                        batch=batch,
                        max_abs_error=measured.max_abs_error,
                        scale=measured.scale,
                        relative=measured.relative,
                    )
                )
    return found


def _golden(folder: Path, serving: ServingModel, images: np.ndarray, recipe: Recipe) -> int:
    """golden/: inputs.npy uint8 [k,C,S,S] and the reference's outputs.npy float32 [k,K]. Returns k."""
    count = recipe.golden.samples
    if recipe.golden.source == "test":
        inputs = np.array(images[np.linspace(0, len(images) - 1, min(count, len(images)), dtype=int)])
    else:
        inputs = _synthetic(count, images.shape[1:], recipe.seed)
    with eager.runner_for(serving) as reference:
        outputs = reference.run({"images": inputs})["probabilities"]
    with replacing(folder) as partial:
        partial.mkdir()
        np.save(partial / "inputs.npy", inputs)
        np.save(partial / "outputs.npy", outputs)
    return len(inputs)


def _synthetic(count: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Smooth random images, uint8 [count,C,S,S]: a coarse random grid, enlarged. No patient is in them."""
    coarse = torch.rand((count, shape[0], 8, 8), generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
