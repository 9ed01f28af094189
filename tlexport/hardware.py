"""What this machine's processors can run, asked of the system and the driver themselves: no torch, no toolkit, no output."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

# What decides which kernels an inference library picks, by the kernel's names for it (x86, then Arm).
RELEVANT_ISA = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni",
    "avx_vnni_int8", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
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


@functools.cache
def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the installed driver runs, (13, 0) for instance; None where there is no driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


def instruction_sets() -> tuple[str, ...]:
    """Those of RELEVANT_ISA that this CPU has; empty where they cannot be read."""
    try:
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8"))[1]
    except OSError:
        return ()


def parse_cpuinfo(text: str) -> tuple[str | None, tuple[str, ...], bool | None]:
    """Model, relevant instruction sets and whether a hypervisor shows, from the text of /proc/cpuinfo."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            fields.setdefault(key.strip(), value.strip())
    listed = fields.get("flags") or fields.get("Features")
    if listed is None:
        return fields.get("model name"), (), None
    flags = set(listed.split())
    # Arm's cpuinfo does not show a hypervisor, so nothing can be said there.
    virtualised = "hypervisor" in flags if "flags" in fields else None
    return fields.get("model name"), tuple(name for name in RELEVANT_ISA if name in flags), virtualised
