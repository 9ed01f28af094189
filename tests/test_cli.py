"""Every command: its help, its JSON, its exit codes, and what it writes where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import jsonschema
import pytest
from pipeline import SMALL, Built, Ended

import tlexport
from tlexport.cli import app, recipes_app
from tlexport.errors import TlexportError
from tlexport.recipe import shipped
from tlexport.run import Run

Cli = Callable[..., Ended]

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]
RECIPE_COMMANDS = [command.name for command in recipes_app.registered_commands]
STAGES = ("export", "quantize", "compile", "verify", "bench")


def program(arguments: list[str], out: IO[str] | int) -> subprocess.CompletedProcess[str]:
    """A process of its own whose standard output is `out`."""
    command = [sys.executable, "-m", "tlexport", *arguments]
    return subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60)


def schema(tlx: Cli, name: str) -> dict:
    document = tlx("schema", name).json
    jsonschema.Draft202012Validator.check_schema(document)
    # A result without its fields must not pass: every schema forbids nothing, so it has to require something.
    assert document.get("required") or name == "recipe", name
    return document


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(tlx: Cli, command: str) -> None:
    for flag in ("--help", "-h"):
        shown = tlx(command, flag)
        assert (shown.code, shown.err) == (0, "")
        assert f"{command} [OPTIONS]" in shown.out and f"Example: tlexport {command}" in shown.out
        assert "--json" in shown.out and "--debug" in shown.out


@pytest.mark.parametrize("command", ["", *RECIPE_COMMANDS])
def test_help_of_recipes(tlx: Cli, command: str) -> None:
    shown = tlx("recipes", *filter(None, [command]), "--help")
    assert shown.code == 0 and f"recipes {command}".strip() in shown.out and "--json" in shown.out


def test_help_lists_every_command_and_no_arguments_mean_help(tlx: Cli) -> None:
    shown = tlx("--help")
    assert shown.code == 0 and all(f"  {command}" in shown.out for command in [*COMMANDS, "recipes"])
    assert tlx() == shown


@pytest.mark.parametrize(
    "arguments", [["bogus"], ["finetune"], ["finetune", "--bogus"], ["build", "--max-drop", "x", "runs/d"]]
)
def test_wrong_usage(tlx: Cli, arguments: list[str]) -> None:
    plain = tlx(*arguments)
    assert plain.code == 2 and plain.out == "" and plain.err.startswith("error: ")
    told = tlx(*arguments, "--json")
    assert (told.code, told.json["exit_code"], told.json["kind"]) == (2, 2, "UsageError")


@pytest.mark.parametrize("command", ["bench", "load"])
@pytest.mark.parametrize("flag", ["--rate", "--seconds", "--max-p99"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1", "0"])
def test_what_never_ends_is_no_number(tlx: Cli, command: str, flag: str, value: str) -> None:
    at = ["http://localhost:1"] if command == "load" else []
    done = tlx(command, *at, "bundle", flag, value)
    assert done.code == 2 and flag in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["schema", "build"], 7, "error: cannot write the output: the disk is full"),
        (["recipes", "--json"], 7, "error: cannot write the output: the disk is full"),
        (["export", "gone", "--json"], 6, "error: gone is not a run"),
    ],
)
def test_a_full_standard_output_is_a_storage_error(arguments: list[str], code: int, said: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    with Path("/dev/full").open("w") as full:
        done = program(arguments, full)
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert done.stderr.startswith(said)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_change_nothing(tmp_path: Path, closed: str) -> None:
    """What is opened next would get their numbers, and what is printed."""
    command = f"{sys.executable} -m tlexport schema build > {tmp_path}/told {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert bool((tmp_path / "told").read_text()) == (" >&-" not in f" {closed}")


def test_schemas_are_listed_and_an_unknown_one_is_an_error(tlx: Cli) -> None:
    names = tlx("schema").out.split()
    extra = {"recipes", "recipe", "bundle", "bench-bundle", "gate", "replay", "error"}
    assert {*COMMANDS, *extra} - {"schema"} == set(names)
    assert tlx("schema", "--json").json == {"schemas": names}
    for name in names:
        jsonschema.Draft202012Validator.check_schema(tlx("schema", name).json)
    assert tlx("schema", "nope").code == 2


def test_recipes(tlx: Cli, tmp_path: Path) -> None:
    listed = tlx("recipes", "--json")
    assert tlx("recipes", "list", "--json") == listed and set(listed.json["recipes"]) == set(shipped())
    jsonschema.validate(listed.json, schema(tlx, "recipes"))
    for name, path in shipped().items():
        assert tlx("recipes", "show", name).out == path.read_text()
        jsonschema.validate(tlx("recipes", "show", name, "--json").json, schema(tlx, "recipe"))
    assert tlx("recipes", "copy", "insects", tmp_path).out.strip() == str(tmp_path / "insects.yaml")
    (tmp_path / "insects.yaml").write_text("mine")
    refused = tlx("recipes", "copy", "insects", tmp_path, "--json")
    assert refused.code == 7 and "exists" in refused.json["error"]
    assert (tmp_path / "insects.yaml").read_text() == "mine"


def test_doctor(tlx: Cli) -> None:
    found = tlx("doctor", "--json")
    jsonschema.validate(found.json, schema(tlx, "doctor"))
    assert (
        "onnxruntime" in found.json["targets"]["cpu"] and "cannot be built" in found.json["targets"]["sm90"]
    )
    shown = tlx("doctor")
    assert shown.code == 0 and "sm90" in shown.out and "onnxruntime" in shown.out


def test_every_stage_prints_one_object_that_its_schema_describes(tlx: Cli, run_copy: Run) -> None:
    path = run_copy.path
    for stage in STAGES:
        ended = tlx(stage, path, "--json")
        assert ended.code == 0 and f"{stage}: unchanged, skipped" in ended.err
        own = schema(tlx, stage)
        jsonschema.validate(ended.json, own)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({}, own)


def test_finetune_build_package_inspect_print_what_their_schemas_describe(
    tlx: Cli, built: Built, run_copy: Run, tmp_path: Path
) -> None:
    path = run_copy.path
    tuned = tlx(
        "finetune",
        "digits-quickstart",
        *SMALL,
        f"targets=[{', '.join(built.targets)}]",
        "--out",
        path,
        "--json",
    )
    assert tuned.code == 0 and "finetune: unchanged, skipped" in tuned.err
    jsonschema.validate(tuned.json, schema(tlx, "finetune"))
    assert {"auc", "accuracy", "balanced_accuracy", "ece"} <= set(tuned.json["metrics"]["test"])
    assert tuned.json["images_per_second"] > 0 and tuned.json["strategy"] == "full"

    made = tlx("build", path, "--out", tmp_path / "bundle", "--json")
    jsonschema.validate(made.json, schema(tlx, "build"))
    assert made.code == 0 and made.json["failed"] == {} and set(made.json["chosen"]) == set(built.targets)
    wanted = "name backend target precision metric drop max_abs_error p50_ms p99_ms speedup size_bytes receipt verdict reason"
    assert all(set(wanted.split()) <= set(variant) for variant in made.json["variants"])

    packed = tlx("package", path, "--out", tmp_path / "bundle", "--json")
    jsonschema.validate(packed.json, schema(tlx, "package"))
    assert packed.json["chosen"] == made.json["chosen"]

    for place, kind in ((path, "run"), (tmp_path / "bundle", "bundle")):
        seen = tlx("inspect", place, "--json")
        jsonschema.validate(seen.json, schema(tlx, "inspect"))
        assert seen.json["kind"] == kind
        assert tlx("inspect", place).code == 0
    jsonschema.validate(json.loads((tmp_path / "bundle/manifest.json").read_text()), schema(tlx, "bundle"))


def test_the_table_marks_what_was_chosen(tlx: Cli, run_copy: Run, tmp_path: Path) -> None:
    shown = tlx("build", run_copy.path, "--out", tmp_path / "bundle", "--quiet")
    chosen = [line.split()[1] for line in shown.out.splitlines() if line.startswith("* ")]
    assert shown.code == 0 and shown.err == "" and chosen
    assert all(f"{name} (" in shown.out for name in chosen)
    assert "torch-eager" in shown.out and str(tmp_path / "bundle") in " ".join(shown.out.split())


def test_dry_runs_do_nothing(tlx: Cli, run_copy: Run, tmp_path: Path) -> None:
    path = run_copy.path
    told = tlx(
        "finetune",
        "insects",
        "data.path=bugs",
        "--epochs",
        3,
        "--seed",
        9,
        "--out",
        tmp_path / "x",
        "--dry-run",
        "--json",
    )
    assert (
        told.json["transfer"]["epochs"] == 3
        and told.json["seed"] == 9
        and told.json["data"]["path"] == "bugs"
    )
    assert not (tmp_path / "x").exists()
    told = tlx(
        "build",
        path,
        "--target",
        "RTX 4090",
        "-p",
        "fp16",
        "--max-drop",
        0.5,
        "--out",
        tmp_path / "x",
        "--dry-run",
        "--json",
    )
    assert (told.json["targets"], told.json["precision"], told.json["gates"]["max_drop"]) == (
        ["sm89"],
        ["fp16"],
        0.5,
    )
    assert not (tmp_path / "x").exists()
    assert "targets:" in tlx("build", path, "--dry-run").out


def test_a_missed_latency_gate_is_exit_13_and_no_bundle(tlx: Cli, run_copy: Run, tmp_path: Path) -> None:
    path = run_copy.path
    missed = tlx(
        "build",
        path,
        "--target",
        "cpu",
        "-p",
        "fp32",
        "gates.max_p50_ms=1e-6",
        "--out",
        tmp_path / "b",
        "--json",
    )
    assert missed.code == 13 and missed.json["bundle"] is None and missed.json["chosen"] == {}
    assert "over max_p50_ms" in missed.json["failed"]["cpu"] and "error: cpu: " in missed.err
    assert not (tmp_path / "b").exists()
    jsonschema.validate(missed.json, schema(tlx, "build"))
    # No bundle comes out of the failed measurements by another door, and verify alone has nothing against them.
    assert tlx("package", path, "--out", tmp_path / "b").code == 10 and not (tmp_path / "b").exists()
    assert tlx("bench", path, "gates.max_p50_ms=1e-6").code == 13


def test_a_target_that_nothing_here_serves_is_refused_before_any_work(
    tlx: Cli, run_copy: Run, tmp_path: Path
) -> None:
    path = run_copy.path
    graph = (path / "graphs/fp32.onnx").stat()
    refused = tlx("build", path, "export.opset=21", "--target", "sm90", "--out", tmp_path / "b", "--json")
    assert refused.code == 9 and refused.json["kind"] == "CompileError"
    assert "sm90" in refused.json["error"] and "tlexport doctor" in refused.json["error"]
    assert (path / "graphs/fp32.onnx").stat().st_mtime_ns == graph.st_mtime_ns and not (
        tmp_path / "b"
    ).exists()


ERRORS = {
    "recipe": (2, "RecipeError", ["finetune", "digits-quikstart"], "did you mean 'digits-quickstart'"),
    "value": (
        2,
        "RecipeError",
        ["finetune", "digits-quickstart", "--strategy", "magic"],
        "transfer.strategy",
    ),
    "data": (3, "DataError", ["finetune", "insects", "data.path=gone/", "--out", "r"], "gone does not exist"),
    "weights": (
        4,
        "WeightsError",
        [
            "finetune",
            "digits-quickstart",
            "backbone.weights=gone.pth",
            "data.limit=20",
            "data.image_size=32",
            "--out",
            "r",
        ],
        "gone.pth",
    ),
    "no run": (6, "RunError", ["build", "gone"], "tlexport finetune RECIPE --out gone"),
    "storage": (
        7,
        "StorageError",
        ["finetune", "digits-quickstart", "--out", "file/run"],
        "is a file, not a directory",
    ),
    "bundle": (11, "BundleError", ["inspect", "."], "neither a bundle"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_an_exit_code_and_an_object(
    tlx: Cli, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, kind, arguments, said = ERRORS[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    told = tlx(*arguments, "--json")
    assert (told.code, told.json["exit_code"], told.json["kind"]) == (code, code, kind)
    assert said in told.json["error"] and told.err.endswith(f"error: {told.json['error']}\n")
    assert "Traceback" not in told.err
    jsonschema.validate(told.json, schema(tlx, "error"))
    plain = tlx(*arguments, "--debug")
    assert plain.code == code and plain.out == "" and "Traceback" in plain.err


def test_every_error_class_has_the_code_its_tree_states() -> None:
    from tlexport import errors

    stated = {
        line.strip("│├└─ ").split()[0]: int(line.strip("│├└─ ").split()[1])
        for line in errors.__doc__.splitlines()
        if "Error " in line or "Crash " in line
    }
    classes = {name: getattr(errors, name) for name in errors.__all__}
    assert {name: found.exit_code for name, found in classes.items()} == stated
    assert all(issubclass(found, TlexportError) for found in classes.values())


@pytest.mark.parametrize(
    "arguments", [["recipes"], ["recipes", "show", "insects"], ["schema", "build"], ["recipes", "--json"]]
)
def test_a_reader_that_goes_away_is_no_crash(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = program(arguments, writing)
    os.close(writing)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert done.returncode in (0, 1)


def test_python_m_and_the_function_are_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tlexport", "build", "gone"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 6 and done.stdout == "" and done.stderr.startswith("error: gone is not a run")


def test_version(tlx: Cli) -> None:
    told = tlx("--version")
    assert told.code == 0 and told.out.split() == ["tlexport", tlexport.__version__]
