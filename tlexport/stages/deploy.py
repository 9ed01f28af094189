"""deploy: a bundle is laid out for a server and put where it is found.

Every byte of the bundle is checked before it is written, and again while it is copied.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tlexport import __version__, tensors
from tlexport.bundle import archive, golden, manifest, preflight
from tlexport.bundle.layouts import Layout, Model, RawStep, Wanted, declared, triton, tuning
from tlexport.bundle.layouts.registry import LAYOUTS
from tlexport.bundle.manifest import File, Manifest
from tlexport.bundle.places import Store, address, bundles, oci, records, removal, store, versions
from tlexport.bundle.places.address import Address
from tlexport.bundle.preflight import NOBODY, Trust
from tlexport.errors import BundleError, RecipeError, StorageError
from tlexport.graph import inspect, trace
from tlexport.modalities.on_server import ON_SERVER
from tlexport.progress import Progress, byte_bar
from tlexport.results import DeployResult, MeasureResult
from tlexport.run import digest, replacing, storage_errors

LONGEST_NAME = 200  # of the 255 bytes that a file's name may have, with what the layouts add to it


@dataclasses.dataclass(frozen=True)
class Options:
    """`name`: of the served model, by default the bundle's. `raw`: also what takes a client's raw samples (Triton).
    `storage`: the URI under which a cluster finds the place (KServe). `measured`: a bench result (JSON) whose knees count.
    `keep`: older versions that stay beside the served one; None: all do.
    """

    target: str | None = None
    name: str | None = None
    flavour: str = ""
    raw: bool = False
    storage: str | None = None
    measured: Path | None = None
    instances: int | None = None
    keep: int | None = None
    dry_run: bool = False


def run(
    bundle: Path, to: str, progress: Progress, *, trust: Trust = NOBODY, options: Options | None = None
) -> DeployResult:
    """Raises PreflightError for a bundle that may not be trusted, RecipeError for what the server cannot run, BundleError if
    what is declared is not what the graph has, RunError where another deployer was faster, StorageError.
    """
    started, options = time.monotonic(), options or Options()
    place = address.parse(to)
    if "://" not in place.where and Path(place.where).resolve().is_relative_to(bundle.resolve()):
        raise RecipeError(
            f"{place.where} lies in the bundle, which must stay as it was packaged; name another place"
        )
    document = preflight.check(bundle, trust=trust)
    if place.kind in LAYOUTS:
        result = _served(bundle, document, place, options, trust, progress)
    else:
        result = _whole(bundle, document, place, options, progress)
    return result.model_copy(update={"seconds": round(time.monotonic() - started, 2)})


def _served(
    bundle: Path, document: Manifest, place: Address, options: Options, trust: Trust, progress: Progress
) -> DeployResult:
    if options.storage is not None and place.kind != "kserve":
        raise RecipeError(f"--storage-uri is KServe's: {place.where} is read by {place.kind}")
    target = manifest.target(document, options.target)
    entry = document.targets[target]
    preflight.require_vouched(bundle, document, target, trust=trust)
    at, layout = store(place.where), LAYOUTS[place.kind]
    measured = _measured(options.measured)
    tuned = tuning.tuned(entry.variant, document.batch, measured, options.instances)
    wanted = Wanted(
        name=_name(document.name if options.name is None else options.name),
        bundle=bundle,
        document=document,
        target=target,
        tuning=tuned,
        version=0,
        flavour=options.flavour or place.flavour,
        raw=_raw_step(document) if options.raw else None,
        place=(options.storage or place.where).rstrip("/"),
        golden=_golden(bundle, document),
    )
    laid = _laid(layout, wanted, _graph(bundle, entry.file))
    began = laid(1, None)  # refused before anything is written
    known = {"target": target, "variant": entry.variant.name, "bundle": document.name}
    notes = (*tuned.notes, *layout.notes(wanted))
    content = versions.identity((bundle / manifest.NAME).read_bytes(), _chosen(wanted, place))
    held = records.state(at, layout, wanted.name)
    if options.dry_run:
        found = _planned(at, layout, wanted.name, held, content, options.keep)
        models = laid(found["version"], held.current)
        return _result(bundle, place, wanted, models, notes).model_copy(update=found)
    with byte_bar(progress, f"deploying {wanted.name}", sum(map(_size, began))) as advance:
        published = versions.publish(
            at, layout, wanted.name, laid,
            content=content,
            describes=known,
            trusted={str(bundle / name): file.sha256 for name, file in document.files.items()},
            advance=advance,
        )  # fmt: skip
    before = held.whole[held.current].models if held.current in held.whole else ()
    if left := [own for own in before if own not in published.models]:
        notes += (
            f"{', '.join(left)} still names version {held.current}: remove it from the server, or deploy with --raw",
        )
    return _result(bundle, place, wanted, began, notes).model_copy(
        update={
            "version": published.version,
            "previous": published.previous,
            "files": published.files,
            "bytes": published.bytes,
            "was_there": published.was_there,
            "removed": published.removed,
            "pruned": _pruned(at, layout, wanted.name, published, options.keep),
        }
    )


def _planned(
    at: Store, layout: Layout, name: str, held: records.State, content: str, keep: int | None
) -> dict[str, Any]:
    """What a dry run tells of versions: what would be published and removed."""
    version, was_there = versions.planned(held, content)
    pruned = () if keep is None else removal.prunable(at, layout, name, held, version, held.current, keep)
    return {
        "version": version,
        "previous": held.current,
        "was_there": was_there,
        "pruned": pruned,
        "dry_run": True,
    }


def _pruned(
    at: Store, layout: Layout, name: str, published: versions.Published, keep: int | None
) -> tuple[int, ...]:
    """Raises StorageError, and then says that the new version is served all the same."""
    if keep is None:
        return ()
    try:
        return removal.prune(at, layout, name, published.version, published.previous, keep)
    except StorageError as error:
        raise StorageError(
            f"version {published.version} of {name} is served, but older ones could not be removed: {error}"
        ) from error


def _result(
    bundle: Path, place: Address, wanted: Wanted, models: tuple[Model, ...], notes: tuple[str, ...]
) -> DeployResult:
    return DeployResult(
        bundle=str(bundle),
        place=place.where,
        kind=place.kind,
        name=wanted.name,
        models=tuple(model.name for model in models),
        target=wanted.target,
        variant=wanted.entry.variant.name,
        files=sum(len(model.version) + len(model.shared) + 1 for model in models),
        bytes=sum(map(_size, models)),
        notes=notes,
    )


def _laid(
    layout: Layout, wanted: Wanted, graph: tuple[Any, Any]
) -> Callable[[int, int | None], tuple[Model, ...]]:
    """Lay a version out, and hold each Triton configuration of the model against the graph."""

    def laid(version: int, previous: int | None) -> tuple[Model, ...]:
        models = layout.models(dataclasses.replace(wanted, version=version, previous=previous))
        for model in models:
            nested = model.version.get(f"repository/{wanted.name}/{triton.CONFIG}")
            config = model.config if layout is triton and model.name == wanted.name else nested
            if isinstance(config, bytes) and (wrong := declared.differences(config, *graph)):
                raise BundleError(
                    f"what would be declared to the server is not what the graph has: {'; '.join(wrong)}"
                )
        return models

    return laid


def _graph(bundle: Path, file: str) -> tuple[Any, Any]:
    """Inputs and outputs of the graph that runs; of an engine, of the graph that it was built from."""
    path = bundle / file if file.endswith(".onnx") else bundle / "graphs" / "fp32.onnx"
    inputs, outputs = inspect.io(trace.load(path))
    return inputs, outputs


def _whole(
    bundle: Path, document: Manifest, place: Address, options: Options, progress: Progress
) -> DeployResult:
    """The bundle itself, with its manifest and its signature."""
    files = dict(document.files)
    for name in (manifest.NAME, manifest.SIGNATURE):
        if (own := bundle / name).is_file():
            files[name] = File(sha256=digest(own), bytes=own.stat().st_size)
    size = sum(file.bytes for file in files.values())
    result = DeployResult(
        bundle=str(bundle),
        place=place.where,
        kind=place.kind,
        name=document.name,
        files=len(files),
        bytes=size,
        dry_run=options.dry_run,
    )
    if given := [flag for flag, own in _of_a_server(options).items() if own]:
        raise RecipeError(f"{', '.join(given)}: a bundle goes to {place.where} as it is")
    if place.kind == "oci":
        oci.Reference(place.where)
    if options.dry_run:
        return result
    if place.kind == "tar":
        return result.model_copy(update={"was_there": _archived(bundle, Path(place.where))})
    with byte_bar(progress, f"deploying {document.name}", size) as advance:
        if place.kind == "oci":
            annotations = {
                "org.opencontainers.image.title": document.name,
                "org.tlexport.task": document.task,
            }
            found, was_there = oci.push(bundle, files, place.where, annotations, advance)
            return result.model_copy(update={"digest": found, "was_there": was_there})
        was_there = bundles.push(bundle, files, store(place.where), advance)
    return result.model_copy(update={"was_there": was_there})


def _of_a_server(options: Options) -> dict[str, bool]:
    """Flag -> whether it was given, of those that say how a model is served."""
    return {
        "--target": options.target is not None,
        "--name": options.name is not None,
        "--flavour": bool(options.flavour),
        "--raw": options.raw,
        "--storage-uri": options.storage is not None,
        "--measured": options.measured is not None,
        "--instances": options.instances is not None,
        "--keep": options.keep is not None,
    }


def _archived(bundle: Path, out: Path) -> bool:
    """Equal bundles make equal archives: whether the very same one was there. Raises StorageError for another file."""
    with (
        storage_errors(out),
        tempfile.TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None) as folder,
    ):
        made = Path(folder) / out.name
        archive.pack(bundle, made)
        if not out.exists():
            with replacing(out) as partial:
                shutil.move(made, partial)
            return False
        if digest(made) != digest(out):
            raise StorageError(f"{out} exists and is left alone; name another file")
        return True


def _name(name: str) -> str:
    """Of a model and its directory."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or len(name) > LONGEST_NAME:
        raise RecipeError(
            f"{name[:LONGEST_NAME]!r} is no name for a served model (at most {LONGEST_NAME} letters, digits, - _ . and "
            "no - or . first); give one with --name"
        )
    return name


def _measured(path: Path | None) -> MeasureResult | None:
    if path is None:
        return None
    try:
        return MeasureResult.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"--measured {path} is no result of tlexport bench BUNDLE --json ({type(error).__name__})"
        ) from error


def _golden(bundle: Path, document: Manifest) -> dict[str, np.ndarray]:
    """One golden sample by input name, without the batch's dimension."""
    inputs, _ = golden.load(bundle, document)
    held = tensors.named(inputs[:1], [spec.name for spec in document.inputs])
    return {name: array[0] for name, array in held.items()}


def _raw_step(document: Manifest) -> RawStep:
    own = ON_SERVER.get(document.modality)
    if own is None:
        raise RecipeError(
            f"--raw: a {document.modality} model takes raw values already; it is for {' and '.join(ON_SERVER)}"
        )
    return RawStep(own.input, own.files(), own.call, own.needs)


def _chosen(wanted: Wanted, place: Address) -> dict[str, Any]:
    tuned = {key: own for key, own in dataclasses.asdict(wanted.tuning).items() if key != "notes"}
    return {
        "kind": place.kind, "flavour": wanted.flavour, "raw": wanted.raw is not None, "target": wanted.target,
        "place": wanted.place, "tuning": tuned, "tlexport": __version__,
    }  # fmt: skip


def _size(model: Model) -> int:
    contents = (*model.version.values(), *model.shared.values(), model.config)
    return sum(len(own) if isinstance(own, bytes) else own.stat().st_size for own in contents)
