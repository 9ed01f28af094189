"""Reads the tensors of a weights file. Nothing in the file is ever executed: pickles are read with `weights_only=True`."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tlexport.errors import WeightsError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
_BROKEN = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    zipfile.BadZipFile,
)


@dataclass(frozen=True)
class StateFile:
    """Named tensors. `ordered` says whether their order is that of the network they were saved from."""

    tensors: dict[str, Tensor]
    ordered: bool
    head: tuple[str, ...] = ()  # tensors of a head that was not the library's own, left out already


@dataclass(frozen=True)
class Found:
    """A state file, where it comes from in words, and what a reader should know of it."""

    file: StateFile
    origin: str
    licence: str = "not stated"
    sha256: str | None = None
    warnings: tuple[str, ...] = ()  # count as mismatches
    notes: tuple[str, ...] = ()  # what was adapted


def read(path: Path, *, strip: bool = True) -> StateFile:
    """Read a `.safetensors`, `.npz`, `.pth`, `.pt` or `.bin` file; `strip` drops name prefixes added in training.

    Raises WeightsError if the file is missing, broken, not a state dict, or a pickle that would run code.
    """
    if not path.is_file():
        raise WeightsError(
            f"weights file {path} does not exist; give a file, package:<name>, default or none"
        )
    readers = {".safetensors": _safetensors, ".npz": _npz}
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"weights file {path} is of an unknown kind; known: {', '.join(SUFFIXES)}")
    tensors = readers.get(path.suffix, _torch)(path)
    if not tensors:
        raise WeightsError(f"weights file {path} holds no tensors")
    plain, head = _without_prefixes(tensors) if strip else (tensors, ())
    return StateFile(plain, ordered=path.suffix != ".safetensors", head=head)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [
        name for name, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())
    ]


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, *_BROKEN) as error:
        raise WeightsError(
            f"weights file {path} is not a whole safetensors file ({error}); get it again"
        ) from error


def _npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except _BROKEN as error:
        raise WeightsError(
            f"weights file {path} cannot be read as plain arrays ({error}); get it again"
        ) from error


def _torch(path: Path) -> dict[str, Tensor]:
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, str(error)) from error
    except _BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"weights file {path} is not a whole torch state dict ({reason}); get it again"
        ) from error
    return _unwrapped(path, document)


def _refused(path: Path, reason: str) -> WeightsError:
    named = re.search(r"(?:GLOBAL|global:?|class|function) `?([\w.]+\.[\w.]+)", reason)
    if named is None:
        return WeightsError(
            f"weights file {path} is not a torch state dict ({reason.strip().splitlines()[0]}); get it again"
        )
    return WeightsError(
        f"weights file {path} was refused: it is a pickle that would run {named[1]} when loaded, not only tensors. "
        "If you trust where it comes from, save its state_dict() alone, best as .safetensors, and give that file"
    )


def _unwrapped(path: Path, document: Any) -> dict[str, Tensor]:
    """The state dict in what was loaded: itself, or under one of the keys that training loops use."""
    if isinstance(document, Mapping):
        for key in _WRAPPERS:
            if isinstance(document.get(key), Mapping):
                document = document[key]
        tensors = {str(key): value.detach() for key, value in document.items() if isinstance(value, Tensor)}
        if tensors:
            return tensors
    kind = type(document).__name__
    keys = f" with keys {', '.join(map(str, list(document)[:5]))}" if isinstance(document, Mapping) else ""
    raise WeightsError(f"weights file {path} holds a {kind}{keys}, not a state dict; save model.state_dict()")


def _without_prefixes(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Strip what wrappers put before every name. Beside `backbone.*` a `head.*` may stand: a head of ours, left out."""
    head: tuple[str, ...] = ()
    for _ in range(len(_PREFIXES)):
        for prefix in _PREFIXES:
            ours = [name for name in tensors if prefix == "backbone." and name.startswith("head.")]
            rest = [name for name in tensors if name not in ours]
            if rest and all(name.startswith(prefix) for name in rest):
                tensors = {name.removeprefix(prefix): tensors[name] for name in rest}
                head += tuple(ours)
    return tensors, head
