"""Kills, interrupts and full disks in every stage: nothing half-written stands, and the same command completes.

Commands run in children of a fork server that has torch loaded already: the process is a real one, started fast.
Each is stopped at the worst moment, when a file is written whole and about to take its final name.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pipeline import SMALL, Built, Ended

from tlexport.bundle import manifest, preflight
from tlexport.progress import Silent
from tlexport.recipe import with_overrides
from tlexport.run import Run
from tlexport.stages import bench, compile, verify

Cli = Callable[..., Ended]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "timm",
        "onnxscript",
        "sklearn.datasets",
        "scipy.stats",
        "torch.export._trace",
        "onnxruntime.quantization",
        "tlexport.stages",
    ]
)

# stage -> the names whose appearance ends a step of it
FINALS = {
    "finetune": ["state.safetensors", "model.safetensors", "reference", "manifest.json"],
    "export": ["fp32.onnx", "golden"],
    "quantize": ["int8-cpu.onnx"],
    "compile": ["cpu-onnxruntime-fp32", "manifest.json"],
    "verify": ["verify.json"],
    "bench": ["bench.json"],
    "package": ["bundle"],
}


Lean = dict[str, Path]


@pytest.fixture(scope="module")
def lean(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Lean:
    """What the run looks like before each stage where only the CPU is a target and only FP32 is compiled."""
    folder = tmp_path_factory.mktemp("lean")
    before = {}
    for stage in ("export", "quantize", "compile"):
        before[stage] = Path(shutil.copytree(built.before[stage], folder / stage))
        recipe = before[stage] / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("- sm89\n", ""))
    run = Run(shutil.copytree(before["compile"], folder / "run"))
    narrow = with_overrides(run.recipe, ["precision=[fp32]"])
    for stage, following in ((compile, "verify"), (verify, "bench"), (bench, "package")):
        stage.run(run, narrow, Silent())
        before[following] = Path(shutil.copytree(run.path, folder / following))
    return before


def child(arguments: list[str], final: str, marker: Path, log: Path, limit: int | None) -> None:
    """A command line that stops for good when `final` is about to get its name."""
    rename = pathlib.Path.rename

    def stop(self: Path, target: Path) -> Path:
        if Path(target).name == final and not marker.exists():
            marker.touch()
            time.sleep(60)
        return rename(self, target)

    pathlib.Path.rename = stop  # type: ignore[method-assign,assignment]
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    import torch

    from tlexport.cli import main

    torch.set_num_threads(1)
    sys.argv = ["tlexport", *arguments]
    main()


def start(arguments: list[str], folder: Path, final: str = "", limit: int | None = None) -> Any:
    process = CONTEXT.Process(target=child, args=(arguments, final, folder / "marker", folder / "log", limit))
    process.start()
    return process


def stopped(arguments: list[str], folder: Path, final: str, number: int) -> int:
    """Start the command, send it a signal when it comes to `final`, and return how it ended."""
    process = start(arguments, folder, final)
    deadline = time.monotonic() + 90
    while not (folder / "marker").exists():
        assert process.is_alive() and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(30)
    (folder / "marker").unlink()
    return process.exitcode


def command(stage: str, run: Path, bundle: Path) -> list[str]:
    if stage == "finetune":
        return [
            "finetune",
            "digits-quickstart",
            *SMALL,
            "targets=[cpu]",
            "data.limit=40",
            "transfer.epochs=2",
            "--out",
            str(run),
            "--json",
        ]
    extra = ["--out", str(bundle)] if stage == "package" else []
    narrow = ["-p", "fp32"] if stage == "compile" else []
    return [stage, str(run), *narrow, *extra, "--json"]


def names(folder: Path) -> set[str]:
    """What stands under a final name; logs and hidden work in progress aside."""
    return {
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*")
        if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    }


def prepared(lean: Lean, stage: str, folder: Path) -> Path:
    run = folder / "run"
    if stage != "finetune":
        shutil.copytree(lean[stage], run)
    return run


def completes(tlx: Cli, arguments: list[str], stage: str, run: Path, bundle: Path) -> Ended:
    ended = tlx(*arguments)
    assert ended.code == 0, ended.err
    assert ended.json["run"] == str(run)
    hidden = [p for p in run.rglob(".*.partial") if "cache" not in p.relative_to(run).parts]
    assert hidden == []
    if stage == "package":
        preflight.check(bundle)
    else:
        Run(run).require_unchanged(stage)
    return ended


@pytest.mark.parametrize(
    ("stage", "final"), [(stage, final) for stage, finals in FINALS.items() for final in finals]
)
def test_kill_9_at_the_worst_moment(lean: Lean, tmp_path: Path, tlx: Cli, stage: str, final: str) -> None:
    run, bundle = prepared(lean, stage, tmp_path), tmp_path / "bundle"
    arguments = command(stage, run, bundle)
    before = names(run) if run.exists() else set()
    assert stopped(arguments, tmp_path, final, signal.SIGKILL) == -signal.SIGKILL
    appeared = (names(run) - before) | ({"bundle"} if bundle.exists() else set())
    if final != "manifest.json" or stage != "finetune":
        assert not any(Path(name).name == final for name in appeared), appeared
    if (run / "manifest.json").exists():
        assert stage not in json.loads((run / "manifest.json").read_text())["stages"]
    completes(tlx, arguments, stage, run, bundle)


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        *((stage, signal.SIGINT) for stage in FINALS),
        *((stage, signal.SIGTERM) for stage in ("finetune", "compile")),
    ],
)
def test_ctrl_c_and_sigterm_clean_up_and_say_so(
    lean: Lean, tmp_path: Path, tlx: Cli, stage: str, number: int
) -> None:
    code, kind = (130, "Interrupted") if number == signal.SIGINT else (143, "Terminated")
    run, bundle = prepared(lean, stage, tmp_path), tmp_path / "bundle"
    arguments = command(stage, run, bundle)
    final = FINALS[stage][-2] if len(FINALS[stage]) > 1 else FINALS[stage][0]
    assert stopped(arguments, tmp_path, final, number) == code
    written = (tmp_path / "log").read_text()
    assert "Traceback" not in written and "resumes" in written
    assert f'"kind": "{kind}"' in written and f'"exit_code": {code}' in written
    assert not list(run.rglob(".*.partial"))  # unlike a kill, an interrupt leaves no litter
    completes(tlx, arguments, stage, run, bundle)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stopped_while_a_bundle_is_replaced(
    lean: Lean, bundle_copy: Path, tmp_path: Path, tlx: Cli, number: int
) -> None:
    """Between the two renames: an interrupt puts the old bundle back, a kill leaves it for the next call to put back."""
    run = prepared(lean, "package", tmp_path)
    old = (bundle_copy / manifest.NAME).read_bytes()
    stopped(command("package", run, bundle_copy), tmp_path, bundle_copy.name, number)
    if number == signal.SIGKILL:
        assert not bundle_copy.exists()
    else:
        assert (bundle_copy / manifest.NAME).read_bytes() == old
        preflight.check(bundle_copy)
    completes(tlx, command("package", run, bundle_copy), "package", run, bundle_copy)
    assert (bundle_copy / manifest.NAME).read_bytes() != old


def test_a_killed_build_leaves_no_process_behind(lean: Lean, tmp_path: Path) -> None:
    run = prepared(lean, "compile", tmp_path)
    assert (
        stopped(command("compile", run, tmp_path / "b"), tmp_path, "cpu-onnxruntime-fp32", signal.SIGKILL)
        == -9
    )
    deadline = time.monotonic() + 10
    while (left := _mentioning(str(run))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


def _mentioning(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if text in (entry / "environ").read_bytes().decode(errors="replace") + (
                    entry / "cmdline"
                ).read_bytes().decode(errors="replace"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_a_run_in_use_is_refused(built: Built, run_copy: Run, tlx: Cli) -> None:
    with run_copy.lock():
        for stage in ("export", "build"):
            refused = subprocess.run(
                [sys.executable, "-m", "tlexport", stage, str(run_copy.path), "--json"],
                capture_output=True,
                text=True,
                timeout=90,
            )
            assert refused.returncode == 6 and "in use by another" in json.loads(refused.stdout)["error"]
    assert tlx("export", run_copy.path, "--json").code == 0


# A limit that lets the small JSON files through and stops the first real output of the stage.
LIMITS = {"finetune": 60_000, "export": 60_000, "compile": 60_000, "bench": 4_000, "package": 60_000}


@pytest.mark.parametrize("stage", LIMITS)
def test_a_file_size_limit_is_a_storage_error_and_the_run_resumes(
    lean: Lean, tmp_path: Path, tlx: Cli, stage: str
) -> None:
    run, bundle = prepared(lean, stage, tmp_path), tmp_path / "bundle"
    arguments = command(stage, run, bundle)
    process = start(arguments, tmp_path, limit=LIMITS[stage])
    process.join(90)
    written = (tmp_path / "log").read_text()
    assert process.exitcode == 7, written
    assert '"kind": "StorageError"' in written and "Traceback" not in written
    assert not bundle.exists()
    completes(tlx, arguments, stage, run, bundle)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"needs the right to mount a tmpfs ({made.stderr.strip()})")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("stage", FINALS)
def test_a_full_disk_is_a_storage_error_and_the_run_resumes(
    lean: Lean, small_disk: Path, tmp_path: Path, tlx: Cli, stage: str
) -> None:
    run, bundle = prepared(lean, stage, small_disk), small_disk / "bundle"
    run.mkdir(exist_ok=True)
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(b"x" * (free - 12_288))
    arguments = command(stage, run, bundle)
    before = names(run)
    process = start(arguments, tmp_path)
    process.join(90)
    written = (tmp_path / "log").read_text()
    assert process.exitcode == 7, written
    assert "free some space" in written and "Traceback" not in written
    assert not bundle.exists()
    half = {
        name for name in names(run) - before if (run / name).is_file() and (run / name).stat().st_size == 0
    }
    assert half <= {".lock"}
    filler.unlink()
    completes(tlx, arguments, stage, run, bundle)


def test_a_read_only_file_system(lean: Lean, small_disk: Path, tlx: Cli) -> None:
    run = prepared(lean, "package", small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for arguments in (["finetune", "digits-quickstart", "--out", small_disk / "new"], ["export", run]):
        refused = tlx(*arguments, "--json")
        assert refused.code == 7 and "read-only" in refused.json["error"]
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


def test_an_output_under_a_file(run_copy: Run, tmp_path: Path, tlx: Cli) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "bundle", tmp_path / "file"):
        refused = tlx("package", run_copy.path, "--out", out, "--json")
        assert refused.code == 7 and str(tmp_path / "file") in refused.json["error"]
    assert (tmp_path / "file").read_text() == "x"


def test_half_a_run_directory_says_what_to_do(built: Built, tmp_path: Path, tlx: Cli) -> None:
    run = Run(shutil.copytree(built.run, tmp_path / "run"))
    shutil.rmtree(run / "variants")
    for stage in ("verify", "bench", "package"):
        refused = tlx(stage, run.path, "--json")
        assert (
            refused.code == 6 and "variants/" in refused.json["error"] and "tlexport" in refused.json["error"]
        )
    (run / "checkpoint/model.safetensors").unlink()
    refused = tlx("export", run.path, "--json")
    assert refused.code in (4, 6) and "checkpoint" in refused.json["error"]
    (run / "recipe.yaml").write_text("data: [")
    assert tlx("export", run.path, "--json").code == 6
