"""manifest.json of a bundle: its contents, provenance and the SHA-256 of every file.

Version 1 has neither `platform` nor an entry's `needs`; it is read as well. The schema of each version stands in docs/schemas.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tlexport import targets
from tlexport.errors import PreflightError, RecipeError
from tlexport.results import Decision, Refusal, Variant
from tlexport.run import digest, replacing, write_json
from tlexport.tensors import Profile, TensorSpec

NAME = "manifest.json"
SIGNATURE = "model.sig"  # not in the manifest: it signs that too
VERSION: Literal[2] = 2
SCHEMA_ID = "urn:tlexport:schema:bundle:2"
LARGEST_MANIFEST = 16 << 20
# In every bundle: what a server answers is held against them.
ALWAYS = ("graphs/fp32.onnx", "golden/inputs.npy", "golden/outputs.npy")


class File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0, lt=1 << 63)


class Platform(BaseModel):
    """Where a bundle was packaged: what compiled code in it was made for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: str = Field(description="Linux, Darwin or Windows")
    machine: str = Field(description="x86_64, aarch64 ...")
    isa: tuple[str, ...] = Field(description="vector extensions of its CPU; empty: they could not be read")


class Needs(BaseModel):
    """What the runtime must be able to read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    opset: int | None = Field(None, description="of a graph: its version of ONNX's default operator set")
    ir: int | None = Field(None, description="of a graph: the version of ONNX's file format")
    package: str = Field(description="the library that built the variant, by its name in pip")
    version: str | None = Field(description="of that library; null: not recorded")


class Entry(BaseModel):
    """What a target runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: Variant
    file: str
    receipt: str
    reason: str
    needs: Needs | None = None


class Manifest(BaseModel):
    """All a server and an auditor need to know without opening another file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bundle_version: Literal[1, 2] = VERSION
    name: str
    modality: str = Field("image", description="says what `preprocessing` describes")
    backbone: str
    task: str
    classes: tuple[str, ...]
    preprocessing: dict[str, Any]
    inputs: tuple[TensorSpec, ...] = Field(min_length=1)
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    batch: Profile
    decision: Decision | None = Field(None, description="how probabilities become a decision")
    metric: str
    reference: float | None
    gates: dict[str, Any]
    targets: dict[str, Entry] = Field(min_length=1)
    platform: Platform | None = None
    provenance: dict[str, Any]
    files: dict[str, File] = Field(default_factory=dict)

    @field_validator("bundle_version", mode="before")
    @classmethod
    def _whole_number(cls, given: object) -> object:
        """`true` and 1.0 equal 1, and are no version."""
        if type(given) is not int:
            raise ValueError(f"{given!r:.100} is no whole number")
        return given


def write(
    document: Manifest,
    sources: Mapping[str, Path | bytes],
    out: Path,
    *,
    sign: Callable[[Path], None] | None = None,
) -> Manifest:
    """Copy `sources` (name in the bundle -> a file, or what it holds) beside `out`, hash the copies, `sign` the folder and
    rename it: a bundle is whole or absent.
    """
    with replacing(out) as partial:
        files = {}
        for name, source in sorted(sources.items()):
            copy = partial / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, bytes):
                copy.write_bytes(source)
            else:
                shutil.copyfile(source, copy)
            files[name] = File(sha256=digest(copy), bytes=copy.stat().st_size)
        document = document.model_copy(update={"files": files})
        write_json(partial / NAME, document.model_dump(mode="json"))
        if sign is not None:
            sign(partial)
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
    """The manifest as it stands; whether the bundle is what it says is for `preflight.check`. Raises PreflightError."""
    path = bundle / NAME
    if path.is_symlink() or not path.is_file():
        there = "it is a file" if bundle.exists() else "it is not there"
        why = f"no {NAME} in it" if bundle.is_dir() else there
        raise _refused(bundle, "manifest", f"{bundle} is not a bundle ({why})")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise _refused(
            bundle, "manifest", f"{NAME} is larger than any manifest ({LARGEST_MANIFEST >> 20} MiB)"
        )
    unreadable = f"{NAME} is not a manifest this tlexport can read"
    try:
        parsed = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_each_once, parse_constant=_no_number
        )
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(bundle, "manifest", f"{unreadable}: {str(error).splitlines()[0]}") from error
    if not isinstance(parsed, dict):
        raise _refused(bundle, "manifest", f"{unreadable}: it is no JSON object")
    if "bundle_version" not in parsed and "stages" in parsed:
        reason = f"{bundle} is a run, not a bundle; make one of it: tlexport package {bundle} --out BUNDLE"
        raise _refused(bundle, "manifest", reason)
    version = parsed.get("bundle_version")
    if isinstance(version, int) and version > VERSION:
        raise _refused(
            bundle,
            "version",
            f"{unreadable}: it has version {version}, and versions 1 to {VERSION} are known; update tlexport",
        )
    try:
        return Manifest.model_validate(parsed)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise _refused(bundle, "manifest", f"{unreadable}: {where}: {first['msg']}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of several members of one name each reader takes another (RFC 8259, section 4)."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:100]!r} is there twice")
    return found


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number of JSON")


def _refused(bundle: Path, kind: Literal["manifest", "version"], reason: str) -> PreflightError:
    return PreflightError(bundle, (Refusal(kind=kind, file=NAME, reason=reason),))


def schema() -> dict[str, Any]:
    """JSON Schema of a manifest of VERSION, as docs/schemas publishes it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        **Manifest.model_json_schema(),
    }


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
