"""Mistakes with pictures: uint8 [n, C, S, S], 0 to 255. The graph itself normalises."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.evidence.live.mistakes import ROUGH, Mistake, Samples

# torchvision's, of nearly every published network; other values are other hypotheses.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CANONICAL = 256 / 224  # torchvision's presets scale the side to 256 and cut out 224
_WRONG = "only an approximation: the golden samples hold resized pixels, not the originals"


def known(channels: int, height: int, width: int) -> tuple[Mistake, ...]:
    """For pictures [C, H, W]."""
    found = [*_colours(channels), *_ranges(channels), *_layouts(channels, height == width)]
    return (*found, *_resizes(height, width))


def _colours(channels: int) -> list[Mistake]:
    inverted = Mistake(
        "inverted grey levels: black for white",
        "send 0 for black; a DICOM file of MONOCHROME1 is to be inverted first",
        lambda x: 255 - x,
    )
    if channels != 3:
        return [inverted]
    return [
        Mistake(
            "BGR for RGB: the colour channels arrive in reverse order",
            "reverse the channels where the picture is decoded (OpenCV decodes to BGR)",
            lambda x: np.ascontiguousarray(x[:, ::-1]),
        ),
        inverted,
        Mistake("grey for colour: all three channels are the same", "decode the picture to RGB", _grey),
    ]


def _grey(x: Samples) -> Samples:
    luma = np.tensordot(np.array([0.299, 0.587, 0.114]), x.astype(np.float64), axes=(0, 1))
    return np.repeat(np.rint(luma).astype(np.uint8)[:, None], 3, axis=1)


def _ranges(channels: int) -> list[Mistake]:
    """Values on another scale than 0 to 255, and a normalisation that is missing or of another network.

    The graph computes (x / 255 - mean) / std. Where std * x + 255 * mean is sent, that leaves x / 255: as without it.
    """
    mean, std = (_channelwise(values, channels) for values in (IMAGENET_MEAN, IMAGENET_STD))
    once = "the graph normalises by itself: send bytes, 0 to 255"

    def normalised(x: Samples) -> Samples:
        return _single((x / 255.0 - mean) / std)

    def without(x: Samples, shift: float, scale: float) -> Samples:
        return _single(255 * (mean + std * (x / 255.0 - shift) / scale))

    return [
        Mistake("0-1 for 0-255: the pixels are divided by 255 before the graph does it", once, _unit),
        Mistake(
            "0-1 for 0-255, cut to whole numbers: every pixel is 0 or 1 and the picture is black",
            once,
            lambda x: (x / 255.0).astype(np.uint8),
        ),
        Mistake(
            "-1..1 for 0-255: the pixels are scaled before the graph does it",
            once,
            lambda x: _single(x / 127.5 - 1),
        ),
        Mistake("ImageNet's mean and standard deviation applied twice", once, normalised),
        Mistake(
            "ImageNet's mean and standard deviation applied twice, the second time to values of 0-1",
            once,
            lambda x: 255 * normalised(x),
        ),
        Mistake(
            "no normalisation: 0-1 reach the network",
            "deploy the graph of the bundle, which normalises",
            partial(without, shift=0.0, scale=1.0),
        ),
        Mistake(
            "another normalisation: -1..1 reach the network, not ImageNet's",
            "deploy the graph of the bundle, which normalises",
            partial(without, shift=0.5, scale=0.5),
        ),
    ]


def _channelwise(values: tuple[float, ...], channels: int) -> NDArray[np.float64]:
    own = values if channels == len(values) else (sum(values) / len(values),) * channels
    return np.array(own).reshape(1, -1, 1, 1)


def _unit(x: Samples) -> Samples:
    return _single(x / 255.0)


def _single(x: NDArray[Any]) -> Samples:
    return np.ascontiguousarray(x, np.float32)


def _layouts(channels: int, square: bool) -> list[Mistake]:
    turned = "turn the picture as its EXIF orientation says, and send rows from top to bottom"
    found = [
        Mistake("upside down: rows from bottom to top", turned, _view(lambda x: x[:, :, ::-1])),
        Mistake("mirrored: columns from right to left", turned, _view(lambda x: x[..., ::-1])),
        Mistake("turned by 180 degrees", turned, _view(lambda x: x[:, :, ::-1, ::-1])),
    ]
    if channels > 1:
        found.insert(
            0,
            Mistake(
                "NHWC for NCHW: the bytes of [height, width, channel] are read as [channel, height, width]",
                "transpose to [channel, height, width]",
                lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(x.shape),
            ),
        )
    if square:
        found += [
            Mistake("rows and columns exchanged", turned, _view(lambda x: x.swapaxes(2, 3))),
            Mistake("turned by 90 degrees", turned, _view(lambda x: np.rot90(x, axes=(2, 3)))),
            Mistake("turned by 270 degrees", turned, _view(lambda x: np.rot90(x, k=-1, axes=(2, 3)))),
        ]
    return found


def _view(of: Callable[[Samples], Samples]) -> Callable[[Samples], Samples]:
    return lambda x: np.ascontiguousarray(of(x))


def _resizes(height: int, width: int) -> list[Mistake]:
    """Round trips of the resized pixels that leave about what another resizing of the originals would have."""
    larger = (round(height * CANONICAL), round(width * CANONICAL))
    half = (max(1, height // 2), max(1, width // 2))
    size = (height, width)

    def zoomed(x: Samples) -> Samples:
        top, left = (larger[0] - height) // 2, (larger[1] - width) // 2
        return np.ascontiguousarray(
            _sized(x, larger, "bilinear")[:, :, top : top + height, left : left + width]
        )

    def squashed(x: Samples) -> Samples:
        narrow = _sized(x, (height, round(width * 0.75)), "bilinear")
        left = (width - narrow.shape[3]) // 2
        sides = (left, width - narrow.shape[3] - left)
        return np.pad(narrow, [(0, 0), (0, 0), (0, 0), sides], mode="edge")

    def padded(x: Samples) -> Samples:
        low = _sized(x, (round(height * 0.75), width), "bilinear")
        top = (height - low.shape[2]) // 2
        return np.pad(low, [(0, 0), (0, 0), (top, height - low.shape[2] - top), (0, 0)])

    steps = {
        "wrong resize: scaled to 256/224 of the side and cut to the middle, as torchvision's presets do": zoomed,
        "wrong resize: nearest neighbour for bilinear": lambda x: _sized(
            _sized(x, half, "nearest"), size, "nearest"
        ),
        "wrong resize: through half of the resolution": lambda x: _sized(
            _sized(x, half, "bilinear"), size, "bilinear"
        ),
        "wrong resize: squashed to a square for cut to one": squashed,
        "wrong resize: padded with black for cut to a square": padded,
    }
    advice = "resize as `preprocessing` in the bundle's manifest says"
    return [Mistake(f"{says} ({_WRONG})", advice, change, ROUGH) for says, change in steps.items()]


def _sized(x: Samples, size: tuple[int, int], how: str) -> Samples:
    """uint8 [n, C, *, *] -> uint8 [n, C, *size], each plane by Pillow."""
    from PIL import Image

    filters = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}
    made = np.empty((*x.shape[:2], *size), np.uint8)
    for sample, channel in np.ndindex(*x.shape[:2]):
        made[sample, channel] = Image.fromarray(x[sample, channel]).resize(size[::-1], filters[how])
    return made
