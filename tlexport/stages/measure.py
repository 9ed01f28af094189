"""measure: what is timed of a run or a bundle: the variant that a target got, with real samples as its inputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tlexport import tensors
from tlexport.backends import Options, Runner, Tensors, registry
from tlexport.bundle import choice, manifest
from tlexport.errors import BundleError
from tlexport.graph import inspect, trace
from tlexport.results import BenchResult, Variant
from tlexport.run import Run, read_json


@dataclass(frozen=True)
class Subject:
    """A variant that can be loaded here, and samples to ask it."""

    model: str  # the recipe's name
    variant: Variant
    largest: int  # batch that its profile allows
    batch: Callable[[int], Tensors]  # samples -> input name -> contiguous array [samples, ...]
    load: Callable[[int], AbstractContextManager[Runner]]  # threads -> the artifact, loaded

    @property
    def name(self) -> str:
        return self.variant.name


def subject(path: Path, target: str | None) -> Subject:
    """The variant that `target` (default: the CPU, or the only one) got in a bundle or a finished run.

    A bundle's hashes are checked before anything is loaded, and its golden samples are asked; of a run it is the test split.
    Raises BundleError if `path` is neither or was altered, RecipeError for a target it does not hold, GateError if none
    passes in a run, NotInstalledError or CompileError if the variant cannot run here.
    """
    if manifest.stands_in(path):
        return _of_bundle(path, target)
    if (path / "recipe.yaml").is_file():
        return _of_run(Run(path), target)
    raise BundleError(f"{path} is neither a bundle (manifest.json) nor a run (recipe.yaml)")


def _of_bundle(bundle: Path, target: str | None) -> Subject:
    document = manifest.check(bundle)
    entry = document.targets[manifest.target(document, target)]
    names = tuple(spec.name for spec in document.inputs)
    return Subject(
        document.name,
        entry.variant,
        document.batch.max,
        partial(tensors.first, bundle / "golden" / "inputs.npy", names),
        registry.loader(entry.variant.backend, bundle / entry.file, entry.variant.target, Options()),
    )


def _of_run(run: Run, target: str | None) -> Subject:
    measured = BenchResult.model_validate(read_json(run.require("bench.json", "bench")))
    held = list(dict.fromkeys(variant.target for variant in measured.variants))
    wanted = target or ("cpu" if "cpu" in held else held[0])
    variant = choice.choose(wanted, measured.variants).variant
    assert variant.file is not None
    names = tuple(spec.name for spec in inspect.io(trace.load(run.require("graphs/fp32.onnx", "export")))[0])
    return Subject(
        run.recipe.name,
        variant,
        run.recipe.export.batch.max,
        partial(tensors.first, run.require("reference/inputs.npy", "finetune"), names),
        registry.loader(
            variant.backend,
            run / variant.file,
            variant.target,
            Options(run.recipe.tensorrt.placed(run / "cache")),
        ),
    )
