"""predict: a bundle's variant runs on new raw data, prepared by the bundle's own frozen description."""

from __future__ import annotations

import csv
import io
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.backends import registry
from tlexport.bundle import manifest, preflight
from tlexport.bundle.preflight import NOBODY, Trust
from tlexport.errors import (
    BundleError,
    DataError,
    RecipeError,
    StorageError,
)
from tlexport.evidence.accuracy import operating
from tlexport.modalities import MODALITIES
from tlexport.modalities.dataset import DataWarning
from tlexport.progress import Progress
from tlexport.results import PredictResult
from tlexport.run import write_text

BATCH = 64
TIMEOUT = 3600.0
_SHOWN = 10


def run(
    bundle: Path,
    data: str,
    progress: Progress,
    *,
    out: Path,
    target: str | None = None,
    trust: Trust = NOBODY,
) -> PredictResult:
    """Write `out`, a CSV of one row a sample: its name, the decision (none in a regression), each class or value.

    The bundle goes through preflight before anything is loaded: an engine is executable code. Raises PreflightError if the
    bundle may not be trusted or the variant cannot run here, RecipeError for a target that it does not hold, DataError for
    data that is not as its description says, NotInstalledError or CompileError if its backend says that it cannot run here.
    """
    started = time.monotonic()
    document, chosen = preflight.for_target(bundle, target, trust=trust)
    _require_elsewhere(out, bundle, data)
    entry = document.targets[chosen]
    device = registry.device(entry.variant.backend, chosen)
    names, inputs, notes = _samples(document, data, bundle)
    for note in notes:
        progress.warn(note)
    with progress.bar(f"predicting {len(names)} samples"), tempfile.TemporaryDirectory() as folder:
        source, answered = Path(folder) / "inputs.npy", Path(folder) / "outputs.npy"
        np.save(source, inputs, allow_pickle=False)
        provider = registry.predict(
            entry.variant.backend,
            bundle / entry.file,
            source,
            answered,
            input_names=tuple(spec.name for spec in document.inputs),
            batch_size=min(BATCH, document.batch.max),
            device=device,
            timeout=TIMEOUT,
        )
        outputs = np.load(answered, allow_pickle=False)
    _require_finite(names, outputs)
    rows, decided = _rows(names, outputs, document)
    write_text(out, _csv(rows))
    return PredictResult(
        bundle=str(bundle),
        target=chosen,
        variant=entry.variant.name,
        provider=provider,
        task=document.task,
        samples=len(names),
        decisions=decided,
        out=str(out),
        first=tuple(rows[:_SHOWN]),
        notes=notes,
        seconds=round(time.monotonic() - started, 2),
    )


def _require_elsewhere(out: Path, bundle: Path, data: str) -> None:
    """A prediction replaces neither the bundle's files, nor the data, nor a directory."""
    place = out.resolve()
    if place.is_relative_to(bundle.resolve()):
        raise RecipeError(f"--out {out} lies in the bundle, which must stay as it was packaged; name another")
    if place == Path(data).expanduser().resolve():
        raise RecipeError(f"--out {out} is the data itself; name another file")
    if out.is_dir():
        raise StorageError(
            f"--out {out} is a directory; name a file in it, for instance {out}/predictions.csv"
        )


def _samples(
    document: manifest.Manifest, data: str, bundle: Path
) -> tuple[tuple[str, ...], NDArray[Any], tuple[str, ...]]:
    """Names, the graph's inputs, and what has to be told of the data."""
    if document.modality not in MODALITIES:
        raise BundleError(
            f"{bundle} is of modality {document.modality!r}, which this tlexport does not know "
            f"(it knows: {', '.join(MODALITIES)})"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        names, inputs = MODALITIES[document.modality].samples(data, document.preprocessing)
    told = tuple(str(entry.message) for entry in caught if issubclass(entry.category, DataWarning))
    return names, inputs, told


def _require_finite(names: tuple[str, ...], outputs: NDArray[np.float32]) -> None:
    broken = np.flatnonzero(~np.isfinite(outputs).all(axis=1))
    if len(broken):
        raise DataError(
            f"{len(broken)} of {len(names)} samples get no finite answer, the first: {names[broken[0]]}; "
            "look at their values: such samples were not in training"
        )


def _rows(
    names: tuple[str, ...], outputs: NDArray[np.float32], document: manifest.Manifest
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """A dict a sample, and how often each class or label was decided for. Floats are the shortest that read back alike."""
    columns = [name if name not in ("name", "decision") else f"{name} (class)" for name in document.classes]
    values = [dict(zip(columns, (float(str(value)) for value in row), strict=True)) for row in outputs]
    if document.task == "regression":
        return [{"name": name, **own} for name, own in zip(names, values, strict=True)], {}
    decided = operating.decide(outputs, document.task, document.decision)
    words = [_words(row, document.classes) for row in decided]
    counts = Counter(word for row in words for word in row)
    rows = [
        {"name": name, "decision": "|".join(word), **own}
        for name, word, own in zip(names, words, values, strict=True)
    ]
    return rows, {name: counts[name] for name in document.classes}


def _words(decision: Any, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The class decided for, or of several labels those that hold."""
    if np.ndim(decision) == 0:
        return (classes[int(decision)],)
    return tuple(name for name, holds in zip(classes, decision, strict=True) if holds)


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
