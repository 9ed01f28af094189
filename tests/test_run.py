"""The run directory: atomic writes, skipping, locks, and what the operating system refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pydantic import BaseModel

from tlexport.errors import RunError, StorageError
from tlexport.recipe import load
from tlexport.run import Run, digest, replacing, storage_errors, write_json, write_text


class Outcome(BaseModel):
    value: int


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", load("insects"))


def _finish(run: Run, config: dict, source: Path) -> None:
    record = run.stage("demo", config, inputs=[source])
    write_text(run / "made.txt", "made")
    record.finish(Outcome(value=7), outputs=[run / "made.txt"])


def test_a_stage_is_skipped_only_while_nothing_changed(run: Run) -> None:
    source = run / "source.txt"
    write_text(source, "one")
    assert run.stage("demo", {"a": 1}, [source]).unchanged(Outcome) is None
    _finish(run, {"a": 1}, source)
    assert run.stage("demo", {"a": 1}, [source]).unchanged(Outcome) == Outcome(value=7)
    assert run.stage("demo", {"a": 2}, [source]).unchanged(Outcome) is None
    (run / "made.txt").write_text("tampered")
    assert run.stage("demo", {"a": 1}, [source]).unchanged(Outcome) is None
    write_text(run / "made.txt", "made")
    assert run.stage("demo", {"a": 1}, [source]).unchanged(Outcome) is not None
    write_text(source, "two")
    assert run.stage("demo", {"a": 1}, [source]).unchanged(Outcome) is None


def test_result_of_a_stage_that_has_not_run_names_the_command(run: Run) -> None:
    with pytest.raises(RunError, match="tlexport export"):
        run.result("export", Outcome)
    with pytest.raises(RunError, match="tlexport quantize"):
        run.require("graphs/fp16.onnx", "quantize")


def test_another_recipe_does_not_take_over_a_run(run: Run) -> None:
    assert Run.create(run.path, load("insects")).recipe == run.recipe
    write_text(run / "source.txt", "one")
    _finish(run, {}, run / "source.txt")
    with pytest.raises(RunError, match="seed"):
        Run.create(run.path, load("insects", ["seed=5"]))


def test_a_directory_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        Run.create(tmp_path, load("insects"))
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    with pytest.raises(RunError, match="not a run"):
        Run(tmp_path)


def test_replacing_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError("power cut")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("1")
    with replacing(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "b").write_text("2")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["b"]


def test_kill_9_while_writing_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from tlexport.run import replacing
with replacing(Path({str(tmp_path / "final")!r})) as partial:
    partial.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "final").exists()
    write_text(tmp_path / "final", "whole")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_second_process_is_refused_while_the_first_holds_the_lock(run: Run) -> None:
    code = f"from tlexport.run import Run\nwith Run({str(run.path)!r}).lock():\n    pass\n"
    with run.lock():
        refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert refused.returncode != 0 and "in use by another" in refused.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_lock_dies_with_its_process(run: Run) -> None:
    code = (
        f"import time\nfrom tlexport.run import Run\nwith Run({str(run.path)!r}).lock():\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    child.kill()
    child.wait()
    time.sleep(0.05)
    with run.lock():
        pass


def test_a_directory_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="a directory of that name is in the way"),
        storage_errors(tmp_path),
    ):
        tmp_path.write_text("x")


def test_a_copy_that_fails_names_where_it_goes(tmp_path: Path) -> None:
    (tmp_path / "from").write_text("x")
    (tmp_path / "to").mkdir()
    with pytest.raises(StorageError, match=r"cannot write \S*/to: "), storage_errors(tmp_path):
        (tmp_path / "from").replace(tmp_path / "to")


def test_a_full_device_is_a_storage_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with (
        pytest.raises(StorageError, match="disk is full"),
        storage_errors(Path("x")),
        Path("/dev/full").open("w") as handle,
    ):
        handle.write("x" * 100_000)


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX file size limit")
def test_what_is_in_the_way_of_a_write_is_told(tmp_path: Path) -> None:
    """A directory under the file's name, links in a circle, and a directory that is gone; a missing input is none of them."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    for path, says in (
        ("taken", "a directory of that name"),
        ("circle/file", "round in a circle"),
        ("gone/file", "can be made there"),
    ):
        with pytest.raises(StorageError, match=says), storage_errors(tmp_path / path):
            (tmp_path / path).write_text("x")
    with pytest.raises(FileNotFoundError), storage_errors(tmp_path / "out" / "file"):
        (tmp_path / "data" / "input").read_text()


def test_a_file_size_limit_is_a_storage_error(tmp_path: Path) -> None:
    code = f"""
import resource, signal
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from tlexport.run import write_text
write_text(Path({str(tmp_path / "big")!r}), "x" * 5000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "StorageError" in done.stderr
    assert not (tmp_path / "big").exists()


def test_a_file_where_a_directory_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        Run.create(tmp_path / "file" / "run", load("insects"))


def test_a_broken_manifest_says_what_to_do(run: Run) -> None:
    (run / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="not valid JSON"):
        _ = run.manifest
    write_json(run / "manifest.json", {"manifest_version": 99, "stages": {}})
    with pytest.raises(RunError, match="99"):
        _ = run.manifest


def test_json_refuses_values_that_are_not_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"auc": float("nan")})
    assert not (tmp_path / "x.json").exists()


def test_digest_of_a_directory_depends_on_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("1")
    first = digest(tmp_path / "d")
    (tmp_path / "d" / "a").rename(tmp_path / "d" / "b")
    second = digest(tmp_path / "d")
    (tmp_path / "d" / "b").write_text("2")
    assert len({first, second, digest(tmp_path / "d")}) == 3


def test_versions_are_recorded(run: Run) -> None:
    source = run / "source.txt"
    write_text(source, "one")
    _finish(run, {}, source)
    record = json.loads((run / "manifest.json").read_text())["stages"]["demo"]
    assert {"python", "torch", "onnx"} <= set(record["versions"])


def test_a_run_in_which_nothing_was_done_yet_takes_another_recipe(run: Run) -> None:
    other = load("insects", ["seed=5"])
    assert Run.create(run.path, other).recipe == other
