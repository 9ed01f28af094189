"""What loading an artifact and running it takes in memory, measured in a process of its own."""

from __future__ import annotations

from pathlib import Path

from tlexport.backends import Options, Tensors
from tlexport.timings import Memory

CALLS = 3
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_kib(field: str = "VmHWM") -> int | None:
    """Of this process in KiB: VmHWM, the most that was ever resident, or VmRSS, what is now. None but on Linux."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)


def reset_peak() -> bool:
    """Let VmHWM start anew at VmRSS (proc(5), clear_refs 5); False where the kernel or the container forbids it."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def measured(
    name: str, artifact: Path, inputs: Tensors, threads: int, device: str, options: Options
) -> Memory:
    """Load `artifact` in this process, ask it CALLS times, and tell the growth; the library is imported before."""
    from tlexport.backends import registry

    backend = registry.get(name)
    backend.availability()
    before_device = _device_used(device)
    reset_peak()
    before = peak_kib("VmRSS")
    with backend.runner(artifact, threads=threads, device=device, options=options) as runner:
        call = runner.bind(inputs).call
        for _ in range(CALLS):
            call()
        after, after_device = peak_kib(), _device_used(device)
    return Memory(
        host_peak_mib=None if before is None or after is None else round((after - before) / 1024, 2),
        device_mib=None
        if before_device is None or after_device is None
        else round((after_device - before_device) / 2**20, 2),
    )


def _device_used(device: str) -> int | None:
    """Bytes in use on the GPU by anybody; None on the CPU."""
    if device == "cpu":
        return None
    import torch

    free, whole = torch.cuda.mem_get_info()
    return int(whole - free)
