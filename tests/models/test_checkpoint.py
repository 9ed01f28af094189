"""The checkpoint of a run: the same network comes back, damage and full disks are clear errors."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from tlexport.errors import RunError, StorageError, WeightsError
from tlexport.models import image, weights
from tlexport.models.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture
def saved(lite0: image.ImageModel, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoint", lite0, lite0.spec, {"labels": ["a", "b", "c"]})
    return tmp_path / "checkpoint"


def test_the_same_network_comes_back(saved: Path, lite0: image.ImageModel, images: torch.Tensor) -> None:
    before = torch.get_rng_state()
    model, spec, extra = load_checkpoint(saved)
    assert torch.equal(before, torch.get_rng_state())
    assert (spec, extra) == (lite0.spec, {"labels": ["a", "b", "c"]})
    assert not model.training
    with torch.no_grad():
        assert torch.equal(model(images), lite0(images))
        assert lite0(images).std(0).min() > 1e-3
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", "model.safetensors"]


def test_tied_tensors_are_stored(lite0: image.ImageModel, tmp_path: Path) -> None:
    norm = lite0.backbone.get_submodule("bn1")
    norm.bias = norm.weight
    save_checkpoint(tmp_path, lite0, lite0.spec, {})
    model, _, _ = load_checkpoint(tmp_path)
    assert torch.equal(model.backbone.get_parameter("bn1.bias"), norm.weight)


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_classes(path: Path) -> None:
    document = json.loads(path.read_text())
    document["spec"]["classes"] = 4
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", change_a_byte, "damaged or was changed"),
        (
            "model.safetensors",
            lambda path: path.write_bytes(path.read_bytes()[:1000]),
            "damaged or was changed",
        ),
        ("model.safetensors", Path.unlink, "has no model.safetensors"),
        ("model.json", Path.unlink, "has no model.json"),
        ("model.json", lambda path: path.write_text("{"), "cannot be read"),
        ("model.json", lambda path: path.write_text("{}"), "not a model's description"),
        ("model.json", change_classes, "cannot be loaded.*size mismatch"),
    ],
)
def test_damage(saved: Path, file: str, damage, message: str) -> None:
    damage(saved / file)
    with pytest.raises(RunError, match=f"(?s){message}"):
        load_checkpoint(saved)


def test_a_disk_that_takes_no_more(saved: Path, lite0: image.ImageModel, images: torch.Tensor) -> None:
    """The limit on a file's size stands in for a full disk: the writer meets it in the same place."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(StorageError, match="cannot write"):
            save_checkpoint(saved, lite0, lite0.spec, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(saved)[2] == {"labels": ["a", "b", "c"]}
    assert sorted(path.name for path in saved.iterdir()) == ["model.json", "model.safetensors"]


def test_a_checkpoint_is_a_source_of_weights(saved: Path, lite0: image.ImageModel) -> None:
    model = image.create(lite0.spec.model_copy(update={"classes": 7}))
    for source in (saved, saved / "model.safetensors"):
        report = weights.load(model, str(source), allow_mismatch=False)
        assert report.exact and report.matched == report.total == 294
        assert set(report.head) == {"head.1.weight", "head.1.bias"}
    other = image.create(lite0.spec.model_copy(update={"backbone": "timm/lcnet_035"}))
    with pytest.raises(WeightsError, match=r"holds a timm/tf_efficientnet_lite0.*set backbone\.name"):
        weights.load(other, str(saved), allow_mismatch=True)
    shifted = image.create(lite0.spec.model_copy(update={"mean": (0.4, 0.4, 0.4)}))
    with pytest.raises(WeightsError, match="normalisation: mean"):
        weights.load(shifted, str(saved), allow_mismatch=False)


def test_a_directory_without_a_checkpoint(lite0: image.ImageModel, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="is not a checkpoint"):
        weights.load(lite0, str(tmp_path), allow_mismatch=False)
