"""What became of the requests of an open loop through a server: answered rightly, wrongly, refused, late, broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.evidence.latency.open_loop import Served

OK, WRONG, OVERLOAD, DEADLINE, TIMEOUT, BROKEN = "ok", "wrong", "overload", "deadline", "timeout", "broken"
KINDS = {429: OVERLOAD, 503: OVERLOAD, 504: DEADLINE}  # by HTTP's status; others are `error STATUS`
BUSY_S = (
    0.001  # a request that is due and waits longer for a connection was held back by the generator's side
)
HELD_BACK = 0.01  # share of such requests from which on the server saw less than the rate
LOST = 0.01  # share of failed requests with which a p99 over all is beyond any limit


@dataclass(frozen=True)
class Traffic:
    """An open loop of which every call returned its kind."""

    served: Served

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(map(str, self.served.returned))

    @property
    def counts(self) -> dict[str, int]:
        """Kind -> requests, `ok` first; `unsent` are those that no connection was free for in time."""
        found = Counter(self.kinds)
        unsent = {"unsent": len(self.served.waiting)} if len(self.served.waiting) else {}
        return {OK: found.pop(OK, 0), **dict(sorted(found.items())), **unsent}

    @property
    def answered(self) -> NDArray[np.bool_]:
        """Which of the started requests [n] were answered rightly."""
        return np.array([kind == OK for kind in self.kinds], bool)

    @property
    def latency(self) -> NDArray[np.float64]:
        """Seconds from the scheduled start to the answer, of those that were answered rightly, in the order of arrival."""
        found: NDArray[np.float64] = (self.served.done - self.served.scheduled)[self.answered]
        return found

    @property
    def goodput(self) -> float:
        """Requests answered rightly a second, over the time from the first scheduled start to the last answer."""
        return float(self.answered.sum()) / self.served.ended

    @property
    def shed(self) -> float:
        """Share of the started requests that the server refused for overload."""
        return self.kinds.count(OVERLOAD) / max(1, len(self.kinds))

    @property
    def failed(self) -> float:
        """Share of all requests that were not answered rightly."""
        return 1 - float(self.answered.sum()) / max(1, len(self.served.latency))

    @property
    def waited(self) -> float:
        """Share of all requests that were due while every connection was busy."""
        late = (self.served.free - self.served.scheduled > BUSY_S).sum() + len(self.served.waiting)
        return float(late) / max(1, len(self.served.latency))

    def held_back(self) -> str:
        """What to say if the server saw less than the rate, since connections were lacking; empty if it did not."""
        if self.waited <= HELD_BACK:
            return ""
        return (
            f"{self.waited:.0%} of the requests were due while all {self.served.workers} connections were busy, and waited for one: the "
            "server saw no more than those at once, less than an open loop offers; raise --concurrency"
        )

    def as_one(self, never_s: float) -> Served:
        """The same loop with a failed request counted as one that took `never_s`: a refusal is no fast answer."""
        done = np.where(
            self.answered, self.served.done, np.maximum(self.served.done, self.served.started + never_s)
        )
        return replace(self.served, done=done)


def wrong(answers: NDArray[Any], expected: NDArray[Any], limit: float) -> tuple[bool, float]:
    """Whether answers are others than expected [b, K], and by how much at most; a NaN is wrong."""
    if answers.shape != expected.shape:
        return True, float("inf")
    error = float(np.abs(answers - expected).max())
    return not error <= limit, error


def wrong_told(counts: Mapping[str, int], said: Mapping[str, str]) -> str:
    """What to say of wrong answers; empty where there were none. `counts` are those of one loop: none in a search."""
    if WRONG not in said:
        return ""
    return f"{counts.get(WRONG) or 'some'} answers are not the model's: {said[WRONG]}"


def first_of_each(kinds: Sequence[dict[str, str]]) -> dict[str, str]:
    """Kind -> what was said first, over all connections."""
    return {kind: text for of in reversed(kinds) for kind, text in of.items()}
