"""The whole way from data.path to splits: real sets, planted faults, the cache, and pixels that never differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tlexport import recipe
from tlexport.errors import DataError, LeakageError
from tlexport.modalities import MODALITIES
from tlexport.modalities.image import ImageData, load
from tlexport.modalities.image_decode import decode
from tlexport.modalities.metrics import METRICS
from tlexport.recipe import Dicom


def loaded(
    path: Path | str, cache: Path | None = None, *, task: str = "auto", seed: int = 0, **changes: Any
) -> ImageData:
    size = changes.pop("image_size", 16)
    return load(recipe.Data(path=str(path), image_size=size, **changes), task=task, seed=seed, cache=cache)


def splits(found: ImageData) -> list[Any]:
    return [found.train, found.val, found.test]


def photos(root: Path, classes: str = "ab", each: int = 12, size: tuple[int, int] = (20, 14)) -> Path:
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for n in range(each):
            Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8)).save(root / name / f"{n}.png")
    return root


def npz(folder: Path, **changes: Any) -> Path:
    random = np.random.default_rng(1)
    content: dict[str, Any] = {}
    for name, n in (("train", 30), ("val", 12), ("test", 12)):
        content[f"{name}_images"] = random.integers(0, 256, (n, 10, 10), np.uint8)
        content[f"{name}_labels"] = np.arange(n) % 3
    content.update(changes)
    np.savez(folder / "a.npz", **{key: value for key, value in content.items() if value is not None})
    return folder / "a.npz"


def test_pneumoniamnist(shared_data: Path) -> None:
    found = loaded(shared_data / "pneumoniamnist" / "pneumoniamnist.npz", image_size=64)
    assert found.task == "binary" and found.class_names == ("0", "1")
    assert found.report.samples == {"train": 4708, "val": 524, "test": 624}
    assert found.report.counts["test"] == {"0": 234, "1": 390}
    assert found.report.duplicates_count == {"val": 8, "test": 0}
    assert found.train.images.shape == (4708, 28, 28, 1) and found.preprocessing.channels == 1
    assert found.preprocessing.batch(found.train.images[:3]).shape == (3, 1, 64, 64)


def test_blood_cells_keep_their_groups_apart(shared_data: Path) -> None:
    path = shared_data / "blood_cells" / "blood_cells.npz"
    given, drawn = loaded(path), loaded(path, resplit=True)
    for found in (given, drawn):
        groups = [set(split.groups) for split in splits(found)]
        assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert given.report.groups == {"train": 205, "val": 87, "test": 72}
    assert sum(drawn.report.groups.values()) == 364 and given.report.sha256 != drawn.report.sha256
    for counts in drawn.report.counts.values():
        assert counts["2"] / sum(counts.values()) == pytest.approx(1500 / 2233, abs=0.05)


def test_cifar10_subset_limited(shared_data: Path) -> None:
    found = loaded(shared_data / "cifar10_subset" / "cifar10_subset.npz", limit=200)
    assert found.task == "multiclass" and found.report.samples == {"train": 200, "val": 200, "test": 200}
    assert set(found.report.counts["train"].values()) <= {19, 20, 21}


def test_fewer_training_images_leave_val_and_test_whole(shared_data: Path) -> None:
    found = loaded(shared_data / "cifar10_subset" / "cifar10_subset.npz", train_size=100)
    assert found.report.samples == {"train": 100, "val": 1000, "test": 1000}
    assert set(found.report.counts["train"].values()) == {10}


def test_hymenoptera_decoded_once_and_equal_to_one_by_one(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "hymenoptera"
    seen: list[tuple[int, int]] = []
    data = recipe.Data(path=str(root), image_size=32)
    found = load(
        data, task="auto", seed=0, cache=tmp_path, progress=lambda done, total: seen.append((done, total))
    )
    total = sum(found.report.samples.values())
    assert seen[-1] == (total, total) and found.class_names == ("ants", "bees")
    assert found.report.split_origin["test"] == "the given val"
    assert found.report.split_origin["val"].startswith("drawn from the given train (15%)")
    for split in splits(found):
        for row in (0, len(split) // 2, len(split) - 1):
            alone = found.preprocessing.apply(decode(root / split.names[row], Dicom()))
            assert np.array_equal(alone, found.preprocessing.batch(split.images[row : row + 1])[0])
    again = load(data, task="auto", seed=0, cache=tmp_path, progress=lambda *_: pytest.fail("decoded again"))
    assert again.report == found.report
    assert isinstance(again.train.images, np.memmap) or isinstance(again.train.images.base, np.memmap)


def test_digits() -> None:
    found = loaded("sklearn/digits")
    assert found.report.samples == {"train": 1259, "val": 269, "test": 269}
    assert found.train.images.max() == 255 and found.class_names[7] == "7"


def test_npz_batches_equal_single_images(tmp_path: Path) -> None:
    found = loaded(npz(tmp_path), channels=3, resize="pad")
    batch = found.preprocessing.batch(found.test.images)
    assert batch.shape == (12, 3, 16, 16)
    assert all(np.array_equal(batch[i], found.preprocessing.apply(found.test.images[i])) for i in range(12))


def test_seed_decides_drawn_splits_and_the_same_seed_repeats(tmp_path: Path) -> None:
    root = photos(tmp_path / "x")
    one, again, other = (loaded(root, seed=seed) for seed in (1, 1, 2))
    assert one.report == again.report and one.test.names == again.test.names
    assert one.test.names != other.test.names
    assert {n for s in splits(one) for n in s.names} == {n for s in splits(other) for n in s.names}


def test_channels_are_those_of_the_data_unless_asked(tmp_path: Path) -> None:
    root = photos(tmp_path / "x")
    assert loaded(root).preprocessing.channels == 3
    for path in root.rglob("*.png"):
        Image.open(path).convert("L").save(path)
    grey = loaded(root)
    assert grey.preprocessing.channels == 1 and grey.train.images.shape == (16, 16, 16, 1)
    assert loaded(root, channels=3).train.images.shape == (16, 16, 16, 3)
    Image.new("RGB", (9, 9), (200, 0, 0)).save(root / "a" / "0.png")
    assert loaded(root).preprocessing.channels == 3


def test_corrupt_files_are_counted_listed_and_limited(tmp_path: Path) -> None:
    root = photos(tmp_path / "x")
    whole = (root / "a" / "3.png").read_bytes()
    (root / "a" / "3.png").write_bytes(whole[: len(whole) // 2])
    (root / "b" / "5.png").write_text("hello")
    with pytest.raises(
        DataError, match=r"2 of 24 files cannot be read, and data.max_corrupt=0 allows 0: .*png"
    ) as caught:
        loaded(root)
    assert "a/3.png" in str(caught.value) and "b/5.png" in str(caught.value)
    with pytest.raises(DataError, match="allows 1"):
        loaded(root, tmp_path / "cache", max_corrupt=1)
    for allowed in (2, 0.1):
        found = loaded(root, tmp_path / "cache", max_corrupt=allowed)
        assert {file.name for file in found.report.corrupt} == {"a/3.png", "b/5.png"}
        assert sum(found.report.samples.values()) == 22
        for split in splits(found):
            assert len(split.images) == len(split.names) == len(split.labels)
            for row, name in enumerate(split.names):
                assert np.array_equal(
                    split.images[row], found.preprocessing.square(decode(root / name, Dicom()))
                )
                assert found.class_names[split.labels[row]] == name[0]


def test_the_cache_follows_the_files_and_the_settings_and_heals(tmp_path: Path) -> None:
    root, cache = photos(tmp_path / "x"), tmp_path / "cache"
    before = loaded(root, cache)
    pixels, index = cache / "images" / "pixels.npy", cache / "images" / "index.json"
    stamp = pixels.stat().st_ino
    loaded(root, cache)
    assert pixels.stat().st_ino == stamp
    for damage in (
        lambda: pixels.write_bytes(pixels.read_bytes()[:-7]),
        lambda: pixels.write_bytes(pixels.read_bytes()[:-1] + bytes([pixels.read_bytes()[-1] ^ 1])),
        lambda: index.write_text("{"),
        lambda: index.write_text("[]"),
        lambda: index.write_text(json.dumps({"key": json.loads(index.read_text())["key"]})),
        pixels.unlink,
    ):
        damage()
        assert loaded(root, cache).report == before.report
    assert loaded(root, cache, resize="squash").report.sha256 != before.report.sha256
    Image.new("RGB", (20, 20), (9, 9, 9)).save(root / "a" / "0.png")
    assert loaded(root, cache).report.sha256 != before.report.sha256


def test_memory_and_cache_hold_the_same(tmp_path: Path) -> None:
    root = photos(tmp_path / "x")
    assert loaded(root).report == loaded(root, tmp_path / "cache").report


def test_duplicates_are_reported_dropped_or_fatal(tmp_path: Path) -> None:
    images = np.random.default_rng(3).integers(0, 256, (12, 10, 10), np.uint8)
    train = np.random.default_rng(4).integers(0, 256, (30, 10, 10), np.uint8)
    train[5], train[6] = images[2], images[7]
    path = npz(tmp_path, train_images=train, test_images=images)
    reported = loaded(path).report
    assert {(d.name, d.train) for d in reported.duplicates} == {("test/2", "train/5"), ("test/7", "train/6")}
    assert reported.samples["test"] == 12 and reported.dropped == 0
    dropped = loaded(path, duplicates="drop")
    assert dropped.report.dropped == 2 and dropped.report.samples["test"] == len(dropped.test.images) == 10
    assert "test/2" not in dropped.test.names and np.array_equal(dropped.test.images[2, :, :, 0], images[3])
    with pytest.raises(LeakageError, match=r"2 test images are also in train: test/2 = train/5"):
        loaded(path, duplicates="fail")


def test_groups_across_given_splits_are_an_error_with_a_way_out(tmp_path: Path) -> None:
    groups = {
        "train_groups": np.arange(30) // 2,
        "val_groups": np.arange(12) + 100,
        "test_groups": np.arange(12) + 14,
    }
    path = npz(tmp_path, **groups)
    with pytest.raises(LeakageError, match=r"1 group in both test and train: 14; .*data\.resplit=true"):
        loaded(path)
    found = loaded(path, resplit=True)
    assert not set(found.train.groups) & set(found.test.groups)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"val_labels": np.full(12, 3)}, {}, "val or test has samples of 3, and train has none"),
        ({"train_labels": np.arange(30) % 2 * 2, "val_labels": np.zeros(12, int), "test_labels": np.zeros(12, int)}, {},
         "no sample of 1 to train on"),
        ({f"{s}_labels": np.zeros(n, int) for s, n in (("train", 30), ("val", 12), ("test", 12))}, {}, "one class only"),
        ({}, {"class_names": ("a", "b")}, "needs 3, not 2"),
        ({}, {"class_names": ("a", "b", "c", "d")}, "no sample of d"),
        ({}, {"class_names": ("a", "b", "b")}, "must differ"),
        ({}, {"task": "binary"}, "has 3 classes"),
        ({}, {"task": "multilabel"}, "one class a sample"),
        ({"train_images": None, "train_labels": None}, {}, "no train_images"),
        ({}, {"split": recipe.SplitFractions(val=0.5, test=0.6)}, "nothing is left for train"),
    ],
)  # fmt: skip
def test_what_a_person_has_to_decide(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        loaded(npz(tmp_path, **changes), **options)


def test_multilabel_and_one_hot(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    several = {
        f"{s}_labels": random.integers(0, 2, (n, 4)) for s, n in (("train", 30), ("val", 12), ("test", 12))
    }
    found = loaded(npz(tmp_path, **several), class_names=("a", "b", "c", "d"))
    assert found.task == "multilabel" and found.train.labels.shape == (30, 4)
    assert found.report.counts["train"]["a"] == several["train_labels"][:, 0].sum()
    with pytest.raises(DataError, match="use task=multilabel"):
        loaded(npz(tmp_path, **several), task="multiclass")
    one_hot = {key: np.eye(4, dtype=int)[np.arange(len(v)) % 4] for key, v in several.items()}
    single = loaded(npz(tmp_path, **one_hot), task="multiclass")
    assert single.task == "multiclass" and single.train.labels[:5].tolist() == [0, 1, 2, 3, 0]


def test_a_class_that_is_never_asked_for_is_noted(tmp_path: Path) -> None:
    notes = loaded(npz(tmp_path, test_labels=np.arange(12) % 2)).report.notes
    assert notes == ("test has no sample of 2",)


def test_dicom_folder_with_a_frame_too_far(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom", reason="needs the extra tlexport[dicom]")
    packaged = Path(pydicom.data.__file__).parent / "test_files"
    for n in range(8):
        for name, source in (("ct", "CT_small.dcm"), ("mr", "MR_small.dcm")):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{n}").write_bytes((packaged / source).read_bytes())
    found = loaded(tmp_path)
    assert found.preprocessing.channels == 1 and found.report.samples["train"] == 12
    assert found.report.duplicates_count["test"] == 2
    with pytest.raises(DataError, match="has 1 frame"):
        loaded(tmp_path, dicom=Dicom(frame=1))


def test_the_registry_and_its_light_import() -> None:
    assert MODALITIES["image"].load is load and MODALITIES["image"].METRICS is METRICS
    code = "import sys, tlexport.modalities; print([m for m in ('torch', 'sklearn', 'pydicom', 'timm') if m in sys.modules])"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert out.stdout.strip() == "[]"


def test_the_report_survives_json(tmp_path: Path) -> None:
    report = loaded(npz(tmp_path)).report
    assert type(report).model_validate_json(report.model_dump_json()) == report


def test_a_disk_that_is_full_is_a_clear_error_and_leaves_nothing(tmp_path: Path) -> None:
    root = photos(tmp_path / "x")
    code = (
        "import resource, sys; from pathlib import Path; from tlexport import recipe; from tlexport.errors import StorageError\n"
        "from tlexport.modalities.image import load\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "data = recipe.Data(path=sys.argv[1], image_size=64)\n"
        "try: load(data, task='auto', seed=0, cache=Path(sys.argv[2]))\n"
        "except StorageError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(root), str(tmp_path / "cache")]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "would be larger than the limit" in out.stdout
    assert list((tmp_path / "cache").iterdir()) == []
    assert loaded(root, tmp_path / "cache").report.samples["train"] == 16
