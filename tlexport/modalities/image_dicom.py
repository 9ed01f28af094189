"""DICOM to 8-bit pixels, in the standard's order (PS3.3 C.7.6.3, C.11): modality, VOI, presentation.

Grey: rescale slope and intercept or modality LUT; then the recipe's window, or the file's VOI LUT, or its
first window (LINEAR, LINEAR_EXACT or SIGMOID, C.11.2.1.2), or, where there is none, a stretch from the
frame's smallest to its largest value (padding left out); then MONOCHROME1 is inverted. Colour: palette and
YBR become RGB, more than 8 bits are scaled by the stored bit depth. The functional groups of enhanced
multi-frame objects are honoured. Nothing of a header goes into an error message: it may name a patient.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError, NotInstalledError
from tlexport.modalities.image_pixels import CorruptImageError, Pixels, check_size, stretch
from tlexport.recipe import Dicom

_COLOUR = 3
_PER_FRAME = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


def decode(path: Path, config: Dicom) -> Pixels:
    """uint8 [Rows, Columns, 1 or 3] of one frame.

    Raises CorruptImageError for a damaged file or one without pixels, DataError if the frame does not exist
    or the compression has no installed decoder, NotInstalledError without pydicom.
    """
    dataset, frames = _read(path, with_pixels=True)
    if config.frame >= frames:
        raise DataError(
            f"{path.name} has {frames} frame{'s' * (frames > 1)} (the first is 0), "
            f"so there is no data.dicom.frame={config.frame}"
        )
    try:
        return _frame(dataset, config, _describing(dataset, config.frame))
    except CorruptImageError as error:
        raise CorruptImageError(f"{path.name}: {error}") from error
    except _DAMAGE as error:
        _explain_missing_decoder(path, dataset, error)
        raise CorruptImageError(
            f"{path.name}: pixel data damaged, or not decodable by what is installed ({type(error).__name__})"
        ) from error


def channels_of(path: Path) -> int:
    """1 or 3, from the header."""
    dataset, _ = _read(path, with_pixels=False)
    palette = str(dataset.get("PhotometricInterpretation")) == "PALETTE COLOR"
    return _COLOUR if palette or dataset.get("SamplesPerPixel") == _COLOUR else 1


_DAMAGE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, struct.error,
    ArithmeticError,
)  # fmt: skip


def _read(path: Path, *, with_pixels: bool) -> tuple[Any, int]:
    """The dataset and its number of frames."""
    try:
        import pydicom
    except ImportError as error:
        raise NotInstalledError("pydicom, which reads DICOM,", "dicom") from error
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=not with_pixels)
        rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
        frames = int(dataset.get("NumberOfFrames") or 1)
    except (pydicom.errors.InvalidDicomError, *_DAMAGE) as error:
        raise CorruptImageError(f"{path.name}: not readable as DICOM ({type(error).__name__})") from error
    try:
        check_size(columns, rows)
    except CorruptImageError as error:
        raise CorruptImageError(f"{path.name}: {error}") from error
    return dataset, frames


def _frame(dataset: Any, config: Dicom, describing: Any) -> Pixels:
    from pydicom.pixels import apply_color_lut, pixel_array

    if "PixelData" not in dataset:
        raise CorruptImageError("has no 8- to 32-bit integer pixel data")
    stored = pixel_array(dataset, index=config.frame)
    interpretation = str(dataset.PhotometricInterpretation)
    if interpretation == "PALETTE COLOR":
        bits = int(dataset.RedPaletteColorLookupTableDescriptor[2])
        return _to_8_bits(apply_color_lut(stored, dataset), bits)
    if stored.ndim == _COLOUR:
        return _to_8_bits(stored, int(dataset.BitsStored))
    grey = _windowed(stored, config, describing)
    if interpretation == "MONOCHROME1":
        grey = 255 - grey
    return grey[:, :, None]


def _describing(dataset: Any, frame: int) -> Any:
    """The header whose rescale and window hold for `frame`: its functional groups over the dataset's own."""
    from pydicom.dataset import Dataset

    merged = Dataset()
    merged.update({element.tag: element for element in dataset if element.keyword != "PixelData"})
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or []
    for group in [*shared[:1], *per_frame[frame : frame + 1]]:
        for name in _PER_FRAME:
            for item in (group.get(name) or [])[:1]:
                merged.update(item)
    return merged


def _windowed(stored: NDArray[Any], config: Dicom, describing: Any) -> Pixels:
    """Grey values of one frame, stored -> modality units -> 8 bits; uint8 [H, W]."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    values = np.asarray(apply_modality_lut(stored, describing), np.float64)
    if config.window is not None:
        return _window(values, *config.window, "LINEAR")
    if describing.get("VOILUTSequence"):
        table = apply_voi(values.astype(np.int64), describing)
        return _to_8_bits(table, int(describing.VOILUTSequence[0].LUTDescriptor[2]))
    centre, width = _first(describing.get("WindowCenter")), _first(describing.get("WindowWidth"))
    if centre is not None and width is not None:
        return _window(values, centre, width, str(describing.get("VOILUTFunction") or "LINEAR"))
    padding = describing.get("PixelPaddingValue")
    return stretch(values, ignore=None if padding is None else stored == padding)


def _window(values: NDArray[np.float64], centre: float, width: float, function: str) -> Pixels:
    """PS3.3 C.11.2.1.2 with an output range of 0 to 255."""
    if function == "SIGMOID":
        if width <= 0:
            raise CorruptImageError(f"has a window width of {width:g}")
        shares = 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    else:
        half = 0.5 if function == "LINEAR" else 0.0
        if width < 2 * half or width <= 0:
            raise CorruptImageError(f"has a window width of {width:g}")
        low, span = centre - half - (width - 2 * half) / 2, width - 2 * half
        shares = np.clip((values - low) / span, 0, 1) if span > 0 else (values > low).astype(np.float64)
    eight_bits: Pixels = np.rint(shares * 255).astype(np.uint8)
    return eight_bits


def _to_8_bits(values: NDArray[Any], bits: int) -> Pixels:
    if bits == 8 and values.dtype == np.uint8:
        return values
    largest = (1 << bits) - 1
    eight_bits: Pixels = np.rint(np.clip(values.astype(np.float64) / largest, 0, 1) * 255).astype(np.uint8)
    return eight_bits


def _first(value: Any) -> float | None:
    """The first of a possibly multi-valued decimal string."""
    if value is None or value == "":
        return None
    try:
        return float(value[0])
    except TypeError:
        return float(value)


def _explain_missing_decoder(path: Path, dataset: Any, error: Exception) -> None:
    """Raise DataError if the pixels are fine for all we know and only their decoder is not installed."""
    from pydicom.pixels import get_decoder

    syntax = getattr(getattr(dataset, "file_meta", None), "TransferSyntaxUID", None)
    if syntax is None:
        return
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise DataError(f"{path.name} uses {syntax.name}, which pydicom cannot decode") from error
    if not decoder.is_available:
        needs = "; ".join(decoder.missing_dependencies)
        raise DataError(f"{path.name} uses {syntax.name}, and has no decoder installed ({needs})") from error
