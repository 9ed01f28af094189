"""HdrHistogram of latencies: every call is in it, at three digits, in a string of a few kilobytes (Tene, hdrhistogram.org)."""

from __future__ import annotations

import zlib

import numpy as np

from tlexport.evidence.latency.quantiles import Floats

LOWEST_NS, HIGHEST_NS, DIGITS = 1, 3600 * 10**9, 3


def encode(seconds: Floats) -> str:
    """Times [n] in seconds as HdrHistogram's V2 compressed payload in base64; values are nanoseconds, at most an hour.

    Any HdrHistogram reader opens it; those of several runs can be added.
    """
    from hdrh.histogram import HdrHistogram

    held = HdrHistogram(LOWEST_NS, HIGHEST_NS, DIGITS)
    values, counts = np.unique(
        np.clip(np.rint(1e9 * seconds), LOWEST_NS, HIGHEST_NS).astype(np.int64), return_counts=True
    )
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        held.record_value(value, count)
    return str(held.encode().decode("ascii"))


def decode(text: str) -> tuple[Floats, Floats]:
    """The upper ends of the filled buckets in seconds [m] and their counts [m]. Raises ValueError if it is no histogram."""
    from hdrh.codec import HdrCookieException, HdrLengthException
    from hdrh.histogram import HdrHistogram

    try:
        held = HdrHistogram.decode(text.encode("ascii"))
    except (HdrCookieException, HdrLengthException, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"not an encoded HdrHistogram: {text[:20]!r}") from error
    filled = [
        (step.value_iterated_to / 1e9, step.count_added_in_this_iter_step) for step in held.get_recorded_iterator()
    ]  # fmt: skip
    table = np.array(filled, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]
