"""export: the checkpoint becomes one FP32 graph that agrees with the reference on real samples, and golden samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from tlexport import tensors
from tlexport.backends import eager, registry
from tlexport.errors import ExportError
from tlexport.evidence.accuracy import parity
from tlexport.graph import inspect, trace
from tlexport.models.checkpoint import GRAPH as BASELINE
from tlexport.models.checkpoint import Description, describe_checkpoint, load_checkpoint
from tlexport.models.network import ServingModel
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import ExportParity, ExportResult
from tlexport.run import Run, replacing, versions

GRAPH = "graphs/fp32.onnx"
Answers = Callable[[np.ndarray], np.ndarray]  # inputs of some samples -> the reference's outputs [n, K]


def run(run: Run, recipe: Recipe, progress: Progress) -> ExportResult:
    """Trace, check against the reference at batch 1, 2 and the largest, keep golden samples. Raises ExportError."""
    checkpoint = run.require("checkpoint", "finetune")
    reference = run.require("reference", "finetune")
    record = run.stage(
        "export", recipe.model_dump(mode="json", include={"export", "golden"}), inputs=[checkpoint, reference]
    )
    if (finished := record.unchanged(ExportResult)) is not None:
        progress.say("export: unchanged, skipped")
        return finished
    description = describe_checkpoint(checkpoint)
    samples = np.load(reference / "inputs.npy", mmap_mode="r", allow_pickle=False)
    progress.say(f"exporting {description.backbone} (opset {recipe.export.opset})")
    with ExitStack() as stack:
        if description.file == BASELINE:
            graph, answers = trace.load(checkpoint / BASELINE), _recorded(reference, samples)
        else:
            serving = ServingModel(load_checkpoint(checkpoint)[0]).eval()
            graph = _traced(serving, samples, description, recipe)
            answers = _live(stack.enter_context(_eager(serving)), serving)
        trace.save(graph, run / GRAPH)
        agreement = _parity(run / GRAPH, graph, answers, samples, recipe)
        golden = _golden(run / "golden", answers, samples, reference, recipe)
    result = ExportResult(
        run=str(run.path),
        graph=GRAPH,
        opset=inspect.opset(graph),
        parameters=inspect.summary(graph).parameters,
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


def fresh(run: Run, recipe: Recipe) -> onnx.ModelProto:
    """The FP32 graph as the checkpoint gives it now, whatever stands in the run."""
    description = describe_checkpoint(run / "checkpoint")
    if description.file == BASELINE:
        return trace.load(run / "checkpoint" / BASELINE)
    samples = np.load(run / "reference/inputs.npy", mmap_mode="r", allow_pickle=False)
    return _traced(ServingModel(load_checkpoint(run / "checkpoint")[0]).eval(), samples, description, recipe)


def _traced(
    serving: ServingModel, samples: np.ndarray, description: Description, recipe: Recipe
) -> onnx.ModelProto:
    metadata = {
        "tlexport_version": versions().get("tlexport", "unknown"),
        "task": description.task,
        "backbone": description.backbone,
        "class_names": json.dumps(description.extra["class_names"]),
        "preprocessing": json.dumps(description.extra["preprocessing"]),
    }
    names = serving.model.INPUTS
    # A batch of 1 would be taken for a constant; a test split of one sample is shown twice.
    example = tensors.named(np.resize(np.array(samples[:2]), (2, *samples.shape[1:])), names)
    return trace.trace(
        serving,
        tuple(torch.from_numpy(example[name]) for name in names),
        opset=recipe.export.opset,
        input_names=names,
        output_name=serving.output,
        metadata=metadata,
    )


def _eager(serving: ServingModel) -> Any:
    return eager.runner_for(serving, inputs=serving.model.INPUTS, output=serving.output)


def _live(reference: Any, serving: ServingModel) -> Answers:
    """The reference itself, run on whatever it is given."""

    def answers(inputs: np.ndarray) -> np.ndarray:
        found: np.ndarray = reference.run(tensors.named(inputs, serving.model.INPUTS))[serving.output]
        return found

    return answers


def _recorded(folder: Path, samples: np.ndarray) -> Answers:
    """A plain baseline's library answered the test split when it was fitted; rows are found by their contents."""
    outputs = np.load(folder / "outputs.npy", allow_pickle=False)
    rows = {_digest(row): index for index, row in enumerate(samples)}
    return lambda inputs: outputs[[rows[_digest(row)] for row in inputs]]


def _digest(row: np.ndarray) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _parity(
    path: Path, graph: onnx.ModelProto, answers: Answers, samples: np.ndarray, recipe: Recipe
) -> list[ExportParity]:
    """The output at each batch size. The batches together hold different samples, so that a constant graph is noticed."""
    batches = sorted({1, 2, recipe.export.batch.max})
    names = tuple(spec.name for spec in inspect.io(graph)[0])
    output = inspect.io(graph)[1][0].name
    found = []
    with registry.BACKENDS["onnxruntime"].runner(path, threads=1) as candidate:
        for batch in batches:
            # A split smaller than the largest batch is repeated: the batch size is what is under test.
            count = (
                max(1, min(len(samples) // batch, 4)) if 1 < batch < max(batches) else 4 if batch == 1 else 1
            )
            rows = np.array(samples[: count * batch])
            rows = np.resize(rows, (count * batch, *rows.shape[1:]))
            got = [
                candidate.run(tensors.named(rows[start : start + batch], names))[output]
                for start in range(0, len(rows), batch)
            ]
            measured = parity.compare(answers(rows), np.concatenate(got), name=output)
            if measured.relative > recipe.export.tolerance:
                raise ExportError(
                    f"the exported graph disagrees with the reference at batch {batch}: output {output!r} differs "
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


def _golden(folder: Path, answers: Answers, samples: np.ndarray, reference: Path, recipe: Recipe) -> int:
    """golden/: inputs.npy as reference/inputs.npy has them, and the reference's outputs.npy float32 [k,K]. Returns k."""
    count = recipe.golden.samples
    if recipe.golden.source == "test":
        inputs = np.array(samples[np.linspace(0, len(samples) - 1, min(count, len(samples)), dtype=int)])
    else:
        inputs = _synthetic(count, reference, samples, recipe)
    outputs = answers(inputs)
    with replacing(folder) as partial:
        partial.mkdir()
        np.save(partial / "inputs.npy", inputs, allow_pickle=False)
        np.save(partial / "outputs.npy", outputs, allow_pickle=False)
    return len(inputs)


def _synthetic(count: int, reference: Path, samples: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Samples that nobody is in: smooth random images, or each value drawn by itself from the training samples."""
    if recipe.modality == "image":
        return _smooth(count, samples.shape[1:], recipe.seed)
    if (reference.parent / "checkpoint" / BASELINE).is_file():
        raise ExportError(
            "golden.source=synthetic needs a reference that can be asked; a plain baseline only answered its test "
            "split: use golden.source=test"
        )
    drawn = np.load(reference / "calibration.npy", allow_pickle=False)
    generator = np.random.default_rng(recipe.seed)
    made = np.empty((count, *samples.shape[1:]), samples.dtype)
    for name in samples.dtype.names or (None,):
        source, target = (drawn, made) if name is None else (drawn[name], made[name])
        flat = source.reshape(len(source), -1)
        rows = generator.integers(len(flat), size=(count, flat.shape[1]))
        target[...] = np.take_along_axis(flat, rows, axis=0).reshape(target.shape)
    return made


def _smooth(count: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """uint8 [count,C,S,S]: a coarse random grid, enlarged."""
    coarse = torch.rand((count, shape[0], 8, 8), generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=shape[1:], mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
