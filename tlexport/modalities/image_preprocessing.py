"""What turns a decoded image of any size into the graph's input, exactly: a client repeats it with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport import cores
from tlexport.errors import DataError
from tlexport.modalities.image_pixels import Pixels
from tlexport.modalities.image_sizing import Sizing
from tlexport.recipe import Dicom

_WORTH_THREADS = 32
_AS_STORED = Dicom()  # the first frame, by the file's own window


@dataclass(frozen=True)
class Preprocessing(Sizing):
    """Saved with the checkpoint: how an image is sized, and by `dicom` how a DICOM file is decoded before that."""

    dicom: Dicom = _AS_STORED

    def describe(self) -> dict[str, Any]:
        own = {
            "image_size": self.image_size,
            "channels": self.channels,
            "resize": self.resize,
            "interpolation": self.interpolation,
        }
        return own if self.dicom == _AS_STORED else own | {"dicom": self.dicom.model_dump(mode="json")}

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> Preprocessing:
        """The one that `describe` describes. Raises DataError if it is none."""
        try:
            return cls(**{**description, "dicom": Dicom.model_validate(description.get("dicom", {}))})
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{dict(description)} is no preprocessing that this version of tlexport knows"
            ) from error

    def batch(self, images: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> Pixels:
        """Several images, equally large or not, as uint8 [B, C, S, S]; the same as `apply` on each."""
        size = self.image_size
        if isinstance(images, np.ndarray) and images.shape[1:] == (size, size, self.channels):
            return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        out = np.empty((len(images), self.channels, size, size), np.uint8)

        def fill(index: int) -> None:
            out[index] = self.square(images[index]).transpose(2, 0, 1)

        if len(images) < _WORTH_THREADS:
            for index in range(len(images)):
                fill(index)
        else:
            with ThreadPoolExecutor(cores.usable()) as pool:
                list(pool.map(fill, range(len(images))))
        return out
