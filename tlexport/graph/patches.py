"""A product as rows of weights times vectors of its input: [groups, outputs, K] and [groups, P, K]."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from onnx import NodeProto, helper


def rows_of(weight: np.ndarray, node: NodeProto) -> np.ndarray:
    """The weight of a Conv, Gemm or MatMul as [groups, outputs of each, K]; `like` undoes it."""
    if node.op_type == "Conv":
        groups = int(_settings(node).get("group", 1))
        return weight.reshape(groups, len(weight) // groups, -1)
    return (weight if _rows_first(node) else weight.T)[None]


def like(weight: np.ndarray, rows: np.ndarray, node: NodeProto) -> np.ndarray:
    """The rows in the shape of the weight they come from."""
    if node.op_type == "Conv":
        return rows.reshape(weight.shape)
    return np.ascontiguousarray(rows[0] if _rows_first(node) else rows[0].T)


def places(inputs: np.ndarray, node: NodeProto, kernel: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    """Which of each sample's outputs to look at: int64 [at most `count`], drawn without repetition."""
    available = math.prod(
        _windows(inputs, node, kernel).shape[2 : inputs.ndim]
        if node.op_type == "Conv"
        else inputs.shape[1:-1]
    )
    return np.random.default_rng(seed).permutation(available)[:count]


def patches(inputs: np.ndarray, node: NodeProto, kernel: tuple[int, ...], chosen: np.ndarray) -> np.ndarray:
    """What each chosen output of each sample is made of: [groups, N * P, K], from [N, C, ...] or [N, ..., K]."""
    if node.op_type != "Conv":
        return inputs.reshape(len(inputs), -1, inputs.shape[-1])[:, chosen].reshape(1, -1, inputs.shape[-1])
    groups = int(_settings(node).get("group", 1))
    windows = _windows(inputs, node, kernel)
    outputs: tuple[Any, ...] = np.unravel_index(chosen, windows.shape[2 : inputs.ndim])
    everything: tuple[Any, ...] = (slice(None), slice(None))
    picked = windows[everything + outputs]  # [N, C, P, *kernel]
    count, channels, positions = picked.shape[:3]
    blocks = picked.reshape(count, groups, channels // groups, positions, -1)
    return np.asarray(blocks.transpose(1, 0, 3, 2, 4).reshape(groups, count * positions, -1))


def _windows(inputs: np.ndarray, node: NodeProto, kernel: tuple[int, ...]) -> np.ndarray:
    """A view [N, C, *outputs, *kernel] of the padded input."""
    settings = _settings(node)
    ones = [1] * len(kernel)
    strides, dilations = settings.get("strides", ones), settings.get("dilations", ones)
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    begin, end = _padding(settings, inputs.shape[2:], extents, strides)
    padded = np.pad(inputs, [(0, 0), (0, 0), *zip(begin, end, strict=True)])
    axes = tuple(range(2, inputs.ndim))
    view = np.lib.stride_tricks.sliding_window_view(padded, extents, axis=axes)
    every = (*(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))
    return np.asarray(view[(slice(None), slice(None), *every)])


def _padding(
    settings: dict[str, Any], sizes: tuple[int, ...], extents: list[int], strides: list[int]
) -> tuple[list[int], list[int]]:
    """Zeros before and after each spatial dimension, as `pads` or `auto_pad` has it."""
    automatic = bytes(settings.get("auto_pad", b"NOTSET")).decode()
    if not automatic.startswith("SAME"):
        pads = list(settings.get("pads", [0] * 2 * len(sizes)))
        return pads[: len(sizes)], pads[len(sizes) :]
    total = [
        max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
        for size, extent, stride in zip(sizes, extents, strides, strict=True)
    ]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return (less, more) if automatic == "SAME_UPPER" else (more, less)


def _rows_first(node: NodeProto) -> bool:
    return node.op_type == "Gemm" and bool(_settings(node).get("transB", 0))


def _settings(node: NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
