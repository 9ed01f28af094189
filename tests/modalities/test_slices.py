"""Columns by which drops are told apart: parts of a column, and that they reach the reference whole and in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tlexport import recipe
from tlexport.errors import DataError
from tlexport.modalities import image, reference, slices, tabular


def test_texts_stay_and_many_numbers_become_quarters() -> None:
    assert slices.parts("sex", ["F", "M", None, " F ", ""]).tolist() == ["F", "M", "missing", "F", "missing"]
    ages = [*range(1, 101), None]
    found = slices.parts("age", ages)
    assert dict(zip(*np.unique(found, return_counts=True), strict=True)) == {
        "<=25.75": 25,
        "25.75 to 50.5": 25,
        "50.5 to 75.25": 25,
        ">75.25": 25,
        "missing": 1,
    }
    assert found[0] == "<=25.75" and found[99] == ">75.25"


def test_a_column_that_is_not_there_or_tells_nobody_apart_is_refused() -> None:
    with pytest.raises(DataError, match=r"names 'hospital'.*columns are: sex, age"):
        slices.read(["hospital"], ["sex", "age"], lambda name: [])
    with pytest.raises(DataError, match="51 different texts"):
        slices.parts("patient", [f"P{i}" for i in range(51)])


def test_a_tables_slices_follow_their_rows_into_the_reference(tmp_path: Path) -> None:
    """The sex is a function of the first feature: whatever was shuffled, it must still be."""
    rng = np.random.default_rng(0)
    dose = rng.normal(size=300)
    sick = (dose + rng.normal(size=300) > 0).astype(int)
    rows = [f"{d:.6f},{'F' if d > 0.3 else 'M'},{s}" for d, s in zip(dose, sick, strict=True)]
    path = tmp_path / "table.csv"
    path.write_text("dose,sex,sick\n" + "\n".join(rows) + "\n")
    asked = recipe.Data.model_validate(
        {"path": str(path), "slices": ["sex"], "table": {"target": "sick", "exclude": ["sex"]}}
    )
    data = tabular.load(asked, task="auto", seed=3, cache=None)
    reference.keep(
        tmp_path / "reference",
        reference.Judged(data.test, np.zeros((len(data.test), 2))),
        data.train,
        samples=10,
        seed=0,
    )
    inputs = np.load(tmp_path / "reference/inputs.npy")
    with np.load(tmp_path / "reference/slices.npz", allow_pickle=False) as kept:
        sex = kept["sex"]
    assert inputs.shape[1] == 1 and set(sex) == {"F", "M"}
    assert np.array_equal(sex == "F", inputs[:, 0] > 0.3)
    names = np.load(tmp_path / "reference/names.npy", allow_pickle=False)
    assert names.shape == (len(data.test),) and all(name.startswith("row ") for name in names)


def test_images_without_a_manifest_have_no_columns(tmp_path: Path) -> None:
    asked = recipe.Data.model_validate({"path": "sklearn/digits", "slices": ["sex"]})
    with pytest.raises(DataError, match="only a CSV manifest has"):
        image.load(asked, task="auto", seed=0, cache=None)


def test_a_manifests_columns_become_slices(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(1)
    lines = ["path,label,scanner"]
    for index in range(40):
        scanner = "old" if index % 3 else "new"
        pixels = rng.integers(0, 100, (8, 8), dtype=np.uint8) + (150 if scanner == "old" else 0)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{index}.png")
        lines.append(f"{index}.png,{'ab'[index % 2]},{scanner}")
    (tmp_path / "images.csv").write_text("\n".join(lines) + "\n")
    asked = recipe.Data.model_validate(
        {"path": str(tmp_path / "images.csv"), "image_size": 8, "slices": ["scanner"]}
    )
    data = image.load(asked, task="auto", seed=0, cache=None)
    bright = data.test.images.reshape(len(data.test), -1).mean(axis=1) > 125
    assert np.array_equal(data.test.slices["scanner"] == "old", bright) and 0 < bright.sum() < len(bright)
    assert (
        data.test.part(np.array([1, 0])).slices["scanner"].tolist()
        == data.test.slices["scanner"][[1, 0]].tolist()
    )
