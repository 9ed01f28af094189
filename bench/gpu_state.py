"""What NVML says of the GPU at one moment: clocks, temperature, power, and why it is not at its full speed."""

from __future__ import annotations

import importlib.util
from typing import Any

# Bits of nvmlClocksEventReasons (nvml.h), in words. Being idle and having settings of its own are no throttling.
HARMLESS = {0x1: "idle", 0x2: "application clocks", 0x10: "sync boost", 0x100: "display clocks"}
THROTTLING = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def read(index: int = 0) -> dict[str, Any]:
    """`note` is why there is nothing else; a value that the GPU does not tell is null."""
    if importlib.util.find_spec("pynvml") is None:
        return {"note": "clocks, temperature and throttling are unknown: pip install nvidia-ml-py"}
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"note": f"NVML does not start here: {error}"}
    try:
        return of(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index))
    except pynvml.NVMLError as error:
        return {"note": f"NVML does not know GPU {index}: {error}"}
    finally:
        pynvml.nvmlShutdown()


def of(nvml: Any, gpu: Any) -> dict[str, Any]:
    """MHz, degrees Celsius, watts, MiB."""

    def told(ask: Any, *arguments: Any) -> Any:
        try:
            return ask(gpu, *arguments)
        except nvml.NVMLError:  # not every GPU has every sensor
            return None

    power, memory = told(nvml.nvmlDeviceGetPowerUsage), told(nvml.nvmlDeviceGetMemoryInfo)
    reasons = told(nvml.nvmlDeviceGetCurrentClocksEventReasons)
    return {
        "name": told(nvml.nvmlDeviceGetName),
        "sm_mhz": told(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "memory_mhz": told(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        "most_sm_mhz": told(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_SM),
        "celsius": told(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        "watts": None if power is None else power / 1e3,
        "used_mib": None if memory is None else memory.used >> 20,
        "reasons": None if reasons is None else words(reasons),
        "throttled": None if reasons is None else any(reasons & bit for bit in THROTTLING),
    }


def words(reasons: int) -> list[str]:
    """The names of the bits that are set; an unknown one by its number."""
    known = HARMLESS | THROTTLING
    bits = [1 << place for place in range(64) if reasons >> place & 1]
    return [known.get(bit, hex(bit)) for bit in bits]
