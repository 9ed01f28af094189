"""Which NVIDIA GPU this machine has, asked of the driver itself: no torch, no toolkit, nothing printed."""

from __future__ import annotations

import ctypes
import functools

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h


@functools.cache
def capability() -> str:
    """Target name of the first GPU (`sm89`), or an empty string where there is no usable one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return "" if failed else f"sm{major.value}{minor.value}"
