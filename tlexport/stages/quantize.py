"""quantize: typed graphs from the FP32 one: FP16 by cast, INT8 by Q/DQ with ranges measured on training samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx

from tlexport import tensors
from tlexport.errors import ExportError
from tlexport.evidence import machine
from tlexport.graph import calibration, cast, inspect, quantize, trace
from tlexport.progress import Progress
from tlexport.recipe import Recipe
from tlexport.results import GraphInfo, QuantizeResult
from tlexport.run import Run

BATCH = 16


def run(run: Run, recipe: Recipe, progress: Progress) -> QuantizeResult:
    """Make every graph that the recipe's precisions and targets need, under graphs/."""
    source = run.require("graphs/fp32.onnx", "export")
    samples = run.require("reference/calibration.npy", "finetune")
    wanted = graphs_for(recipe)
    config = recipe.model_dump(mode="json", include={"calibration"}) | {
        "graphs": wanted,
        "vnni": machine.has_vnni(),
    }
    record = run.stage("quantize", config, inputs=[source, samples])
    if (finished := record.unchanged(QuantizeResult)) is not None:
        progress.say("quantize: unchanged, skipped")
        return finished
    model = trace.load(source)
    drawn = np.load(samples, mmap_mode="r", allow_pickle=False)[: recipe.calibration.samples]
    made, refused = [_info(run, "fp32", "fp32", model)], {}
    for name in wanted:
        try:
            graph = _typed(name, model, drawn, recipe, progress)
        except ExportError as error:
            # One precision that the weights do not allow leaves the others standing; its variants carry the reason.
            refused[name] = str(error)
            (run / f"graphs/{name}.onnx").unlink(missing_ok=True)
            progress.warn(f"graphs/{name}.onnx: {error}")
            continue
        trace.save(graph, run / f"graphs/{name}.onnx")
        made.append(_info(run, name, name.partition("-")[0], graph))
        progress.say(
            f"quantize: graphs/{name}.onnx, {made[-1].size_bytes / 1e6:.1f} MB, compute {_counts(made[-1])}"
        )
    result = QuantizeResult(
        run=str(run.path),
        graphs=tuple(made),
        refused=refused,
        calibration_samples=len(drawn),
        calibration_method=recipe.calibration.method,
    )
    record.finish(result, outputs=[run / info.file for info in made[1:]])
    return result


def graphs_for(recipe: Recipe) -> list[str]:
    """Names of the typed graphs needed beside fp32: the INT8 flavour depends on the target."""
    names = ["fp16"] if "fp16" in recipe.precision else []
    if "int8" in recipe.precision:
        names += ["int8-cpu"] if "cpu" in recipe.targets else []
        names += ["int8-trt"] if any(target != "cpu" for target in recipe.targets) else []
    return names


def _typed(
    name: str, model: onnx.ModelProto, samples: np.ndarray, recipe: Recipe, progress: Progress
) -> onnx.ModelProto:
    if name == "fp16":
        return cast.to_fp16(model)
    return _int8(model, samples, "cpu" if name == "int8-cpu" else "trt", recipe, progress)


def _int8(
    model: onnx.ModelProto, samples: np.ndarray, flavour: quantize.Flavour, recipe: Recipe, progress: Progress
) -> onnx.ModelProto:
    chosen = recipe.calibration
    with progress.bar(f"calibrating int8-{flavour} ({chosen.method}, {len(samples)} samples)") as step:
        names = tuple(spec.name for spec in inspect.io(model)[0])

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for start in range(0, len(samples), BATCH):
                yield tensors.named(samples[start : start + BATCH], names)
                step(min(start + BATCH, len(samples)), len(samples))

        wanted = quantize.tensors_to_calibrate(model, flavour)
        ranges = calibration.calibrate(
            model, batches(), method=chosen.method, percentile=chosen.percentile, tensors=wanted
        )
    return quantize.quantize(model, ranges, flavour, reduce_range=flavour == "cpu" and not machine.has_vnni())


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
