"""npz files in MedMNIST's layout: every way to be right, and every way to be wrong."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tlexport.errors import DataError
from tlexport.modalities.image_arrays import read_npz

RANDOM = np.random.default_rng(0)


def arrays(shape: tuple[int, ...] = (8, 8), classes: int = 2, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, n in (("train", 12), ("val", 6), ("test", 8)):
        made[f"{name}_images"] = RANDOM.integers(0, 256, (n, *shape), np.uint8)
        made[f"{name}_labels"] = (np.arange(n) % classes).astype(np.uint8)[:, None]
    made.update(changes)
    return {key: value for key, value in made.items() if value is not None}


def saved(folder: Path, **content: Any) -> Path:
    np.savez_compressed(folder / "a.npz", **content)
    return folder / "a.npz"


@pytest.mark.parametrize("shape", [(8, 8), (8, 6, 3), (8, 8, 1)])
def test_three_splits(tmp_path: Path, shape: tuple[int, ...]) -> None:
    content = arrays(shape)
    samples = read_npz(saved(tmp_path, **content))
    assert (
        samples.splits is not None and samples.splits.tolist() == ["train"] * 12 + ["val"] * 6 + ["test"] * 8
    )
    assert samples.labels.dtype == np.int64 and samples.labels.tolist() == [0, 1] * 13
    val = samples.images.take(np.arange(12, 18))
    assert np.array_equal(val.reshape(content["val_images"].shape), content["val_images"])
    mixed = samples.images.take(np.array([25, 0, 12]))
    assert np.array_equal(mixed[0].ravel(), content["test_images"][7].ravel())
    assert np.array_equal(mixed[2].ravel(), content["val_images"][0].ravel())
    assert samples.names[12] == "val/0"


def test_no_splits_flat_labels_and_groups(tmp_path: Path) -> None:
    path = saved(
        tmp_path, images=RANDOM.integers(0, 9, (5, 4, 4)), labels=np.arange(5) % 2, groups=np.arange(5)
    )
    samples = read_npz(path)
    assert samples.splits is None and samples.groups is not None and samples.groups.tolist() == list("01234")


def test_multilabel(tmp_path: Path) -> None:
    labels = {
        f"{name}_labels": RANDOM.integers(0, 2, (n, 3))
        for name, n in (("train", 12), ("val", 6), ("test", 8))
    }
    samples = read_npz(saved(tmp_path, **arrays(**labels)))
    assert samples.labels.shape == (26, 3) and samples.labels.dtype == np.uint8


def test_floats_are_scaled_by_what_all_splits_hold(tmp_path: Path) -> None:
    content = arrays()
    unit = {key: value / 255 if key.endswith("images") else value for key, value in content.items()}
    whole = {
        key: value.astype(np.float32) if key.endswith("images") else value for key, value in content.items()
    }
    for variant in (unit, whole):
        samples = read_npz(saved(tmp_path, **variant))
        assert np.array_equal(samples.images.take(np.arange(12))[..., 0], content["train_images"])
        assert "rounded to 8 bits" in samples.notes[0]


def label(value: Any, dtype: Any = np.float64) -> np.ndarray:
    labels = np.arange(12).astype(dtype) % 2
    labels[3] = value
    return labels


WRONG = {
    "no known key": ({"x": np.zeros(3), "train_images": None, "val_images": None, "test_images": None}, "no train_images or images"),
    "val only": ({"train_images": None, "train_labels": None}, "no train_images"),
    "no labels": ({"train_labels": None}, "lacks train_labels"),
    "other count": ({"train_labels": np.zeros(11, int)}, "train_labels has 11 entries for 12 train_images"),
    "NaN label": ({"train_labels": label(np.nan)}, "train_labels holds NaN"),
    "fraction": ({"train_labels": label(0.5)}, "train_labels holds fractions, for instance 0.5"),
    "negative": ({"train_labels": label(-1, np.int64)}, "negative values, for instance -1"),
    "strings": ({"train_labels": np.array(["a"] * 12)}, "expected integers"),
    "labels of three dimensions": ({"train_labels": np.zeros((12, 2, 2), int)}, "expected integers"),
    "multilabel beyond 1": ({"train_labels": np.full((12, 3), 2)}, "must be 0 or 1, but holds 2"),
    "labels differ": ({"train_labels": np.zeros((12, 3), int)}, "splits differ in their labels"),
    "channels first": ({"train_images": np.zeros((12, 3, 8, 8), np.uint8)}, "channels last"),
    "volumes": ({"train_images": np.zeros((12, 8, 8, 8), np.uint8)}, "channels last"),
    "flat": ({"train_images": np.zeros((12, 64), np.uint8)}, "expected \\[n, h, w\\]"),
    "no images": ({"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0, int)}, "train_images is \\[0"),
    "complex": ({"train_images": np.zeros((12, 8, 8), complex)}, "expected uint8"),
    "NaN pixel": ({"train_images": np.full((12, 8, 8), np.nan)}, "NaN or infinity in 12 images"),
    "16 bit": ({"train_images": np.full((12, 8, 8), 4095, np.uint16)}, "reach from 0 to 4095"),
    "shapes differ": ({"val_images": np.zeros((6, 9, 9), np.uint8)}, "splits differ in image shape"),
    "groups half": ({"train_groups": np.zeros(12, int)}, "lacks val_groups, test_groups"),
    "two vals": ({"valid_images": np.zeros((1, 8, 8), np.uint8), "valid_labels": [0]}, "two arrays for one split"),
    "objects": ({"train_labels": np.array([{}] * 12, object)}, "Python objects, which could run code"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(tmp_path: Path, case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(DataError, match=message):
        read_npz(saved(tmp_path, **arrays(**changes)))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.98])
def test_a_truncated_file(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path, **arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=r"a\.npz is damaged, incomplete or no \.npz"):
        read_npz(path)


def test_flipped_bytes_are_an_error_or_do_not_matter(tmp_path: Path) -> None:
    path = saved(tmp_path, **arrays())
    whole, clean, noticed = path.read_bytes(), read_npz(path), 0
    for position in range(40, len(whole), 97):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            samples = read_npz(path)
        except DataError:
            noticed += 1
        else:
            assert np.array_equal(samples.images.take(np.arange(26)), clean.images.take(np.arange(26)))
            assert np.array_equal(samples.labels, clean.labels)
    assert noticed > 10


def test_one_flipped_bit_in_an_uncompressed_file_is_noticed(tmp_path: Path) -> None:
    content = arrays()
    np.savez(tmp_path / "a.npz", **content)
    raw = (tmp_path / "a.npz").read_bytes()
    position = raw.index(content["test_images"].tobytes()) + 77
    (tmp_path / "a.npz").write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
    with pytest.raises(DataError, match="damaged"):
        read_npz(tmp_path / "a.npz")


def member(shape: tuple[int, ...], content: bytes) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return out.getvalue() + content


def test_a_header_that_claims_more_than_is_there(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("train_images.npy", member((10**6, 10**5), b"x" * 64))
        archive.writestr("train_labels.npy", member((4,), b"\0\1\0\1"))
    with pytest.raises(DataError, match="train_images claims"):
        read_npz(tmp_path / "a.npz")


def test_what_would_unpack_beyond_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tlexport.modalities import image_arrays

    path = saved(tmp_path, **arrays())
    monkeypatch.setattr(image_arrays, "MEMORY_SHARE", 1e-12)
    with pytest.raises(DataError, match="GiB of memory can be used"):
        read_npz(path)
