"""What the machine did: read on this machine, judged on planted values, and NVML's words without a GPU."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tlexport import cores
from tlexport.evidence.latency import nvml, watch
from tlexport.evidence.latency.watch import Watcher, warnings
from tlexport.timings import GpuState, Watch

QUIET = Watch(
    seconds=1.0,
    cpu_mhz=(3000.0, 3000.0),
    cpu_mhz_highest=(3000.0, 3100.0),
    steal_percent=0.2,
    others_percent=3.0,
    voluntary_switches=1,
    involuntary_switches=1,
    minor_faults=1,
    major_faults=0,
    throttled_periods=0,
    throttled_s=0.0,
    readings=2,
    reading_ms=0.1,
)

HOT = GpuState(
    name="A GPU",
    sm_mhz=900,
    memory_mhz=5000,
    temperature_c=90,
    power_w=70.0,
    memory_used_mib=1.0,
    throttled=("hardware thermal slowdown",),
)


def test_a_watch_counts_what_this_process_did() -> None:
    with Watcher() as watcher:
        time.sleep(0.02)
        touched = np.ones(8_000_000)
        for _ in range(3):
            watcher.look()
    found = watcher.record()
    assert found.seconds >= 0.02 and touched[0] == 1
    assert found.readings == 2, "before and after: in between it was asked too soon"
    assert 0 < found.reading_ms < 1000
    if sys.platform == "linux":
        assert found.voluntary_switches >= 1 and found.minor_faults > 100
    assert type(found).model_validate_json(found.model_dump_json()) == found


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time given to other machines is not told")
def test_a_watch_that_is_long_enough_tells_who_used_the_cpu() -> None:
    with Watcher() as watcher:
        time.sleep(watch.SHORTEST_S / (os.cpu_count() or 1) + 0.1)
    found = watcher.record()
    assert found.steal_percent >= 0 and 0 <= found.others_percent <= 100
    assert type(found).model_validate_json(found.model_dump_json()) == found


def test_a_time_too_short_for_the_kernels_ticks_tells_no_percentage(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tick of another process within two is no half of the machine's time."""
    start = watch.counters()
    moments = iter(
        [start, replace(start, at=start.at + 0.01, all_s=start.all_s + 0.02, busy_s=start.busy_s + 0.02)]
    )
    monkeypatch.setattr(watch, "counters", lambda: next(moments))
    with Watcher() as watcher:
        pass
    found = watcher.record()
    assert found.others_percent is found.steal_percent is None and found.warnings == ()


def test_a_look_that_comes_too_soon_costs_next_to_nothing() -> None:
    """Called after every round of timed calls: the median of 200 must stay far below a millisecond."""
    with Watcher() as watcher:
        took = []
        for _ in range(200):
            began = time.perf_counter()
            watcher.look()
            took.append(time.perf_counter() - began)
    assert np.median(took) < 1e-4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steal_percent": 1.5}, "hypervisor gave 1.5%"),
        ({"throttled_periods": 3, "throttled_s": 0.25}, "in 3 periods and stood still for 0.25 s"),
        ({"others_percent": 40.0}, "other processes used 40%"),
        ({"cpu_mhz": (2000.0, 3000.0)}, "went down to 2000 of 3100 MHz"),
        (
            {"gpus": (HOT,)},
            "A GPU held its clocks down: hardware thermal slowdown",
        ),
    ],
)
def test_what_a_reader_must_know_is_said(changes: dict[str, object], said: str) -> None:
    assert warnings(QUIET) == ()
    (line,) = warnings(QUIET.model_copy(update=changes))
    assert said in line


def test_what_cannot_be_read_is_no_warning() -> None:
    unknown = dict.fromkeys(
        ("steal_percent", "others_percent", "throttled_periods", "cpu_mhz", "cpu_mhz_highest")
    )
    assert warnings(QUIET.model_copy(update=unknown)) == ()


@pytest.mark.parametrize(
    ("version", "text", "found"),
    [
        ("2", "usage_usec 5\nnr_periods 9\nnr_throttled 4\nthrottled_usec 250000\n", (4, 0.25)),
        ("1", "nr_periods 9\nnr_throttled 4\nthrottled_time 250000000\n", (4, 0.25)),
        ("none", "usage_usec 5\n", None),
    ],
)
def test_a_containers_throttling_is_read_in_both_versions(
    version: str, text: str, found: object, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu.stat").write_text(text)
    monkeypatch.setattr(cores, "_folders", lambda: [tmp_path / "absent", tmp_path])
    assert cores.throttled() == found


def test_reasons_are_told_in_words_and_idleness_is_none() -> None:
    assert nvml.words(0x0) == nvml.words(0x1) == nvml.words(0x2) == ()
    assert nvml.words(0x1 | 0x4 | 0x40) == ("software power cap", "hardware thermal slowdown")
    assert nvml.words(0x8 | 0x4000) == ("hardware slowdown", "unknown reason 0x4000")


def test_the_reasons_are_those_of_the_library() -> None:
    library = pytest.importorskip("pynvml")
    named = {
        "software power cap": library.nvmlClocksEventReasonSwPowerCap,
        "hardware slowdown": library.nvmlClocksThrottleReasonHwSlowdown,
        "sync boost": library.nvmlClocksEventReasonSyncBoost,
        "software thermal slowdown": library.nvmlClocksEventReasonSwThermalSlowdown,
        "hardware thermal slowdown": library.nvmlClocksThrottleReasonHwThermalSlowdown,
        "hardware power brake": library.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
        "display clocks setting": library.nvmlClocksEventReasonDisplayClockSetting,
    }
    assert {text: bit for bit, text in nvml.REASONS.items()} == named
    idle = library.nvmlClocksEventReasonGpuIdle | library.nvmlClocksEventReasonApplicationsClocksSetting
    assert idle == nvml.HARMLESS


def test_without_the_package_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Watcher() as watcher:
        pass
    found = watcher.record()
    assert found.gpus == () and found.gpu_note == "not asked: pip install 'tlexport[nvml]'"


class PretendedNvml(SimpleNamespace):
    """Stands in for NVML on a machine that has no NVIDIA GPU: one GPU that gets hot between two readings."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    readings = 0
    open = False

    def nvmlInit(self) -> None:
        self.open = True

    def nvmlShutdown(self) -> None:
        self.open = False

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return "handle"

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"Pretended GPU"

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return {1: 1800, 2: 5000}[clock]

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 70

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:
        return SimpleNamespace(used=3 * 2**20)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: str) -> int:
        raise self.NVMLError("Function Not Found")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        self.readings += 1
        return 0x40 if self.readings == 1 else 0x1


def test_a_throttled_gpu_is_remembered_and_what_it_does_not_tell_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretended = PretendedNvml()
    monkeypatch.setitem(sys.modules, "pynvml", pretended)
    with Watcher() as watcher:
        assert pretended.open
    found = watcher.record()
    (gpu,) = found.gpus
    assert (gpu.name, gpu.sm_mhz, gpu.memory_mhz, gpu.temperature_c) == ("Pretended GPU", 1800, 5000, 70)
    assert gpu.power_w is None and gpu.memory_used_mib == 3.0
    assert gpu.throttled == ("hardware thermal slowdown",), "at the first reading; at the last it was idle"
    assert any("Pretended GPU held its clocks down" in line for line in found.warnings)
    assert not pretended.open and watch.INTERVAL_S > 0
