"""Image folders and CSV manifests, right and wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tlexport import recipe
from tlexport.errors import DataError
from tlexport.modalities.image_sources import read


def image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)).save(path)


def tree(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        image(root / name, seed)
    return root


def data(path: Path | str, **changes: Any) -> recipe.Data:
    return recipe.Data(path=str(path), **changes)


def test_one_folder_of_class_folders_with_nesting_and_strays(tmp_path: Path) -> None:
    tree(
        tmp_path,
        "dog/1.png",
        "dog/deep/er/2.png",
        "cat/3.JPG",
        ".hidden/x/4.png",
        "cat/.thumb.png",
        "cat/.old/5.png",
    )
    (tmp_path / "dog" / "notes.txt").write_text("x")
    (tmp_path / "README.md").write_text("x")
    samples = read(data(tmp_path))
    assert samples.class_names == ("cat", "dog") and samples.splits is None
    assert dict(zip(samples.names, samples.labels.tolist(), strict=True)) == {
        "cat/3.JPG": 0, "dog/1.png": 1, "dog/deep/er/2.png": 1,
    }  # fmt: skip
    assert samples.ignored == ("dog/notes.txt",)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Valid"])
def test_split_folders(tmp_path: Path, val: str) -> None:
    tree(tmp_path, "train/a/1.png", "train/b/2.png", f"{val}/a/3.png", "test/b/4.png")
    samples = read(data(tmp_path))
    assert samples.splits is not None
    assert sorted(zip(samples.splits.tolist(), samples.labels.tolist(), strict=True)) == [
        ("test", 1), ("train", 0), ("train", 1), ("val", 0),
    ]  # fmt: skip


def test_class_names_give_the_order_or_name_the_numbers(tmp_path: Path) -> None:
    tree(tmp_path / "x", "ok/1.png", "sick/2.png")
    assert read(data(tmp_path / "x", class_names=("sick", "ok"))).labels.tolist() == [1, 0]
    three = read(data(tmp_path / "x", class_names=("well", "sick", "ok")))
    assert three.labels.tolist() == [2, 1] and three.class_names == ("well", "sick", "ok")
    with pytest.raises(DataError, match=r"data\.class_names \(ok, ill\) has no name for sick"):
        read(data(tmp_path / "x", class_names=("ok", "ill")))
    tree(tmp_path / "y", "10/1.png", "9/2.png", *(f"{n}/3.png" for n in range(9)))
    assert read(data(tmp_path / "y")).class_names == tuple(str(n) for n in range(11))
    assert read(data(tmp_path / "y", class_names=tuple("abcdefghijk"))).labels.tolist()[1:3] == [1, 10]


@pytest.mark.parametrize(
    ("names", "folders", "message"),
    [
        (["a/1.png"], ["b", "c"], "class folders without an image: b, c"),
        (["train/a/1.png", "other/b/2.png"], [], "train/ beside folders that are no splits: other"),
        (["train/a/1.png", "val/a/1.png", "valid/a/1.png"], [], "two folders for one split"),
        (["test/a/1.png"], [], "no layout that is known: it holds test/"),
        (["1.png", "2.png"], [], r"no layout that is known: it holds 1\.png, 2\.png; accepted: train/"),
        (["train/a/1.png", "train/b/1.png", "test/1.png"], [], r"test has no class folders: it holds 1\.png"),
        ([], [], "it holds nothing"),
    ],
)
def test_unknown_layouts_say_what_was_found(
    tmp_path: Path, names: list[str], folders: list[str], message: str
) -> None:
    tree(tmp_path, *names)
    for folder in folders:
        (tmp_path / folder).mkdir()
    with pytest.raises(DataError, match=message):
        read(data(tmp_path))


def test_a_folder_that_holds_an_npz_says_so(tmp_path: Path) -> None:
    for name in ("LICENSE", "SOURCE.txt", "z.npz"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"it holds z\.npz, LICENSE"):
        read(data(tmp_path))


def test_missing_paths_name_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "pneumonia.npz").write_text("x")
    with pytest.raises(DataError, match=r"does not exist; did you mean .*pneumonia\.npz"):
        read(data(tmp_path / "pnuemonia.npz"))
    with pytest.raises(DataError, match="does not exist"):
        read(data("no/such/place"))
    with pytest.raises(DataError, match=r"is a \.zip file"):
        (tmp_path / "a.zip").write_text("x")
        read(data(tmp_path / "a.zip"))


def manifest(folder: Path, text: str) -> Path:
    tree(folder, "img/1.png", "img/2.png", "img/3.png", "img/4.png")
    (folder / "m.csv").write_text(text, encoding="utf-8")
    return folder / "m.csv"


def test_csv_with_split_and_group(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        "\ufeffpath,label,split,group\nimg/1.png,b,train,p1\nimg/2.png,a,Validation,p2\n"
        f"{tmp_path / 'img/3.png'}, a ,test,p3\n",
    )
    samples = read(data(path))
    assert samples.splits is not None and samples.groups is not None
    assert samples.splits.tolist() == ["train", "val", "test"] and samples.groups.tolist() == [
        "p1",
        "p2",
        "p3",
    ]
    assert samples.labels.tolist() == [1, 0, 0] and samples.class_names == ("a", "b")


def test_csv_with_other_columns_and_root(tmp_path: Path) -> None:
    path = manifest(tmp_path, "file,y,patient\n1.png,0,x\n2.png,1,y\n")
    columns = recipe.Manifest(image="file", label="y", group="patient", root=str(tmp_path / "img"))
    samples = read(data(path, manifest=columns))
    assert samples.splits is None and samples.groups is not None and samples.labels.tolist() == [0, 1]


def test_csv_multilabel_both_ways(tmp_path: Path) -> None:
    joined = read(data(manifest(tmp_path, "path,label\nimg/1.png,a|c\nimg/2.png,\nimg/3.png,b\n")))
    assert joined.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]] and joined.class_names == (
        "a",
        "b",
        "c",
    )
    path = manifest(tmp_path, "path,x,y\nimg/1.png,1,0\nimg/2.png,0,0\n")
    columns = read(data(path, manifest=recipe.Manifest(label=("x", "y"))))
    assert columns.labels.tolist() == [[1, 0], [0, 0]] and columns.class_names == ("x", "y")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\nimg/1.png,a\n", r"has no column path \(its columns: file, label\)"),
        ("path,label\n", "has no rows"),
        ("", "has no rows"),
        ("path,label\nimg/1.png,a\nimg/2.png\n", "row 3"),
        ("path,label\nimg/1.png,a,b\n", "row 2"),
        ("path,label\nimg/1.png,a\nimg/2.png,\n", "no label in row 3"),
        ("path,label,split\nimg/1.png,a,dev\n", "row 2: the split is 'dev'"),
        ("path,label\nimg/1.png,\n", "the label column 'label' is empty"),
        ('path,label\nimg/1.png,"a\n', "cannot be read as a CSV"),
    ],
)
def test_csv_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(data(manifest(tmp_path, text)))


def test_csv_counts_all_missing_files_and_names_a_few(tmp_path: Path) -> None:
    rows = "".join(f"img/x{n}.png,a\n" for n in range(9))
    with pytest.raises(DataError, match=r"9 of 10 images .* img/x0\.png.* and 4 more"):
        read(data(manifest(tmp_path, f"path,label\nimg/1.png,a\n{rows}")))


def test_csv_in_another_encoding_and_with_an_unknown_group_column(tmp_path: Path) -> None:
    path = manifest(tmp_path, "path,label\nimg/1.png,a\n")
    with pytest.raises(DataError, match="no group column 'patient'"):
        read(data(path, manifest=recipe.Manifest(group="patient")))
    path.write_bytes("path,label\nimg/1.png,é\n".encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        read(data(path))
    path = manifest(tmp_path, "path,x,y\nimg/1.png,1,2\n")
    with pytest.raises(DataError, match="must hold 0 or 1; row 2"):
        read(data(path, manifest=recipe.Manifest(label=("x", "y"))))
