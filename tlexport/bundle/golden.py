"""Golden samples: inputs by which a client, a server and an auditor test a model, and the reference's outputs for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport import tensors
from tlexport.bundle.manifest import Manifest
from tlexport.errors import BundleError

INPUTS, OUTPUTS = "golden/inputs.npy", "golden/outputs.npy"


def load(bundle: Path, document: Manifest) -> tuple[NDArray[Any], NDArray[Any]]:
    """Inputs [n, ...], structured with a field an input where there are several, and outputs [n, ...]; n >= 1.

    To be called after the preflight. Raises BundleError if they are not what the manifest says the graph reads and makes.
    """
    inputs, outputs = (_array(bundle / name) for name in (INPUTS, OUTPUTS))
    try:
        held = tensors.named(inputs, [spec.name for spec in document.inputs])
    except ValueError as error:
        raise BundleError(f"{bundle / INPUTS}: {error}") from error
    for spec in document.inputs:
        _require(bundle / INPUTS, held[spec.name], spec)
    if not len(inputs) or len(outputs) != len(inputs):
        raise BundleError(
            f"{bundle} has {len(inputs)} golden samples and {len(outputs)} outputs for them; package it again"
        )
    _require(bundle / OUTPUTS, outputs, document.outputs[0])
    return inputs, outputs


def _array(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            found: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, OverflowError, MemoryError) as error:  # a header may announce any size
        raise BundleError(f"{path} is no array that can be read: {error}") from error
    if found.ndim == 0:
        raise BundleError(f"{path} holds a single value, not samples")
    return found


def _require(path: Path, array: NDArray[Any], spec: tensors.TensorSpec) -> None:
    if array.shape != spec.at(len(array)) or array.dtype.name != spec.dtype:
        raise BundleError(
            f"{path} holds {spec.name} as {array.dtype} {list(array.shape)}; the manifest says {spec.dtype} {list(spec.shape)}"
        )
