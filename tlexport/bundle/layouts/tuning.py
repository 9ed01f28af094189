"""How a server batches, queues and spreads a model's work: taken from what bench measured, never from a rule of thumb alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tlexport.results import MeasureResult, Variant
from tlexport.tensors import Profile

LONGEST_WAIT_S = 1.0  # what is queued longer than this is refused: the client has given up, or asks again


@dataclass(frozen=True)
class Tuning:
    """`preferred`: the batch size of the knee. `queue`: requests that wait at most; none: not bounded, as nothing was measured.

    There is no delay that waits for companions: while an instance is busy the queue fills by itself, and while it is idle a
    delay only costs.
    """

    max_batch: int
    preferred: int
    queue: int | None
    instances: int
    threads: int
    notes: tuple[str, ...] = ()


def tuned(
    variant: Variant, batch: Profile, measured: MeasureResult | None = None, instances: int | None = None
) -> Tuning:
    """From the variant's own knee (batch size) and, of a `measured` one, the knee of batches and workers.

    `queue` is what the rate at the knee answers in LONGEST_WAIT_S, and never less than a batch.
    """
    knee = (measured.knee_batch if measured else None) or variant.knee
    workers = measured.knee_concurrency if measured else None
    notes = []
    if knee is None:
        notes.append(
            f"{variant.name} was not timed over batch sizes here: batches of {batch.opt} are preferred, its queue is not bounded"
        )
    if workers is None and instances is None:
        notes.append(
            "one instance: how many workers pay was not measured (tlexport bench BUNDLE --concurrency 1,2,4 --json > FILE; "
            "then --measured FILE), or say --instances N"
        )
    return Tuning(
        max_batch=batch.max,
        preferred=min(knee.at if knee else batch.opt, batch.max),
        queue=max(batch.max, math.ceil(knee.items_per_s * LONGEST_WAIT_S)) if knee else None,
        instances=instances or (workers.at if workers else 1),
        threads=variant.threads or 1,
        notes=tuple(notes),
    )
