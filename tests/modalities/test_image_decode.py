"""Real files of every kind that is read, and the damage they come with."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlexport.errors import DataError, NotInstalledError
from tlexport.modalities import image_pixels
from tlexport.modalities.image_decode import channels_of, decode, is_image
from tlexport.modalities.image_pixels import CorruptImageError, stretch
from tlexport.recipe import Dicom

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (20, 30, 3), np.uint8)
GREY = RGB[:, :, 0].copy()


def saved(folder: Path, name: str, image: Image.Image, **options: object) -> Path:
    path = folder / name
    image.save(path, **options)
    return path


def read(path: Path) -> np.ndarray:
    pixels = decode(path, Dicom())
    assert pixels.dtype == np.uint8 and pixels.ndim == 3
    assert channels_of(path) == pixels.shape[2]
    return pixels


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.ppm", "a.PNG"])
def test_lossless_formats_are_exact(tmp_path: Path, name: str) -> None:
    assert np.array_equal(read(saved(tmp_path, name, Image.fromarray(RGB))), RGB)
    assert (
        np.array_equal(read(saved(tmp_path, name, Image.fromarray(GREY)))[:, :, 0], GREY) or name == "a.ppm"
    )


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_lossy_formats_are_what_pillow_decodes(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, name, Image.fromarray(RGB))
    assert np.array_equal(read(path), np.asarray(Image.open(path).convert("RGB")))


def test_first_frame_of_a_gif(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 8), value).convert("P") for value in (200, 10)]
    path = saved(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert (read(path) == 200).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    path = saved(tmp_path, "a.png", Image.fromarray(RGB), exif=exif)
    assert np.array_equal(read(path), np.rot90(RGB, -1))


def test_transparency_is_composited_on_black(tmp_path: Path) -> None:
    alpha = np.full((20, 30, 1), 255, np.uint8)
    alpha[:10] = 0
    pixels = read(saved(tmp_path, "a.png", Image.fromarray(np.dstack([RGB, alpha]))))
    assert (pixels[:10] == 0).all() and np.array_equal(pixels[10:], RGB[10:])
    grey = read(saved(tmp_path, "b.png", Image.fromarray(np.dstack([GREY, alpha[:, :, 0]]), "LA")))
    assert grey.shape == (20, 30, 1) and (grey[:10] == 0).all() and np.array_equal(grey[10:, :, 0], GREY[10:])


def test_palette_cmyk_and_one_bit(tmp_path: Path) -> None:
    few = (RGB // 128) * 255
    assert np.array_equal(read(saved(tmp_path, "p.png", Image.fromarray(few).quantize(8))), few)
    cmyk = Image.fromarray(RGB).convert("CMYK")
    assert np.array_equal(read(saved(tmp_path, "c.tif", cmyk)), np.asarray(cmyk.convert("RGB")))
    bits = GREY > 127
    assert np.array_equal(
        read(saved(tmp_path, "b.png", Image.fromarray(bits)))[:, :, 0], bits * np.uint8(255)
    )


def test_deep_images_are_stretched_over_their_own_range(tmp_path: Path) -> None:
    deep = (np.arange(600).reshape(20, 30) * 5 + 1000).astype(np.uint16)  # 12 bits in a 16 bit container
    expected = np.rint((deep - 1000.0) / 2995 * 255).astype(np.uint8)
    assert np.array_equal(read(saved(tmp_path, "a.png", Image.fromarray(deep)))[:, :, 0], expected)
    assert np.array_equal(
        read(saved(tmp_path, "a.tif", Image.fromarray(deep.astype(np.float32))))[:, :, 0], expected
    )
    assert (read(saved(tmp_path, "b.png", Image.fromarray(np.full((4, 4), 900, np.uint16)))) == 0).all()


def test_nan_in_a_float_image_is_corrupt(tmp_path: Path) -> None:
    values = np.ones((4, 4), np.float32)
    values[1, 1] = np.nan
    with pytest.raises(CorruptImageError, match=r"a\.tif: holds NaN"):
        read(saved(tmp_path, "a.tif", Image.fromarray(values)))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "a.webp", "a.gif"])
def test_a_file_cut_short_anywhere_is_corrupt(tmp_path: Path, name: str) -> None:
    whole = saved(tmp_path, name, Image.fromarray(RGB)).read_bytes()
    for share in (0.0, 0.02, 0.3, 0.6, 0.8):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CorruptImageError, match=name):
            decode(tmp_path / name, Dicom())


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.webp"])
def test_flipped_bytes_are_corrupt_or_decoded_but_never_another_exception(tmp_path: Path, name: str) -> None:
    whole = bytearray(saved(tmp_path, name, Image.fromarray(RGB)).read_bytes())
    for seed in range(60):
        damaged = whole.copy()
        for position in np.random.default_rng(seed).integers(0, len(whole), 6):
            damaged[position] ^= 0xFF
        (tmp_path / name).write_bytes(damaged)
        try:
            decode(tmp_path / name, Dicom())
        except CorruptImageError as error:
            assert name in str(error)


def test_text_and_missing_files_are_corrupt(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(CorruptImageError, match="not an image of a kind that is read"):
        decode(tmp_path / "a.png", Dicom())
    with pytest.raises(CorruptImageError, match="No such file"):
        decode(tmp_path / "b.png", Dicom())


def test_postscript_is_not_executed(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "EPS")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    with pytest.raises(CorruptImageError, match="not an image of a kind"):
        decode(tmp_path / "a.png", Dicom())


def test_too_many_pixels_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, "a.png", Image.fromarray(RGB))
    monkeypatch.setattr(image_pixels, "MAX_PIXELS", 599)
    with pytest.raises(CorruptImageError, match="30 x 20 pixels, more than the 599"):
        decode(path, Dicom())


def test_what_counts_as_an_image(tmp_path: Path) -> None:
    assert is_image(Path("a.JPG")) and is_image(Path("a.dcm")) and not is_image(Path("a.txt"))
    (tmp_path / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "README").write_text("hello")
    assert is_image(tmp_path / "IM0001") and not is_image(tmp_path / "README")


def test_stretch_leaves_ignored_values_out_of_the_range() -> None:
    values = np.array([-2000.0, 0.0, 50.0, 100.0])
    assert stretch(values, values == -2000).tolist() == [0, 0, 128, 255]
    assert stretch(values).tolist() == [0, 243, 249, 255]
    with pytest.raises(DataError):
        stretch(np.array([0.0, np.inf]))


def test_dicom_without_pydicom_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.dcm").write_bytes(b"\0" * 128 + b"DICM")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for read_it in (lambda path: decode(path, Dicom()), channels_of):
        with pytest.raises(NotInstalledError, match=r"pip install 'tlexport\[dicom\]'"):
            read_it(tmp_path / "a.dcm")
