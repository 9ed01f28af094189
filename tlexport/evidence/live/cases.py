"""What was found of a live server as the cases of a JUnit file."""

from __future__ import annotations

from collections.abc import Iterator

from tlexport.evidence.junit import Case
from tlexport.evidence.live import traffic, verdict
from tlexport.results import CheckServerResult, LoadResult


def of_check(result: CheckServerResult) -> Iterator[Case]:
    """One for each check, with the differences that were measured for it."""
    measured = {verdict.GOLDEN: result.golden, verdict.STREAM: result.stream}
    measured |= {verdict.batch_name(size): of for size, of in result.batches.items()}
    for check in result.checks:
        of = measured.get(check.name)
        numbers = of.model_dump_json(indent=1) if of else ""
        yield Case("check-server", f"{result.model}: {check.name}", check.verdict, check.reason, numbers)


def of_load(result: LoadResult) -> Iterator[Case]:
    """Whether the answers were right and, where there is a limit, whether it was kept."""
    wrong = traffic.wrong_told(result.counts, result.errors)
    numbers = result.model_dump_json(indent=1, include={"counts", "errors", "max_abs_error"})
    yield Case("load", f"{result.model}: answers", "fail" if wrong else "pass", wrong, numbers)
    if result.verdict is None:
        return
    numbers = result.model_dump_json(
        indent=1, include={"served", "largest"}, exclude={"served": {"histogram"}}
    )
    yield Case(
        "load", f"{result.model}: p99 within {result.limit_ms:g} ms", result.verdict, result.reason, numbers
    )
