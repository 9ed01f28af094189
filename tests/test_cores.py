from __future__ import annotations

import os
from pathlib import Path

import pytest

from tlexport import cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight cores and an empty control-group file system in `tmp_path`."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "self")
    monkeypatch.setattr(cores, "_MOUNT", tmp_path / "mount")
    return tmp_path


def write(root: Path, groups: str, files: dict[str, str]) -> None:
    (root / "self").write_text(groups)
    for name, content in files.items():
        path = root / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")


@pytest.mark.parametrize(
    ("groups", "files", "quota", "usable"),
    [
        pytest.param("0::/\n", {}, None, 8, id="no limit known"),
        pytest.param("0::/\n", {"cpu.max": "max 100000"}, None, 8, id="v2 without a limit"),
        pytest.param("0::/\n", {"cpu.max": "150000 100000"}, 1.5, 1, id="v2, rounded down"),
        pytest.param("0::/\n", {"cpu.max": "50000 100000"}, 0.5, 1, id="v2, less than one core"),
        pytest.param("0::/\n", {"cpu.max": "1600000 100000"}, 16.0, 8, id="v2, more than the affinity"),
        pytest.param(
            "0::/pod/box\n", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "300000 100000"}, 3.0, 3, id="v2, a group above"
        ),
        pytest.param(
            "4:cpu,cpuacct:/docker/abc\n",
            {"cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "200000", "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "50000"},
            4.0,
            4,
            id="v1",
        ),
        pytest.param(
            "4:cpu:/docker/abc\n2:cpuset:/\n",
            {"cpu/cpu.cfs_quota_us": "250000", "cpu/cpu.cfs_period_us": "100000"},
            2.5,
            2,
            id="v1 in a container, which sees its own group as the root",
        ),
        pytest.param("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, 8, id="v1 unlimited"),
    ],
)  # fmt: skip
def test_affinity_and_quota(
    groups: str, files: dict[str, str], quota: float | None, usable: int, machine: Path
) -> None:
    write(machine, groups, files)
    assert cores.quota() == quota
    assert cores.usable() == usable


def test_a_machine_without_control_groups_or_affinity(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.quota() is None and cores.usable() == 1


def test_here() -> None:
    assert 1 <= cores.usable() <= (os.cpu_count() or 1)
