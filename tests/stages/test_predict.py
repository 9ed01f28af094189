"""predict: a bundle answers new raw data as its golden samples say, and refuses what it was not made for."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import polars as pl
import pytest
from pipeline import Built, Ended

import tlexport
from tlexport.bundle import manifest, preflight
from tlexport.modalities.tabular_schema import Schema
from tlexport.recipe import parse
from tlexport.results import PredictResult

Cli = Callable[..., Ended]


@dataclass(frozen=True)
class Table:
    bundle: Path
    baseline: Path | None
    rows: pl.DataFrame


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """A table with numbers, texts, numbers that are categories (-1 among them) and an identifier; and its bundles."""
    folder = tmp_path_factory.mktemp("table")
    random = np.random.default_rng(0)
    n = 400
    score = random.normal(size=n)
    rows = pl.DataFrame(
        {
            "id": [f"c{i}" for i in range(n)],
            "score": np.where(random.random(n) < 0.1, None, score).tolist(),
            "kind": random.choice(["x", "y", "ü"], n),
            "status": random.choice([-1, 0, 2], n),
            "bad": np.where(score + random.normal(0, 0.3, n) > 0, "yes", "no"),
        },
        schema_overrides={"score": pl.Float64},
    )
    rows.write_csv(folder / "table.csv")
    document = {
        "name": "table",
        "modality": "tabular",
        "metric": "auc",
        "data": {"path": str(folder / "table.csv"), "table": {"target": "bad", "categorical": ["status"]}},
        "backbone": {"options": {"members": 4, "width": 16, "depth": 2, "bins": 8, "embedding": 4}},
        "transfer": {"epochs": 6, "batch_size": 50, "lr": 1e-2},
        "verify": {"resamples": 200},
        "gates": {"max_drop": 1},
        "bench": {"samples": 10, "batch_sizes": [1]},
        "precision": ["fp32"],
        "baselines": ["linear"],
    }
    (folder / "table.yaml").write_text(parse(document, []).to_yaml())
    run = tlexport.finetune(folder / "table.yaml", out=folder / "run")
    assert tlexport.build(run, bundle=folder / "bundle").bundle
    nested, baseline = run / "baselines" / "logistic_regression", None
    if nested.is_dir():
        baseline = folder / "baseline"
        tlexport.build(nested, bundle=baseline)
    return Table(folder / "bundle", baseline, rows)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def decoded(bundle: Path, codes: np.ndarray) -> pl.DataFrame:
    """The table that the graph's inputs stand for."""
    schema = Schema.model_validate(
        {k: v for k, v in manifest.read(bundle).preprocessing.items() if k in Schema.model_fields}
    )
    columns: dict[str, list[Any]] = {}
    for column, cells in zip(schema.columns, codes.T, strict=True):
        back = dict(zip(column.codes(), column.vocabulary, strict=True))
        shown = [None if np.isnan(cell) else back.get(float(cell), repr(float(cell))) for cell in cells]
        columns[column.name] = shown
    return pl.DataFrame(columns)


def require_answers(rows: list[dict[str, str]], expected: np.ndarray, bundle: Path) -> None:
    classes = manifest.read(bundle).classes
    assert list(rows[0]) == ["name", "decision", *classes]
    got = np.array([[float(row[name]) for name in classes] for row in rows])
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert [row["decision"] for row in rows] == [classes[k] for k in expected.argmax(axis=1)]


@pytest.mark.parametrize("which", ["bundle", "baseline"])
def test_a_table_is_answered_as_the_golden_samples_say(
    table: Table, tlx: Cli, tmp_path: Path, which: str
) -> None:
    bundle = getattr(table, which)
    if bundle is None:
        pytest.skip("needs the converters of the extra tabular")
    inputs, expected = (np.load(bundle / f"golden/{name}.npy") for name in ("inputs", "outputs"))
    decoded(bundle, inputs).write_csv(tmp_path / "new.csv", separator=";")
    done = tlx("predict", bundle, tmp_path / "new.csv", "--out", tmp_path / "out.csv", "--json")
    assert done.code == 0, done.err
    schema = tlx("schema", "predict").json
    jsonschema.validate(done.json, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({}, schema)
    assert done.json["samples"] == len(inputs) == sum(done.json["decisions"].values())
    assert done.json["notes"] == [] and done.json["target"] == "cpu"
    rows = read(tmp_path / "out.csv")
    require_answers(rows, expected, bundle)
    assert [row["name"] for row in rows] == [f"row {index + 2}" for index in range(len(rows))]
    shown = tlx("predict", bundle, tmp_path / "new.csv", "--out", tmp_path / "again.csv")
    assert shown.code == 0 and "row 2" in shown.out and str(tmp_path / "again.csv") in shown.out
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "out.csv").read_text()


def test_raw_rows_of_another_file_format_are_answered_alike(table: Table, tlx: Cli, tmp_path: Path) -> None:
    table.rows.write_parquet(tmp_path / "rows.parquet")
    table.rows.drop("bad", "id").select("status", "kind", "score").write_csv(tmp_path / "rows.csv")
    for name in ("rows.parquet", "rows.csv"):
        done = tlx("predict", table.bundle, tmp_path / name, "--out", tmp_path / f"{name}.out", "--json")
        assert done.code == 0 and done.json["notes"] == [], done.err
    assert (tmp_path / "rows.parquet.out").read_text() == (tmp_path / "rows.csv.out").read_text()
    right = [
        row["decision"] == truth
        for row, truth in zip(read(tmp_path / "rows.csv.out"), table.rows["bad"], strict=True)
    ]
    assert np.mean(right) > 0.75


def test_new_categories_and_columns_are_counted_and_told(table: Table, tlx: Cli, tmp_path: Path) -> None:
    rows = table.rows.head(20).with_columns(
        kind=pl.when(pl.int_range(20) < 3).then(pl.lit("w")).otherwise(pl.col("kind")),
        status=pl.Series([7, *[-1] * 19]),
        salary=pl.lit(1.0),
    )
    rows.write_csv(tmp_path / "new.csv")
    done = tlx("predict", table.bundle, tmp_path / "new.csv", "--out", tmp_path / "out.csv", "--json")
    assert done.code == 0, done.err
    told = "\n".join(done.json["notes"])
    assert "3 of 20 rows have a category in 'kind' that training never saw, the first: 'w'" in told
    assert "1 of 20 rows have a category in 'status' that training never saw, the first: '7'" in told
    assert "1 columns that training did not have were not looked at: 'salary'" in told
    assert "warning: " in done.err and len(read(tmp_path / "out.csv")) == 20


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows.drop("score"), "lacks 1 columns of the schema: 'score'"),
        (
            lambda rows: rows.rename({"kind": "Kind"}),
            "'kind'; it has columns that training did not have: 'Kind'",
        ),
        (
            lambda rows: rows.with_columns(score=pl.Series(["high", "0.5", *["1"] * (len(rows) - 2)])),
            "'score' in 1 rows, the first: 'high'",
        ),
        (lambda rows: rows.head(0), "no rows below its header"),
    ],
    ids=["lacking", "renamed", "text", "no rows"],
)
def test_a_changed_table_is_refused_with_the_columns(
    table: Table, tlx: Cli, tmp_path: Path, change: Callable[[pl.DataFrame], pl.DataFrame], said: str
) -> None:
    change(table.rows).write_csv(tmp_path / "new.csv")
    done = tlx("predict", table.bundle, tmp_path / "new.csv", "--out", tmp_path / "out.csv", "--json")
    assert done.code == 3 and said in done.json["error"], done
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("name", ["new.csv", "new.parquet"])
def test_an_empty_file_is_refused(table: Table, tlx: Cli, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    done = tlx("predict", table.bundle, tmp_path / name, "--out", tmp_path / "out.csv")
    assert done.code == 3 and name in done.err and "Traceback" not in done.err


def images_of(bundle: Path, path: Path) -> np.ndarray:
    """The golden images as a client has them: channels last."""
    inputs = np.load(bundle / "golden/inputs.npy").transpose(0, 2, 3, 1)
    np.savez(path, images=inputs)
    return inputs


def test_images_are_answered_as_the_golden_samples_say(built: Built, tlx: Cli, tmp_path: Path) -> None:
    from PIL import Image

    expected = np.load(built.bundle / "golden/outputs.npy")
    pixels = images_of(built.bundle, tmp_path / "new.npz")
    (tmp_path / "new/deep").mkdir(parents=True)
    for index, image in enumerate(pixels):
        where = tmp_path / "new" / (f"deep/{index}.png" if index % 2 else f"{index}.png")
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(where)
    (tmp_path / "new/readme.txt").write_text("no image")
    args = ("predict", built.bundle)
    done = tlx(*args, tmp_path / "new.npz", "--out", tmp_path / "npz.csv", "--target", "cpu", "--json")
    assert done.code == 0 and done.json["notes"] == [], done.err
    rows = read(tmp_path / "npz.csv")
    entry = manifest.read(built.bundle).targets["cpu"]
    if entry.variant.precision == "fp32":
        require_answers(rows, expected, built.bundle)
    assert rows[0]["name"] == "image/0"
    done = tlx(*args, tmp_path / "new", "--out", tmp_path / "folder.csv", "--json")
    assert done.code == 0 and "1 files are no images" in done.json["notes"][0], done.err
    files = {row.pop("name"): row for row in read(tmp_path / "folder.csv")}
    for index, row in enumerate(rows):
        row.pop("name")
        assert files[f"deep/{index}.png" if index % 2 else f"{index}.png"] == pytest.approx(row)
    done = tlx(*args, tmp_path / "new" / "0.png", "--out", tmp_path / "one.csv", "--json")
    assert done.code == 0 and done.json["samples"] == 1 and done.json["first"][0]["name"] == "0.png"


def test_images_that_are_none_are_refused(built: Built, tlx: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "labels.npz", labels=np.arange(3))
    for name, said in (
        ("empty.png", "1 of 1 files cannot be read: empty.png"),
        ("empty", "holds no image"),
        ("labels.npz", "has no images or <name>_images; it holds labels"),
        ("gone", "does not exist (accepted: an image"),
    ):
        done = tlx("predict", built.bundle, tmp_path / name, "--out", out, "--json")
        assert done.code == 3 and said in done.json["error"], done
    assert not out.exists()


def test_an_altered_bundle_is_refused_before_anything_is_loaded(
    bundle_copy: Path, tlx: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlexport.backends import registry

    monkeypatch.setattr(registry, "predict", lambda *_, **__: pytest.fail("loaded"))
    images_of(bundle_copy, tmp_path / "new.npz")
    path = bundle_copy / manifest.read(bundle_copy).targets["cpu"].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = tlx("predict", bundle_copy, tmp_path / "new.npz", "--out", tmp_path / "out.csv", "--json")
    assert done.code == 11 and "was altered" in done.json["error"]


def test_a_target_that_the_bundle_lacks_or_the_machine(
    bundle_copy: Path, built: Built, tlx: Cli, tmp_path: Path
) -> None:
    images_of(built.bundle, tmp_path / "new.npz")
    args = ("predict", bundle_copy, tmp_path / "new.npz", "--out", tmp_path / "out.csv", "--json", "--target")
    done = tlx(*args, "t4")
    assert done.code == 2 and "holds nothing for sm75 (it is for: cpu" in done.json["error"]
    done = tlx(*args, "rtx40900")
    assert done.code == 2 and "did you mean 'rtx4090'" in done.json["error"]
    if "sm89" in built.targets:
        done = tlx(*args, "sm89")
        assert done.code == 11 and "is code that would run as you" in done.json["error"], done
    # The CPU's variant is said to be for a GPU that no machine of ours has.
    document = json.loads((bundle_copy / manifest.NAME).read_text())
    document["targets"] = {"sm121": document["targets"]["cpu"]}
    (bundle_copy / manifest.NAME).write_text(json.dumps(document))
    done = tlx(*args[:-1])
    assert done.code == 11 and "cannot run sm121 on this machine" in done.json["error"]


def test_nothing_of_the_users_is_overwritten(built: Built, tlx: Cli, tmp_path: Path) -> None:
    images_of(built.bundle, tmp_path / "new.npz")
    for out, code in ((built.bundle / "p.csv", 2), (tmp_path / "new.npz", 2), (tmp_path, 7)):
        assert tlx("predict", built.bundle, tmp_path / "new.npz", "--out", out).code == code
    preflight.check(built.bundle)
    np.load(tmp_path / "new.npz")


def test_a_modality_that_is_not_known_and_a_folder_that_is_no_bundle(
    bundle_copy: Path, tlx: Cli, tmp_path: Path
) -> None:
    images_of(bundle_copy, tmp_path / "new.npz")
    document = json.loads((bundle_copy / manifest.NAME).read_text())
    document["modality"] = "sound"
    (bundle_copy / manifest.NAME).write_text(json.dumps(document))
    done = tlx("predict", bundle_copy, tmp_path / "new.npz", "--out", tmp_path / "out.csv", "--json")
    assert done.code == 11 and "of modality 'sound'" in done.json["error"]
    assert tlx("predict", tmp_path, tmp_path / "new.npz").code == 11


def test_the_library_has_the_same_door(built: Built, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built.bundle, tmp_path / "copy"))
    images_of(copy, tmp_path / "new.npz")
    result = tlexport.predict(copy, tmp_path / "new.npz", out=tmp_path / "out.csv")
    assert isinstance(result, PredictResult) and result.samples == len(read(tmp_path / "out.csv"))
