"""Any decoded image to the graph's size, exactly: numpy and Pillow alone, so that a server can carry this very file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError
from tlexport.modalities.image_pixels import Pixels


@dataclass(frozen=True)
class Sizing:
    """In order:

    1. RGB to grey where channels is 1: Pillow's convert("L"), ITU-R 601-2 luma.
    2. resize "crop": cut the central square, side min(H, W), offsets (W - side) // 2 and (H - side) // 2, and scale
       it to S x S; "squash": scale to S x S; "pad": scale so that the longer side is S (the other rounded half up,
       at least 1) and centre on black, offsets (S - w) // 2 and (S - h) // 2.
       Scaling is Pillow's Image.resize with Resampling.BILINEAR, which is antialiased when it shrinks.
    3. grey to RGB where channels is 3: the grey value three times.

    Pillow works in integers, so the result is the same on every machine.
    """

    image_size: int
    channels: int
    resize: str = "crop"
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        known = self.resize in ("crop", "squash", "pad") and self.interpolation == "bilinear"
        if not known or self.channels not in (1, 3) or self.image_size < 1:
            raise DataError(f"{self} is no preprocessing that this version of tlexport knows")

    def apply(self, image: NDArray[np.uint8]) -> Pixels:
        """One image, uint8 [H, W], [H, W, 1] or [H, W, 3], as uint8 [C, S, S]."""
        return np.ascontiguousarray(self.square(image).transpose(2, 0, 1))

    def square(self, image: NDArray[np.uint8]) -> Pixels:
        """One image as uint8 [S, S, C]; applying it twice is applying it once."""
        from PIL import Image

        if (
            image.dtype != np.uint8
            or image.ndim not in (2, 3)
            or (image.ndim == 3 and image.shape[2] not in (1, 3))
        ):
            raise DataError(
                f"an image must be uint8 [H, W], [H, W, 1] or [H, W, 3], got {image.dtype} {list(image.shape)}"
            )
        picture = Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image)
        if self.channels == 1 and picture.mode == "RGB":
            picture = picture.convert("L")
        pixels = np.asarray(self._sized(picture))
        pixels = pixels[:, :, None] if pixels.ndim == 2 else pixels
        return np.repeat(pixels, 3, axis=2) if pixels.shape[2] < self.channels else pixels

    def _sized(self, picture: Any) -> Any:
        from PIL import Image

        size = self.image_size
        width, height = picture.size
        if self.resize == "crop":
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
        if self.resize != "pad":
            return picture.resize((size, size), Image.Resampling.BILINEAR)
        longer = max(width, height)
        fitted = (_scaled(width, size, longer), _scaled(height, size, longer))
        canvas = Image.new(picture.mode, (size, size))
        canvas.paste(
            picture.resize(fitted, Image.Resampling.BILINEAR),
            ((size - fitted[0]) // 2, (size - fitted[1]) // 2),
        )
        return canvas


def _scaled(side: int, size: int, longer: int) -> int:
    return max(1, (2 * side * size + longer) // (2 * longer))
