"""The workflow files that are shipped: they parse, and every command in them is a real one with real flags."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from tlexport.cli import app

FILES = sorted((Path(__file__).parents[1] / "docs" / "workflows").glob("*.yml"))


def commands(document: dict) -> list[list[str]]:
    """Words of each `tlexport` call in a step, by job and step."""
    runs = [step["run"] for job in document["jobs"].values() for step in job["steps"] if "run" in step]
    return [
        shlex.split(line)[1:] for run in runs for line in run.splitlines() if line.startswith("tlexport ")
    ]


def parsed(words: list[str]) -> object:
    """As the command line would, without running anything. Raises usage errors."""
    whole = typer.main.get_command(app)
    name, *rest = words
    command = whole.commands.get(name)  # type: ignore[attr-defined]
    assert command is not None, f"no command {name!r}"
    return command.make_context(name, rest)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_command_is_real(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    assert set(document) >= {"name", "jobs"} and (True in document or "on" in document)
    for job in document["jobs"].values():
        assert job["runs-on"] and all(("uses" in step) != ("run" in step) for step in job["steps"])
    found = commands(document)
    assert found
    for words in found:
        parsed(words)


@pytest.mark.parametrize(
    "words", [["bench", "b", "--basline", "x"], ["bench", "b", "--tolerance", "much"], ["verify"]]
)
def test_a_planted_mistake_is_seen(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"(?i)no such option|valid number|missing"):
        parsed(words)


def test_what_is_uploaded_is_what_is_written() -> None:
    (path,) = [path for path in FILES if path.name == "tlexport-gate.yml"]
    text = path.read_text()
    written = re.findall(r"--(?:junit|tracker|history) (\S+)", text)
    assert len(written) == 5 and all(name.startswith("gate/") for name in written)
    assert "path: gate/" in text
