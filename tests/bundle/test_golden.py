"""Golden samples are what the manifest says, or the bundle is refused, whatever its hashes are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pipeline import Built

from tlexport.bundle import golden, manifest
from tlexport.errors import BundleError


def test_they_are_read(built: Built) -> None:
    inputs, outputs = golden.load(built.bundle, manifest.read(built.bundle))
    assert len(inputs) == len(outputs) == 8 and inputs.dtype == np.uint8 and outputs.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (golden.INPUTS, lambda held: held[:0], "0 golden samples and 8 outputs"),
        (golden.OUTPUTS, lambda held: held[:5], "8 golden samples and 5 outputs"),
        (golden.INPUTS, lambda held: held.astype(np.float32), "holds images as float32"),
        (golden.INPUTS, lambda held: held.transpose(0, 2, 3, 1), "the manifest says uint8"),
        (golden.OUTPUTS, lambda held: held[:, :-1], "holds probabilities as float32 [8, 9]"),
        (golden.OUTPUTS, lambda held: np.float32(1), "a single value"),
        (golden.INPUTS, lambda held: np.zeros(8, [("a", np.uint8)]), "wanted: images"),
    ],
)
def test_others_are_refused(bundle_copy: Path, name: str, change, said: str) -> None:
    path = bundle_copy / name
    np.save(path, change(np.load(path, allow_pickle=False)), allow_pickle=False)
    with pytest.raises(BundleError) as refused:
        golden.load(bundle_copy, manifest.read(bundle_copy))
    assert said in str(refused.value)


def test_what_is_no_array_is_refused(bundle_copy: Path) -> None:
    (bundle_copy / golden.INPUTS).write_bytes(b"none")
    with pytest.raises(BundleError, match="no array that can be read"):
        golden.load(bundle_copy, manifest.read(bundle_copy))
    for size in (10**15, 10**30, -1):
        with (bundle_copy / golden.INPUTS).open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (size,)}
            np.lib.format.write_array_header_1_0(file, header)
        with pytest.raises(BundleError, match="no array that can be read"):
            golden.load(bundle_copy, manifest.read(bundle_copy))
    with (bundle_copy / golden.INPUTS).open("wb") as file:
        np.savez_compressed(file, inputs=np.zeros(8))
    with pytest.raises(BundleError, match="no array that can be read"):
        golden.load(bundle_copy, manifest.read(bundle_copy))
    np.save(bundle_copy / golden.INPUTS, np.array([{}], object), allow_pickle=True)
    with pytest.raises(BundleError, match="no array that can be read"):
        golden.load(bundle_copy, manifest.read(bundle_copy))


def test_a_type_that_numpy_does_not_know_is_no_array_s(built: Built) -> None:
    document = manifest.read(built.bundle)
    spec = document.inputs[0].model_copy(update={"dtype": "uint9"})
    with pytest.raises(BundleError, match="the manifest says uint9"):
        golden.load(built.bundle, document.model_copy(update={"inputs": (spec,)}))
