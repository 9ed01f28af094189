from __future__ import annotations

import getpass
import platform
import sys
import time
from pathlib import Path

import pytest

from tlexport import cores
from tlexport.evidence import machine
from tlexport.evidence.machine import (
    Gpu,
    Machine,
    describe,
    find_gpus,
    parse_gpus,
)
from tlexport.hardware import parse_cpuinfo

CPUINFO = """processor\t: 0
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu avx2 fma avx512f avx512_vnni amx_int8 hypervisor

processor\t: 1
model name\t: something else
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n"


def test_this_machine_is_described_and_survives_json() -> None:
    found = describe()
    assert Machine.model_validate_json(found.model_dump_json()) == found
    assert found.memory_gib > 0.1
    assert 1 <= found.usable_cores == cores.usable() <= found.logical_cores
    if sys.platform == "linux":
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
        assert machine.has_vnni() == ("avx512_vnni" in flags or "avx_vnni" in flags)
        assert ("avx2" in found.isa) == ("avx2" in flags)
        assert found.steal_s is not None and found.load_average is not None


def test_nothing_says_whose_machine_it_is() -> None:
    text = describe().model_dump_json()
    private = {platform.node(), str(Path.home()), str(Path.cwd())} - {"", "/", "localhost"}
    assert not [name for name in private if name in text]
    assert f'"{getpass.getuser()}"' not in text


def test_cpuinfo_is_read_for_intel_arm_and_nothing() -> None:
    model, isa, virtualised = parse_cpuinfo(CPUINFO)
    assert model == "Intel(R) Xeon(R) Platinum 8480+" and virtualised is True
    assert isa == ("avx2", "fma", "avx512f", "avx512_vnni", "amx_int8")
    assert parse_cpuinfo(ARM) == (None, ("asimd", "asimddp", "i8mm"), None)
    assert parse_cpuinfo("") == (None, (), None)


@pytest.mark.parametrize(
    ("flags", "vnni"),
    [("avx2 avx512_vnni", True), ("avx2 avx_vnni", True), ("avx2 avx512f", False), (None, False)],
)
def test_vnni(flags: str | None, vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = f"flags : {flags}\n" if flags else None
    monkeypatch.setattr(machine, "_read", lambda path: cpuinfo if path == "/proc/cpuinfo" else None)
    assert machine.has_vnni() is vnni


def test_gpus_are_parsed_with_fields_a_driver_does_not_know() -> None:
    text = (
        "NVIDIA H200, 9.0, 143771 MiB, 570.86.15\nNVIDIA L4, [N/A], 23034 MiB, 570.86.15\nwarning of a kind\n"
    )
    assert parse_gpus(text) == (
        Gpu(name="NVIDIA H200", compute_capability="9.0", memory_mib=143771, driver="570.86.15"),
        Gpu(name="NVIDIA L4", compute_capability=None, memory_mib=23034, driver="570.86.15"),
    )


@pytest.mark.parametrize(
    ("script", "note"),
    [
        ("echo 'NVIDIA L4, 8.9, 23034 MiB, 550.90.07'", ""),
        (
            "echo 'NVIDIA-SMI has failed: no driver' >&2; exit 9",
            "failed with code 9: NVIDIA-SMI has failed: no driver",
        ),
        ("exec sleep 30", "did not answer within 0.5 s"),
        ("true", "lists no GPU"),
    ],
)
def test_nvidia_smi_answers_fails_hangs_or_lists_nothing(
    script: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    began = time.monotonic()
    gpus, said = find_gpus(timeout_s=0.5)
    assert time.monotonic() - began < 5
    assert note in said and bool(gpus) == (note == "")


def test_no_nvidia_smi_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus() == ((), "no nvidia-smi on this machine")
