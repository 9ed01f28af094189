"""Reads a JUnit file as CI systems do, and holds it to the schema that they share on the way."""

from __future__ import annotations

from xml.etree import ElementTree

KINDS = {"failure": "fail", "error": "undecided", "skipped": "skipped"}


def read(text: str) -> dict[str, tuple[str, str]]:
    """Test case -> its verdict and what is said of it. Attributes, counts and the order of elements must be as the schema asks."""
    suites = ElementTree.fromstring(text.encode())
    assert suites.tag == "testsuites" and [child.tag for child in suites] == ["testsuite"]
    found, group = {}, ""
    for case in suites[0]:
        assert case.tag == "testcase" and float(case.get("time", "")) >= 0
        group = group or str(case.get("classname")).split(".")[1]
        assert str(case.get("classname")).startswith(f"tlexport.{group}")
        told = [child for child in case if child.tag in KINDS]
        # The order that the schema asks for: what became of it, then what it wrote.
        assert len(told) <= 1 and [child.tag for child in case] in (
            [of.tag for of in told],
            [*(of.tag for of in told), "system-out"],
        )
        for child in told:
            assert child.get("type") == (None if child.tag == "skipped" else KINDS[child.tag])
        name = str(case.get("name"))
        assert name and name not in found
        found[name] = (KINDS[told[0].tag], str(told[0].get("message"))) if told else ("pass", "")
    verdicts = [verdict for verdict, _ in found.values()]
    for of in (suites, suites[0]):
        assert str(of.get("name")).startswith("tlexport ") and float(of.get("time", "")) >= 0
        assert of.get("tests") == str(len(found))
        assert (of.get("failures"), of.get("errors")) == tuple(
            str(verdicts.count(kind)) for kind in ("fail", "undecided")
        )
    assert suites[0].get("skipped") == str(verdicts.count("skipped"))
    return found
