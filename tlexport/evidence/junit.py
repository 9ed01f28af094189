"""Verdicts as JUnit XML, which CI systems show and gate on.

The elements and attributes are those of the common JUnit schema (Apache Ant's, as read by Jenkins, GitLab and GitHub's
actions): testsuites > testsuite > testcase > failure | error | skipped, then system-out.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

from tlexport.errors import TlexportError
from tlexport.run import write_text

_ELEMENTS = {"fail": "failure", "undecided": "error", "skipped": "skipped"}
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Case:
    """A verdict. `group`: what it is shown under; `output`: the numbers behind it, as JSON."""

    group: str
    name: str
    verdict: Literal["pass", "fail", "undecided", "skipped"]
    reason: str = ""
    output: str = ""


def text(suite: str, cases: Sequence[Case], seconds: float) -> str:
    """One test case a verdict: `fail` is a failure and `undecided` an error, since neither may pass unseen.

    seconds: of all cases, which are given equal shares.
    """
    counts = Counter(case.verdict for case in cases)
    totals = {
        "name": f"tlexport {suite}",
        "tests": str(len(cases)),
        "failures": str(counts["fail"]),
        "errors": str(counts["undecided"]),
        "time": f"{seconds:.3f}",
    }
    whole = ElementTree.Element("testsuites", totals)
    held = ElementTree.SubElement(whole, "testsuite", {**totals, "skipped": str(counts["skipped"])})
    for case in cases:
        attributes = {"classname": _legal(f"tlexport.{case.group}"), "name": _legal(case.name)}
        attributes["time"] = f"{seconds / len(cases):.3f}"
        element = ElementTree.SubElement(held, "testcase", attributes)
        if kind := _ELEMENTS.get(case.verdict):
            told = {"message": _legal(case.reason)}
            if kind != "skipped":
                told["type"] = case.verdict
            ElementTree.SubElement(element, kind, told).text = _legal(case.reason)
        if case.output:
            ElementTree.SubElement(element, "system-out").text = _legal(case.output)
    ElementTree.indent(whole)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(whole, encoding="unicode") + "\n"


@contextlib.contextmanager
def kept(path: Path | None, suite: str) -> Iterator[Callable[[Iterable[Case]], None]]:
    """Writes the cases that it is given, which may be none, to `path` (None: nowhere) once its body has ended.

    An error that ends the body is the only case, undecided: else the file of an earlier call would stand for this one. Raises
    StorageError if the file cannot be written.
    """
    given: list[tuple[Case, ...]] = []
    began = time.monotonic()
    try:
        yield lambda cases: given.append(tuple(cases))
    except TlexportError as error:
        given[:] = [(Case(suite, suite, "undecided", f"{type(error).__name__}: {error}"),)]
        raise
    finally:
        if path is not None and given:
            write_text(path, text(suite, given[-1], time.monotonic() - began))


def _legal(text: str) -> str:
    """Without what XML 1.0 cannot hold (section 2.2, Char): control characters, surrogates and two noncharacters."""
    return _ILLEGAL.sub("", text)
