"""Files to pixels: every image becomes uint8 [H, W, C] with C 1 (grey) or 3 (RGB).

What is done where a file is not plain 8-bit grey or RGB (a client must do the same):
    orientation   the EXIF orientation is applied
    transparency  composited on black
    palette       RGB; CMYK, YCbCr, Lab: converted to RGB as Pillow does
    1 bit         0 and 255
    16 bit, float stretched from the image's own smallest value to its largest, a constant image is black:
                  10, 12 and 16 bits share one container, so a fixed scale would lose detail
    several       the first frame or page
    DICOM         see image_dicom
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tlexport.modalities.image_pixels import MAX_PIXELS, CorruptImageError, Pixels, check_size, stretch

if TYPE_CHECKING:
    from tlexport.recipe import Dicom

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm")
DICOM_SUFFIXES = (".dcm", ".dicom")
_GREY_MODES = {"1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
_DEEP_MODES = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}


def is_image(path: Path) -> bool:
    """Whether the name says image, or a name without a suffix hides DICOM."""
    suffix = path.suffix.lower()
    return suffix in SUFFIXES or suffix in DICOM_SUFFIXES or (not suffix and _has_dicom_magic(path))


def is_dicom(path: Path) -> bool:
    suffix = path.suffix.lower()
    return suffix in DICOM_SUFFIXES or (not suffix and _has_dicom_magic(path))


def decode(path: Path, dicom: Dicom) -> Pixels:
    """The image in a file, uint8 [H, W, 1 or 3].

    Raises CorruptImageError for what is truncated, damaged, too large or not an image; DataError for a DICOM
    frame that does not exist; NotInstalledError without pydicom.
    """
    if is_dicom(path):
        from tlexport.modalities import image_dicom

        return image_dicom.decode(path, dicom)
    pixels: Pixels = _with_pillow(path, path.name, from_pillow)
    return pixels


def decode_bytes(content: bytes) -> Pixels:
    """The image that an encoded file's bytes hold, uint8 [H, W, 1 or 3]; DICOM is not read here. Raises CorruptImageError."""
    pixels: Pixels = _with_pillow(io.BytesIO(content), "the image", from_pillow)
    return pixels


def channels_of(path: Path) -> int:
    """1 or 3, read from the header only. Raises as `decode` does."""
    if is_dicom(path):
        from tlexport.modalities import image_dicom

        return image_dicom.channels_of(path)
    return int(_with_pillow(path, path.name, lambda image: 1 if image.mode in _GREY_MODES else 3))


def from_pillow(image: Any) -> Pixels:
    """uint8 [H, W, 1 or 3] of a `PIL.Image.Image`, by the rules at the top of this module."""
    from PIL import Image, ImageOps

    grey = image.mode in _GREY_MODES
    deep = image.mode in _DEEP_MODES
    if image.mode == "1":
        image = image.convert("L")
    elif not deep and image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer)
        image = image.convert("L" if grey else "RGB")
    elif not deep:
        image = image.convert("L" if grey else "RGB")
    pixels = np.asarray(ImageOps.exif_transpose(image))
    pixels = stretch(pixels) if deep else pixels
    return pixels.reshape(*pixels.shape[:2], 1 if grey else 3)


def _with_pillow(source: Path | io.BytesIO, name: str, read: Any) -> Any:
    from PIL import Image

    try:
        with Image.open(source, formats=FORMATS) as image:
            check_size(*image.size)
            return read(image)
    except CorruptImageError as error:
        raise CorruptImageError(f"{name}: {error}") from error
    except Image.DecompressionBombError as error:
        raise CorruptImageError(f"{name}: more than the {MAX_PIXELS} pixels that are read") from error
    except (
        OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, AttributeError, OverflowError,
        NotImplementedError, struct.error, zlib.error,
    ) as error:  # fmt: skip  # each of these has been seen from one of Pillow's readers on a damaged file
        raise CorruptImageError(f"{name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a kind that is read ({', '.join(FORMATS)})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def _has_dicom_magic(path: Path) -> bool:
    try:
        with path.open("rb") as handle:
            return handle.read(132)[128:] == b"DICM"
    except OSError:
        return False
