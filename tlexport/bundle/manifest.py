"""manifest.json of a bundle: its contents, provenance and the SHA-256 of every file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tlexport import targets
from tlexport.errors import BundleError, RecipeError
from tlexport.results import Decision, Variant
from tlexport.run import digest, replacing, write_json
from tlexport.tensors import Profile, TensorSpec

NAME = "manifest.json"
LARGEST_MANIFEST = 16 << 20


class File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Entry(BaseModel):
    """What a target runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: Variant
    file: str
    receipt: str
    reason: str


class Manifest(BaseModel):
    """All a server and an auditor need to know without opening another file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle_version: Literal[1] = 1
    name: str
    modality: str = Field("image", description="says what `preprocessing` describes")
    backbone: str
    task: str
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: Profile
    decision: Decision | None = Field(None, description="how probabilities become a decision")
    metric: str
    reference: float | None
    gates: dict[str, Any]
    targets: dict[str, Entry]
    provenance: dict[str, Any]
    files: dict[str, File] = Field(default_factory=dict)


def write(document: Manifest, sources: dict[str, Path], out: Path) -> Manifest:
    """Copy `sources` (name in the bundle -> file) beside `out`, hash the copies, and rename: a bundle is whole or absent."""
    with replacing(out) as partial:
        files = {}
        for name, source in sorted(sources.items()):
            copy = partial / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
            files[name] = File(sha256=digest(copy), bytes=copy.stat().st_size)
        document = document.model_copy(update={"files": files})
        write_json(partial / NAME, document.model_dump(mode="json"))
    return document


def stands_in(folder: Path) -> bool:
    """Whether a bundle's manifest stands there, whole or not; a run's manifest is another document."""
    path = folder / NAME
    if not path.is_file() or path.stat().st_size > LARGEST_MANIFEST:
        return False
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "bundle_version" in document


def read(bundle: Path) -> Manifest:
    """The manifest, with names that stay inside the bundle. Raises BundleError."""
    path = bundle / NAME
    if not path.is_file():
        raise BundleError(f"{bundle} is not a bundle (no {NAME} in it)")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise BundleError(f"{path} is larger than any manifest ({LARGEST_MANIFEST >> 20} MiB)")
    try:
        document = Manifest.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (ValidationError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{path} is not a manifest this tlexport can read: {str(error).splitlines()[0]}"
        ) from error
    for name in document.files:
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts:
            raise BundleError(f"{path} names a file outside the bundle: {name!r}")
        if "\0" in name or pure.as_posix() != name or name in (".", NAME):
            raise BundleError(f"{path} names no file of a bundle: {name!r}")
    for target, entry in document.targets.items():
        if unlisted := {entry.file, entry.receipt} - document.files.keys():
            raise BundleError(f"{path} has no hash of what {target} runs: {', '.join(sorted(unlisted))}")
    return document


def target(document: Manifest, wanted: str | None) -> str:
    """The target asked for, by any of its names; without one the CPU's, else the only one. Raises RecipeError."""
    held = list(document.targets)
    if wanted is None:
        if "cpu" not in held and len(held) > 1:
            raise RecipeError(f"the bundle is for {', '.join(held)}: choose one with --target")
        return "cpu" if "cpu" in held else held[0]
    try:
        name = targets.resolve(wanted)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if name not in held:
        raise RecipeError(f"the bundle holds nothing for {name} (it is for: {', '.join(held)})")
    return name


def check(bundle: Path) -> Manifest:
    """Read the manifest and hash every file. Raises BundleError naming what is missing, altered or not listed."""
    document = read(bundle)
    wrong = []
    for name, file in document.files.items():
        path = bundle / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != file.bytes or digest(path) != file.sha256:
            wrong.append(f"{name} was altered")
    entries = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*")}
    wrong += [f"{name} is a link" for name, path in sorted(entries.items()) if path.is_symlink()]
    present = {name for name, path in entries.items() if not path.is_dir() and not path.is_symlink()}
    wrong += [f"{name} is not in the manifest" for name in sorted(present - set(document.files) - {NAME})]
    if wrong:
        raise BundleError(
            f"{bundle} is not the bundle that was packaged: {'; '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}"
        )
    return document
