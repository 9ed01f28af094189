"""An encoded image to the graph's input, on a server: what stands here needs numpy and Pillow alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tlexport.modalities import image_decode
from tlexport.modalities.image_sizing import Sizing


def prepare(
    preprocessing: Mapping[str, Any], names: Sequence[str]
) -> Callable[[bytes], dict[str, np.ndarray]]:
    """A function from the bytes of a JPEG, PNG ... (see image_decode; no DICOM) to uint8 [C, S, S] under the input's name.

    It raises CorruptImageError for what cannot be read.
    """
    sizing = Sizing(**{key: own for key, own in preprocessing.items() if key != "dicom"})
    (name,) = names
    return lambda content: {name: sizing.apply(image_decode.decode_bytes(content))}
