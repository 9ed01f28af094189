"""The machine that numbers were measured on: enough to read them by, nothing that says whose it is.

No host, user or path names are read. Linux is described fully; elsewhere what cannot be read is None.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from tlexport import cores
from tlexport.hardware import parse_cpuinfo

VNNI = {"avx512_vnni", "avx_vnni"}
GPU_FIELDS = ("name", "compute_cap", "memory.total", "driver_version")


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Gpu(Frozen):
    name: str
    compute_capability: str | None
    memory_mib: int | None
    driver: str | None


class Machine(Frozen):
    """CPU, memory, system and GPUs; None where it cannot be read."""

    cpu: str | None
    architecture: str
    physical_cores: int | None
    logical_cores: int | None
    usable_cores: int
    quota_cores: float | None  # limit of the container's CPU time; None: no limit known
    isa: tuple[str, ...]  # those of hardware.RELEVANT_ISA; empty where they cannot be read
    frequency_mhz: float | None  # as reported now
    max_frequency_mhz: float | None
    governor: str | None
    virtualised: bool | None
    memory_gib: float
    system: str
    distribution: str | None
    kernel: str
    load_average: tuple[float, float, float] | None  # 1, 5, 15 minutes
    steal_s: float | None  # time the hypervisor gave to others since boot; compare before and after
    gpus: tuple[Gpu, ...]
    gpu_note: str  # why there are none, or why they could not be asked


def describe() -> Machine:
    """This machine, now."""
    model, isa, virtualised = parse_cpuinfo(_read("/proc/cpuinfo") or "")
    now, highest = _frequency()
    gpus, note = find_gpus()
    return Machine(
        cpu=model or _brand(),
        architecture=platform.machine(),
        physical_cores=psutil.cpu_count(logical=False),
        logical_cores=psutil.cpu_count(),
        usable_cores=cores.usable(),
        quota_cores=cores.quota(),
        isa=isa,
        frequency_mhz=now,
        max_frequency_mhz=highest,
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        virtualised=virtualised,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=platform.system(),
        distribution=_distribution(),
        kernel=platform.release(),
        load_average=_load(),
        steal_s=steal_seconds(),
        gpus=gpus,
        gpu_note=note,
    )


def has_vnni() -> bool:
    """Whether the CPU adds 8-bit products without 16-bit saturation; False where it cannot be told."""
    return bool(VNNI & set(parse_cpuinfo(_read("/proc/cpuinfo") or "")[1]))


def busy_percent(seconds: float = 0.5) -> float:
    """Share of all cores in use by others, in percent, while this process waits for `seconds`."""
    return float(psutil.cpu_percent(interval=seconds))


def steal_seconds() -> float | None:
    """CPU time, summed over cores, that the hypervisor gave to other guests since boot."""
    return getattr(psutil.cpu_times(), "steal", None)


def find_gpus(timeout_s: float = 10.0) -> tuple[tuple[Gpu, ...], str]:
    """NVIDIA GPUs as nvidia-smi lists them, and why there are none or why it failed."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return (), "no nvidia-smi on this machine"
    query = [command, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi did not answer within {timeout_s:g} s"
    except OSError as error:
        return (), f"nvidia-smi cannot be started: {error.strerror}"
    if answer.returncode:
        said = (answer.stderr or answer.stdout).strip().splitlines()
        return (), f"nvidia-smi failed with code {answer.returncode}: {said[-1] if said else 'no message'}"
    gpus = parse_gpus(answer.stdout)
    return gpus, "" if gpus else "nvidia-smi lists no GPU"


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Lines such as `NVIDIA L4, 8.9, 23034 MiB, 550.90.07`; a field that reads `[N/A]` becomes None."""
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines()]
    gpus = []
    for row in (row for row in rows if len(row) == len(GPU_FIELDS)):
        name, capability, memory, driver = (None if field.startswith("[") else field for field in row)
        mib = int(memory.removesuffix("MiB")) if memory else None
        gpus.append(Gpu(name=name or "unnamed", compute_capability=capability, memory_mib=mib, driver=driver))
    return tuple(gpus)


def _frequency() -> tuple[float | None, float | None]:
    try:
        frequency = psutil.cpu_freq()
    except (OSError, NotImplementedError, RuntimeError):  # not offered by some virtual and Apple machines
        return None, None
    if frequency is None:
        return None, None
    return round(frequency.current, 1) or None, round(frequency.max, 1) or None


def _load() -> tuple[float, float, float] | None:
    try:
        return os.getloadavg()
    except (OSError, AttributeError):
        return None


def _distribution() -> str | None:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        return None


def _brand() -> str | None:
    """The CPU's name where there is no /proc (macOS), else None."""
    command = shutil.which("sysctl")
    if platform.system() != "Darwin" or command is None:
        return None
    answer = subprocess.run(
        [command, "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5, check=False
    )
    return answer.stdout.strip() or None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
