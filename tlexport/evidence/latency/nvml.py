"""The state of NVIDIA GPUs through NVML (package nvidia-ml-py, module pynvml); without it, why there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tlexport.timings import GpuState

# NVML API Reference, nvmlClocksEventReasons: bit -> words.
REASONS = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks setting",
}
HARMLESS = 0x1 | 0x2  # idle; clocks as the user set them


def words(bits: int) -> tuple[str, ...]:
    """Why the clocks are held down; empty if they are not, or only because the GPU is idle or set so."""
    known = tuple(text for bit, text in REASONS.items() if bits & bit)
    rest = bits & ~HARMLESS & ~sum(REASONS)
    return (*known, f"unknown reason {rest:#x}") if rest else known


class Gpus:
    """All GPUs of this machine between `open` and `close`. `note` says why there are none."""

    def __init__(self) -> None:
        self.note = ""
        self._library: Any = None
        self._handles: list[Any] = []
        self._last: list[GpuState] = []

    def open(self) -> None:
        try:
            import pynvml
        except ImportError:
            self.note = "not asked: pip install 'tlexport[nvml]'"
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.note = f"NVML: {error}"
            return
        self._library = pynvml
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        self.note = "" if self._handles else "NVML lists no GPU"

    def look(self) -> None:
        """Read every GPU; reasons to hold clocks down are kept from one reading to the next."""
        now = [self._state(handle) for handle in self._handles]
        if self._last:
            now = [
                state.model_copy(update={"throttled": tuple(dict.fromkeys(last.throttled + state.throttled))})
                for last, state in zip(self._last, now, strict=True)
            ]
        self._last = now

    def states(self) -> tuple[GpuState, ...]:
        return tuple(self._last)

    def close(self) -> None:
        if self._library is not None:
            self._library.nvmlShutdown()
            self._library, self._handles = None, []

    def _state(self, handle: Any) -> GpuState:
        nvml = self._library

        def read(ask: Callable[..., Any], *more: Any) -> Any:
            """None where this GPU does not tell."""
            try:
                return ask(handle, *more)
            except nvml.NVMLError:
                return None

        name = read(nvml.nvmlDeviceGetName)
        power, memory = read(nvml.nvmlDeviceGetPowerUsage), read(nvml.nvmlDeviceGetMemoryInfo)
        # Renamed in driver 535; older drivers know the older name only.
        reasons = read(nvml.nvmlDeviceGetCurrentClocksEventReasons)
        if reasons is None:
            reasons = read(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        return GpuState(
            name=name.decode() if isinstance(name, bytes) else name or "unnamed",
            sm_mhz=read(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            memory_mhz=read(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            temperature_c=read(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power is None else power / 1e3,
            memory_used_mib=None if memory is None else memory.used / 2**20,
            throttled=words(reasons or 0),
        )
