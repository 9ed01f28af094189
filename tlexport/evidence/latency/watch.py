"""What the machine did while something was measured: clock rates, time given to others, throttling, GPUs.

Read before, after and between blocks of timed calls, never inside one. Linux is read fully; elsewhere what cannot be
read is None. GPUs are asked through NVML (the package nvidia-ml-py), which is optional.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from tlexport import cores
from tlexport.evidence.latency import nvml
from tlexport.timings import Watch

STEAL = 1.0  # percent of all cores' time
OTHERS = 20.0
SLOWER = 0.8  # of its own highest clock rate
INTERVAL_S = 0.5
SHORTEST_S = 1.0  # of all cores' time, below which the kernel's ticks of 10 ms tell no percentage


@dataclass(frozen=True)
class Counters:
    """Running totals of the machine and of this process at one moment; None where they cannot be read."""

    at: float
    all_s: float  # of all cores, since boot
    busy_s: float
    steal_s: float | None
    own_s: float
    usage: tuple[int, int, int, int] | None  # voluntary and involuntary switches, minor and major faults
    throttled: tuple[int, float] | None


class Watcher:
    """Use with `with`; call `look` between blocks. `record` tells what was seen, after the end too."""

    def __init__(self) -> None:
        self.spent: list[float] = []
        self.lowest: list[float] = []
        self.highest: list[float] = []
        self.gpus = nvml.Gpus()

    def __enter__(self) -> Watcher:
        self.gpus.open()
        self.last = -float("inf")
        self.look()
        self.before = self.after = counters()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.after = counters()
        self.last = -float("inf")
        self.look()
        self.gpus.close()

    def look(self) -> None:
        """Read clock rates and GPUs, unless that was done INTERVAL_S ago."""
        began = time.perf_counter()
        if began - self.last < INTERVAL_S:
            return
        if rates := frequencies():
            self.lowest = [min(pair) for pair in zip(self.lowest or rates, rates, strict=True)]
            self.highest = [max(pair) for pair in zip(self.highest or rates, rates, strict=True)]
        self.gpus.look()
        self.last = time.perf_counter()
        self.spent.append(self.last - began)

    def record(self) -> Watch:
        """What was seen from the beginning to the end of the `with` block."""
        first, last = self.before, self.after
        every = last.all_s - first.all_s
        steal = None if last.steal_s is None or first.steal_s is None else last.steal_s - first.steal_s
        used = last.busy_s - first.busy_s - (last.own_s - first.own_s)
        usage = (
            tuple(b - a for a, b in zip(first.usage, last.usage, strict=True))
            if first.usage and last.usage
            else (None,) * 4
        )
        throttled = (
            (last.throttled[0] - first.throttled[0], last.throttled[1] - first.throttled[1])
            if first.throttled and last.throttled
            else (None, None)
        )
        found = Watch(
            seconds=last.at - first.at,
            cpu_mhz=tuple(self.lowest) or None,
            cpu_mhz_highest=tuple(self.highest) or None,
            steal_percent=_percent(steal, every),
            others_percent=_percent(max(0.0, used), every),
            voluntary_switches=usage[0],
            involuntary_switches=usage[1],
            minor_faults=usage[2],
            major_faults=usage[3],
            throttled_periods=throttled[0],
            throttled_s=throttled[1],
            gpus=self.gpus.states(),
            gpu_note=self.gpus.note,
            readings=len(self.spent),
            reading_ms=1e3 * max(self.spent),
        )
        return found.model_copy(update={"warnings": warnings(found)})


def warnings(found: Watch) -> tuple[str, ...]:
    """What a reader of the numbers must know first."""
    said = []
    if found.steal_percent is not None and found.steal_percent > STEAL:
        said.append(f"the hypervisor gave {found.steal_percent:.1f}% of the CPU's time to other machines")
    if found.throttled_periods:
        said.append(
            f"the container had used up its CPU time in {found.throttled_periods} periods and stood still for "
            f"{found.throttled_s or 0:.2f} s"
        )
    if found.others_percent is not None and found.others_percent > OTHERS:
        said.append(f"other processes used {found.others_percent:.0f}% of the CPU's time")
    if found.cpu_mhz and found.cpu_mhz_highest:
        low, high = min(found.cpu_mhz), max(found.cpu_mhz_highest)
        if low < SLOWER * high:
            said.append(f"the CPU's clock went down to {low:.0f} of {high:.0f} MHz")
    for gpu in found.gpus:
        if gpu.throttled:
            said.append(f"{gpu.name} held its clocks down: {', '.join(gpu.throttled)}")
    return tuple(said)


def counters() -> Counters:
    """Now."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    steal = getattr(times, "steal", None)
    # The guests' time is in user's already.
    every = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    own = os.times()
    return Counters(
        at=time.perf_counter(),
        all_s=every,
        busy_s=every - idle - (steal or 0.0),
        steal_s=steal,
        own_s=own.user + own.system,
        usage=_usage(),
        throttled=cores.throttled(),
    )


def frequencies() -> list[float]:
    """MHz of each core; empty where they cannot be read."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    return [
        float(line.partition(":")[2]) for line in text.splitlines() if line.startswith("cpu MHz")
    ]  # fmt: skip


def _usage() -> tuple[int, int, int, int] | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_nvcsw, used.ru_nivcsw, used.ru_minflt, used.ru_majflt


def _percent(part: float | None, whole: float) -> float | None:
    return None if part is None or whole < SHORTEST_S else round(100 * part / whole, 2)
