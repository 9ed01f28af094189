"""One image or many, by arrays or from files: the same pixels, bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tlexport.errors import DataError
from tlexport.modalities.image import Preprocessing
from tlexport.recipe import Dicom

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(28, 28), (40, 33, 3), (17, 60, 1), (24, 24, 3), (1, 90)])
def test_batch_is_apply_on_each_and_twice_is_once(resize: str, channels: int, shape: tuple[int, ...]) -> None:
    prepare = Preprocessing(24, channels, resize)
    images = RANDOM.integers(0, 256, (40, *shape), np.uint8)  # enough for threads to share the work
    single = np.stack([prepare.apply(image) for image in images])
    assert single.shape == (40, channels, 24, 24) and single.dtype == np.uint8
    assert np.array_equal(prepare.batch(images if images.ndim == 4 else list(images)), single)
    assert np.array_equal(prepare.batch(images[:3]), single[:3])
    stored = np.stack([prepare.square(image) for image in images])
    assert np.array_equal(prepare.batch(stored), single)
    assert np.array_equal(prepare.apply(stored[0]), single[0])


def test_crop_takes_the_central_square() -> None:
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 200
    assert (Preprocessing(10, 1, "crop").apply(wide) == 200).all()
    assert (Preprocessing(10, 1, "crop").apply(np.ascontiguousarray(wide.T)) == 200).all()
    assert Preprocessing(10, 1, "squash").apply(wide)[0, 5].max() == 200
    assert Preprocessing(10, 1, "squash").apply(wide)[0, 5].min() == 0


def test_pad_keeps_the_proportions_on_black() -> None:
    padded = Preprocessing(30, 1, "pad").apply(np.full((10, 20), 200, np.uint8))[0]
    assert (padded[7:22] == 200).all() and (padded[:7] == 0).all() and (padded[22:] == 0).all()


def test_a_client_gets_the_same_with_pillow_alone() -> None:
    image = RANDOM.integers(0, 256, (50, 80, 3), np.uint8)
    by_client = Image.fromarray(image).crop((15, 0, 65, 50)).resize((32, 32), Image.Resampling.BILINEAR)
    ours = Preprocessing(32, 3, "crop").apply(image)
    assert np.array_equal(ours, np.asarray(by_client).transpose(2, 0, 1))
    grey = Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.BILINEAR)
    assert np.array_equal(Preprocessing(32, 1, "squash").apply(image)[0], np.asarray(grey))


def test_shrinking_is_antialiased() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    shrunk = Preprocessing(8, 1, "squash").apply(stripes)
    assert shrunk.min() > 100 and shrunk.max() < 155


@pytest.mark.parametrize("dicom", [Dicom(), Dicom(frame=2, window=(40.0, 400.0))])
def test_it_survives_json(dicom: Dicom) -> None:
    prepare = Preprocessing(64, 3, "pad", dicom=dicom)
    assert Preprocessing.described(json.loads(json.dumps(prepare.describe()))) == prepare


@pytest.mark.parametrize("wrong", [{"resize": "stretch"}, {"interpolation": "bicubic"}, {"channels": 4}])
def test_unknown_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(DataError, match="no preprocessing"):
        Preprocessing(**{"image_size": 8, "channels": 3, **wrong})


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)]
)
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(DataError, match="an image must be uint8"):
        Preprocessing(8, 1).apply(image)
