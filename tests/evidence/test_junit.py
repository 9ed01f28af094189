"""The one writer of JUnit XML: verdicts as elements, hostile text, and a file for a call that ended early."""

from __future__ import annotations

from pathlib import Path

import junit_file
import pytest

from tlexport.errors import ServerError, StorageError
from tlexport.evidence import junit
from tlexport.evidence.junit import Case

CASES = [
    Case("x", "one", "pass", output="{}"),
    Case("x", "two", "fail", "too much"),
    Case("x.y", "three", "undecided", "too few", "{}"),
    Case("x", "four", "skipped", "not here"),
]


def test_each_verdict_has_its_element() -> None:
    assert junit_file.read(junit.text("x", CASES, 2.0)) == {
        "one": ("pass", ""),
        "two": ("fail", "too much"),
        "three": ("undecided", "too few"),
        "four": ("skipped", "not here"),
    }
    assert junit_file.read(junit.text("x", [], 2.0)) == {}


def test_what_a_server_says_cannot_break_the_file(tmp_path: Path) -> None:
    hostile = 'a <b> & "c" \x00\x1b \ud800 \uffff ]]> é 💥\n'
    path = tmp_path / "x.xml"
    with junit.kept(path, "x") as keep:
        keep([Case("x", "hostile", "fail", hostile, hostile)])
    verdict, said = junit_file.read(path.read_text(encoding="utf-8"))["hostile"]
    assert verdict == "fail" and said.split() == ["a", "<b>", "&", '"c"', "]]>", "é", "💥"]


def test_a_call_that_ends_early_leaves_no_older_file_standing(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.xml"
    with junit.kept(path, "x") as keep:
        keep(CASES[:1])
    assert junit_file.read(path.read_text())["one"] == ("pass", "")
    with pytest.raises(ServerError), junit.kept(path, "x") as keep:
        keep(CASES[:1])
        raise ServerError("nothing answers")
    assert junit_file.read(path.read_text()) == {"x": ("undecided", "ServerError: nothing answers")}


def test_no_case_is_a_result_too(tmp_path: Path) -> None:
    path = tmp_path / "x.xml"
    path.write_text("an older one")
    with junit.kept(path, "x") as keep:
        keep(())
    assert junit_file.read(path.read_text()) == {}


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError), junit.kept(tmp_path / "file" / "x.xml", "x") as keep:
        keep(CASES)


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with junit.kept(None, "x") as keep:
        keep(CASES)
    assert not list(tmp_path.iterdir())
