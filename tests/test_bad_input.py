"""Bad input through the command line: the exit code, what the message names, and that nothing is lost."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipeline import SMALL, Ended

Cli = Callable[..., Ended]
NO_WEIGHTS = [o for o in SMALL if not o.startswith(("data.", "backbone.weights"))]


@pytest.fixture
def refused(tlx: Cli, tmp_path: Path) -> Callable[..., str]:
    """Fine-tune with overrides, expect the exit code, and return the message."""

    def call(code: int, *overrides: str) -> str:
        ended = tlx(
            "finetune",
            "insects",
            *SMALL,
            "transfer.epochs=1",
            *overrides,
            "--out",
            tmp_path / "run",
            "--json",
        )
        assert ended.code == code, ended.err
        assert "Traceback" not in ended.err and ended.json["exit_code"] == code
        assert not (tmp_path / "run/checkpoint").exists()
        return str(ended.json["error"])

    return call


def folder(root: Path, classes: dict[str, int], size: int = 40) -> Path:
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(
                root / name / f"{index}.png"
            )
    return root


def arrays(n: int = 60, classes: int = 2, **changes: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for split, count in (("train", n), ("val", 20), ("test", 20)):
        labels = np.arange(count) % classes
        made[f"{split}_images"] = (rng.integers(0, 200, (count, 28, 28)) + labels[:, None, None] * 50).astype(
            np.uint8
        )
        made[f"{split}_labels"] = labels[:, None]
    return made | changes


def test_all_mistakes_at_once_with_the_nearest_key(refused: Callable[..., str]) -> None:
    said = refused(
        2, "data.path=x", "transfer.epoch=3", "data.imagesize=3", "gates.max_drop=2", "colour=red", "oops"
    )
    for part in (
        "5 mistakes",
        "'transfer.epochs'",
        "'data.image_size'",
        "gates.max_drop",
        "colour: unknown key",
        "'oops' is not of the form",
    ):
        assert part in said, said


def test_a_path_that_is_not_there_names_what_is_near(refused: Callable[..., str], tmp_path: Path) -> None:
    folder(tmp_path / "insects", {"ant": 2, "bee": 2})
    said = refused(3, f"data.path={tmp_path / 'insect'}")
    assert "does not exist" in said and f"did you mean {tmp_path / 'insects'}" in said


def test_an_empty_class_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    folder(tmp_path / "d", {"ant": 8, "bee": 8, "wasp": 0})
    assert "without an image: wasp" in refused(3, f"data.path={tmp_path / 'd'}")


def test_one_class_only(refused: Callable[..., str], tmp_path: Path) -> None:
    folder(tmp_path / "d", {"ant": 12})
    said = refused(3, f"data.path={tmp_path / 'd'}")
    assert "one class" in said or "at least two classes" in said or "only class" in said, said


@pytest.mark.parametrize("label", [-1, 300_000, 2**40])
def test_labels_out_of_range(refused: Callable[..., str], tmp_path: Path, label: int) -> None:
    wrong = arrays()
    wrong["train_labels"][3] = label  # as many classes as that would fill the memory
    np.savez(tmp_path / "d.npz", **wrong)
    assert str(label) in refused(3, f"data.path={tmp_path / 'd.npz'}")


def test_labels_that_only_the_test_split_has(refused: Callable[..., str], tmp_path: Path) -> None:
    wrong = arrays()
    wrong["test_labels"][3] = 7
    np.savez(tmp_path / "d.npz", **wrong)
    said = refused(3, f"data.path={tmp_path / 'd.npz'}")
    assert "7" in said and "train" in said


def test_images_that_are_no_numbers(refused: Callable[..., str], tmp_path: Path) -> None:
    wrong = arrays()
    wrong["train_images"] = wrong["train_images"].astype(np.float32) / 255
    wrong["train_images"][5, 3, 3] = np.nan
    np.savez(tmp_path / "d.npz", **wrong)
    said = refused(3, f"data.path={tmp_path / 'd.npz'}")
    assert "train_images" in said and ("NaN" in said or "uint8" in said or "not finite" in said), said


def test_a_truncated_npz(refused: Callable[..., str], tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays())
    whole = (tmp_path / "d.npz").read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        (tmp_path / "d.npz").write_bytes(whole[:length])
        assert "d.npz" in refused(3, f"data.path={tmp_path / 'd.npz'}")


def test_a_damaged_member_of_an_npz(refused: Callable[..., str], tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", **arrays())
    whole = bytearray((tmp_path / "d.npz").read_bytes())
    whole[len(whole) // 3] ^= 0xFF  # the checksum of the member no longer holds
    (tmp_path / "d.npz").write_bytes(whole)
    assert "d.npz" in refused(3, f"data.path={tmp_path / 'd.npz'}")


class Payload:
    """Unpickling this makes the file it names."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_an_npz_with_pickled_objects_is_not_unpickled(refused: Callable[..., str], tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    np.savez(tmp_path / "d.npz", **arrays(train_labels=np.array([Payload(mark)] * 60, object)))
    with np.load(tmp_path / "d.npz", allow_pickle=True) as planted:
        planted["train_labels"]
    assert mark.exists()  # the payload is live
    mark.unlink()
    said = refused(3, f"data.path={tmp_path / 'd.npz'}")
    assert not mark.exists() and "train_labels" in said


@pytest.mark.parametrize("kind", ["pickle", "torch", "zip"])
def test_weights_that_are_a_malicious_pickle_are_refused_unrun(tlx: Cli, tmp_path: Path, kind: str) -> None:
    mark, path = tmp_path / "executed", tmp_path / "weights.pth"
    if kind == "torch":
        torch.save({"layer": Payload(mark)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"layer": Payload(mark)}))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Payload(mark)))
            archive.writestr("archive/version", "3")
    ended = tlx(
        "finetune",
        "digits-quickstart",
        *NO_WEIGHTS,
        "data.limit=20",
        f"backbone.weights={path}",
        "--out",
        tmp_path / "r",
        "--json",
    )
    assert ended.code == 4 and "weights.pth" in ended.json["error"], ended.err
    assert not mark.exists()


def tuned_with(tlx: Cli, weights: Path, out: Path) -> Ended:
    """A small fine-tuning that starts from this file."""
    given = f"backbone.weights={weights}"
    return tlx("finetune", "digits-quickstart", *NO_WEIGHTS, "data.limit=20", given, "--out", out, "--json")


def test_weights_with_nan_are_refused(tlx: Cli, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from timm import create_model

    state = create_model("test_efficientnet", pretrained=False).state_dict()
    name = next(n for n, t in state.items() if t.ndim == 4)
    state[name].view(-1)[0] = float("nan")
    save_file(state, tmp_path / "w.safetensors")
    ended = tuned_with(tlx, tmp_path / "w.safetensors", tmp_path / "r")
    assert ended.code == 4 and name in ended.json["error"] and "NaN" in ended.json["error"], ended.err


def test_weights_of_another_network_are_refused_with_the_counts(tlx: Cli, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a.weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    ended = tuned_with(tlx, tmp_path / "w.safetensors", tmp_path / "r")
    assert ended.code == 4 and "0 of " in ended.json["error"] and "a.weight" in ended.json["error"], ended.err


def test_unreadable_files_are_counted_listed_and_limited(tlx: Cli, tmp_path: Path) -> None:
    folder(tmp_path / "d", {"ant": 12, "bee": 12})
    broken = tmp_path / "d/ant/3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (tmp_path / "d/bee/4.png").write_bytes(b"not an image")
    base = ["finetune", "insects", *SMALL, "transfer.epochs=1", f"data.path={tmp_path / 'd'}", "--json"]
    refused = tlx(*base, "data.max_corrupt=1", "--out", tmp_path / "a")
    assert refused.code == 3 and "data.max_corrupt" in refused.json["error"] and "2" in refused.json["error"]
    for limit in ("2", "0.1"):
        made = tlx(*base, f"data.max_corrupt={limit}", "--out", tmp_path / f"b{limit}")
        assert made.code == 0 and "2 unreadable files" in made.err, made.err
        assert {line.split(":")[0] for line in made.json["corrupt"]} == {"ant/3.png", "bee/4.png"}
        assert sum(made.json["samples"].values()) == 22


def test_a_corrected_mistake_goes_on_in_the_same_directory(tlx: Cli, tmp_path: Path) -> None:
    base = ["finetune", "insects", *SMALL, "transfer.epochs=1", "--out", tmp_path / "run", "--json"]
    assert tlx(*base, f"data.path={tmp_path / 'd'}").code == 3
    folder(tmp_path / "d", {"ant": 12, "bee": 12})
    assert tlx(*base, f"data.path={tmp_path / 'd'}").code == 0
