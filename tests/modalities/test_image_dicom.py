"""DICOM: pydicom's own packaged files, and small ones written here where a value must be known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tlexport.errors import DataError
from tlexport.modalities.image_decode import channels_of, decode
from tlexport.modalities.image_pixels import CorruptImageError
from tlexport.recipe import Dicom

pydicom = pytest.importorskip("pydicom", reason="needs the extra tlexport[dicom]")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PACKAGED = Path(pydicom.data.__file__).parent / "test_files"


def written(path: Path, values: np.ndarray, **elements: Any) -> Path:
    """A secondary capture file: values [H, W] or [frames, H, W] or [H, W, 3]."""
    colour = values.ndim == 3 and values.shape[2] == 3
    bits = values.dtype.itemsize * 8
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[path.name])
    dataset = pydicom.Dataset()
    dataset.file_meta = meta
    dataset.SOPClassUID, dataset.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    dataset.Rows, dataset.Columns = values.shape[-2:] if not colour else values.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        dataset.PlanarConfiguration = 0
    elif values.ndim == 3:
        dataset.NumberOfFrames = len(values)
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, int(values.dtype.kind == "i")
    dataset.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def grey(path: Path, **config: Any) -> np.ndarray:
    pixels = decode(path, Dicom(**config))
    assert pixels.shape[2] == 1 and channels_of(path) == 1
    return pixels[:, :, 0]


HOUNSFIELD = np.array([[-1024, -160, 40, 240, 3000]], np.int16)


def test_rescale_then_window(tmp_path: Path) -> None:
    path = written(tmp_path / "a.dcm", HOUNSFIELD + 1024, RescaleSlope="1", RescaleIntercept="-1024",
                   WindowCenter="40", WindowWidth="400")  # fmt: skip
    # PS3.3 C.11.2.1.2.1: ((x - 39.5) / 399 + 0.5) * 255
    assert grey(path).tolist() == [[0, 0, 128, 255, 255]]
    assert grey(path, window=(1000, 4001)).tolist() == [[0, 54, 66, 79, 255]]

    narrow = written(tmp_path / "b.dcm", np.array([[0, 1, 2, 3]], np.int16))
    assert grey(narrow, window=(2, 3)).tolist() == [[0, 64, 191, 255]]


def test_signed_values_without_a_window_are_stretched_and_padding_does_not_count(tmp_path: Path) -> None:
    values = np.array([[-2000, -100, 0, 100]], np.int16)
    assert grey(written(tmp_path / "a.dcm", values)).tolist() == [[0, 231, 243, 255]]
    padded = written(tmp_path / "b.dcm", values, PixelPaddingValue=-2000)
    assert grey(padded).tolist() == [[0, 0, 128, 255]]


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    values = np.array([[0, 100, 200]], np.uint8)
    plain = grey(written(tmp_path / "a.dcm", values))
    inverted = grey(written(tmp_path / "b.dcm", values, PhotometricInterpretation="MONOCHROME1"))
    assert plain.tolist() == [[0, 128, 255]] and inverted.tolist() == [[255, 127, 0]]


@pytest.mark.parametrize(
    ("function", "expected"), [("LINEAR_EXACT", [0, 128, 191, 255]), ("SIGMOID", [30, 128, 186, 225])]
)
def test_window_functions(tmp_path: Path, function: str, expected: list[int]) -> None:
    values = np.array([[0, 100, 150, 200]], np.uint8)
    path = written(
        tmp_path / "a.dcm",
        values,
        WindowCenter=["100", "1"],
        WindowWidth=["200", "1"],
        VOILUTFunction=function,
    )
    assert grey(path).tolist() == [expected]


def test_voi_lut(tmp_path: Path) -> None:
    table = pydicom.Dataset()
    table.LUTDescriptor = [4, 0, 10]
    table.add_new("LUTData", "US", [0, 1023, 512, 256])
    path = written(tmp_path / "a.dcm", np.array([[0, 1, 2, 3, 9]], np.uint8), VOILUTSequence=[table])
    assert grey(path).tolist() == [[0, 255, 128, 64, 64]]


def test_a_stated_frame(tmp_path: Path) -> None:
    frames = np.stack(
        [np.eye(4, dtype=np.uint8) * 255, np.ones((4, 4), np.uint8) * np.arange(4, dtype=np.uint8)]
    )
    path = written(tmp_path / "a.dcm", frames)
    assert np.array_equal(grey(path), np.eye(4) * 255)
    assert grey(path, frame=1)[0].tolist() == [0, 85, 170, 255]
    with pytest.raises(DataError, match=r"a\.dcm has 2 frames .* data\.dicom\.frame=2") as caught:
        decode(path, Dicom(frame=2))
    assert not isinstance(caught.value, CorruptImageError)


def test_functional_groups_of_enhanced_objects(tmp_path: Path) -> None:
    def window(centre: str, width: str) -> Any:
        voi, group = pydicom.Dataset(), pydicom.Dataset()
        voi.WindowCenter, voi.WindowWidth, voi.VOILUTFunction = centre, width, "LINEAR_EXACT"
        group.FrameVOILUTSequence = [voi]
        return group

    frames = np.full((2, 2, 2), 100, np.uint8)
    path = written(
        tmp_path / "a.dcm",
        frames,
        PerFrameFunctionalGroupsSequence=[window("100", "10"), window("200", "400")],
    )
    assert (grey(path) == 128).all() and (grey(path, frame=1) == 64).all()


def test_colour(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    assert np.array_equal(decode(written(tmp_path / "a.dcm", values), Dicom()), values)
    deep = decode(written(tmp_path / "b.dcm", values.astype(np.uint16) * 257), Dicom())
    assert np.array_equal(deep, values)


def test_packaged_files_of_real_devices() -> None:
    ct, mr = grey(PACKAGED / "CT_small.dcm"), grey(PACKAGED / "MR_small.dcm")
    assert ct.shape == (128, 128) and mr.shape == (64, 64) and ct.max() == mr.max() == 255
    bone = grey(PACKAGED / "CT_small.dcm", window=(400, 1800))
    assert np.mean(bone != ct) > 0
    for name in ("MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_jp2klossless.dcm"):
        assert np.array_equal(grey(PACKAGED / name), mr), name
    for name, frame in (
        ("SC_rgb_rle_2frame.dcm", 1),
        ("SC_rgb_rle_16bit.dcm", 0),
        ("SC_rgb_dcmtk_+eb+cy+np.dcm", 0),
    ):
        assert decode(PACKAGED / name, Dicom(frame=frame)).shape == (100, 100, 3)


def test_every_packaged_file_is_an_image_or_a_clear_error() -> None:
    kinds = {"image": 0, "corrupt": 0, "undecodable": 0}
    for path in sorted(PACKAGED.glob("*.dcm")):
        try:
            pixels = decode(path, Dicom())
            assert pixels.dtype == np.uint8 and pixels.shape[2] == channels_of(path), path.name
            kinds["image"] += 1
        except CorruptImageError as error:
            assert path.name in str(error)
            kinds["corrupt"] += 1
        except DataError as error:
            assert "no decoder" in str(error) or "has no decoder installed" in str(error)
            kinds["undecodable"] += 1
    assert kinds["image"] > 40 and kinds["corrupt"] > 5, kinds


def test_damage_is_corrupt_and_names_no_patient(tmp_path: Path) -> None:
    whole = (PACKAGED / "MR_truncated.dcm").read_bytes()
    for name, content in (("a.dcm", whole), ("b.dcm", whole[:400]), ("c.dcm", b"hello"), ("d.dcm", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CorruptImageError, match=name) as caught:
            decode(tmp_path / name, Dicom())
        assert "CompressedSamples" not in str(caught.value)
    written(
        tmp_path / "e.dcm",
        np.zeros((2, 2), np.uint8),
        PatientName="DOE^JANE",
        WindowCenter="3",
        WindowWidth="0",
    )
    with pytest.raises(CorruptImageError, match="window width of 0") as caught:
        decode(tmp_path / "e.dcm", Dicom())
    assert "DOE" not in str(caught.value)


def test_a_file_without_a_suffix_is_known_by_its_magic(tmp_path: Path) -> None:
    path = tmp_path / "IM000001"
    path.write_bytes((PACKAGED / "CT_small.dcm").read_bytes())
    assert np.array_equal(grey(path), grey(PACKAGED / "CT_small.dcm"))
