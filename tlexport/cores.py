"""How many processor cores this process may use: what it is pinned to, and what its container is allotted."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def usable() -> int:
    """Logical cores this process may use: its affinity, or the container's CPU quota where that is smaller; at least 1.

    A quota that is not a whole number is rounded down: a thread more than there is time for only waits.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = quota()
    return allowed if limit is None else max(1, min(allowed, int(limit)))


def quota() -> float | None:
    """CPU seconds a second that the tightest control group around this process allows; None: no limit known.

    Version 2 keeps `cpu.max`, version 1 `cpu.cfs_quota_us` beside `cpu.cfs_period_us`. Inside a container a
    process usually sees its own group as the root, so that the root's files are read too.
    """
    limits = [limit for folder in _folders() if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def throttled() -> tuple[int, float] | None:
    """In how many periods a control group around this process had used up its time, and for how many seconds it waited.

    Since the group exists: compare before and after. The group that waited longest; None where nothing is counted.
    """
    found = [counted for folder in _folders() if (counted := _throttling(folder)) is not None]
    return max(found, key=lambda counted: counted[1], default=None)


def _throttling(folder: Path) -> tuple[int, float] | None:
    """From cpu.stat: version 2 counts microseconds, version 1 nanoseconds."""
    lines = (line.split() for line in (_read(folder / "cpu.stat") or "").splitlines())
    fields = {words[0]: int(words[1]) for words in lines if len(words) == 2}
    if "nr_throttled" not in fields:
        return None
    seconds = fields.get("throttled_usec", 0) / 1e6 + fields.get("throttled_time", 0) / 1e9
    return fields["nr_throttled"], seconds


def _folders() -> list[Path]:
    """The process's control groups for CPU time, each with those above it up to the mount point."""
    folders = [_MOUNT, _MOUNT / "cpu", _MOUNT / "cpu,cpuacct"]
    for line in (_read(_CGROUPS) or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _MOUNT / controllers if controllers else _MOUNT
        group = root / path.strip("/")
        folders += [above for above in (group, *group.parents) if above.is_relative_to(root)]
    return list(dict.fromkeys(folders))


def _limit(folder: Path) -> float | None:
    if (text := _read(folder / "cpu.max")) is not None:
        allowance, _, period = text.partition(" ")
    else:
        allowance = _read(folder / "cpu.cfs_quota_us") or "-1"
        period = _read(folder / "cpu.cfs_period_us") or "100000"
    return int(allowance) / int(period) if allowance not in ("max", "-1") else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip() or None
    except OSError:
        return None
