"""What each server wants to find: one module a layout, a value in and files out; nothing here writes anything.

A layout is a model directory with numbered versions, and one configuration that says which version is served. A version is
written whole before the configuration names it, so that a server sees the old one or the new one (see bundle.places.versions).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tlexport.bundle.layouts.tuning import Tuning
from tlexport.bundle.manifest import Entry, Manifest
from tlexport.errors import RecipeError

Content = Path | bytes


@dataclass(frozen=True)
class RawStep:
    """What turns a client's raw sample into the graph's inputs on the server: our own code, copied there as it is.

    `input`: name of the string tensor it reads. `files`: path -> source, importable by themselves. `call`: the function
    `module:function` that makes it of the manifest's preprocessing.
    """

    input: str
    files: Mapping[str, bytes]
    call: str
    needs: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """A version of a model to be laid out. `previous` is the version served until now."""

    name: str
    bundle: Path
    document: Manifest
    target: str
    tuning: Tuning
    version: int
    previous: int | None = None
    flavour: str = ""
    raw: RawStep | None = None
    place: str = ""
    golden: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entry(self) -> Entry:
        return self.document.targets[self.target]

    @property
    def artifact(self) -> Path:
        return self.bundle / self.entry.file


@dataclass(frozen=True)
class Model:
    """`version`: path below NAME/VERSION/ -> content. `shared`: path below NAME/, whose name says its content, so that no
    version's is another's. `config`: this version's configuration, kept in its directory under `Layout.CONFIG`.
    """

    name: str
    version: Mapping[str, Content]
    shared: Mapping[str, Content]
    config: bytes


def needs_onnxruntime(wanted: Wanted, server: str) -> str:
    """Why `server`, which runs ONNX Runtime's graphs alone, cannot have the variant; empty if it can."""
    variant = wanted.entry.variant
    if variant.backend == "onnxruntime":
        return ""
    return (
        f"{server} runs ONNX Runtime's graphs, and {wanted.target} has {variant.name}; "
        "build it with compile.backends=[onnxruntime]"
    )


def require_own_inputs(wanted: Wanted, server: str) -> None:
    """Raises RecipeError if `server` is to do what Triton alone can."""
    if wanted.raw or wanted.flavour:
        raise RecipeError(f"{server} takes the graph's own inputs: --raw and --flavour are Triton's")


class Layout(Protocol):
    """A module of this package. `models` are in the order in which their configurations are put in place."""

    CONFIG: str

    def models(self, wanted: Wanted) -> tuple[Model, ...]: ...

    def notes(self, wanted: Wanted) -> tuple[str, ...]:
        """What whoever deploys must be told."""

    def config_path(self, name: str) -> str:
        """Where a server finds the configuration of model `name`, below the place."""

    def merged(self, current: bytes | None, config: bytes, name: str) -> bytes:
        """What stands there once this version is served; `current` is what stands there now."""

    def served(self, current: bytes, name: str) -> int | None:
        """The version that a configuration names. Raises ValueError if it is none of this layout."""
