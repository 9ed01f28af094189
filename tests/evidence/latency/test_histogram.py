from __future__ import annotations

import numpy as np
import pytest

from tlexport.evidence.latency import histogram


def test_every_call_is_in_it_at_three_digits() -> None:
    seconds = np.random.default_rng(0).lognormal(-9, 1.5, size=20_000)
    seconds[7] = 2.5
    text = histogram.encode(seconds)
    assert len(text) < 20_000 and text.isascii()
    ends, counts = histogram.decode(text)
    assert counts.sum() == 20_000
    for q in (0.5, 0.9, 0.99, 0.9999, 1.0):
        held = ends[np.searchsorted(np.cumsum(counts), q * 20_000)]
        # A bucket is at most a thousandth of its value wide, or a nanosecond.
        assert held == pytest.approx(
            float(np.quantile(seconds, q, method="inverted_cdf")), rel=1.1e-3, abs=1e-9
        )


def test_another_reader_opens_it() -> None:
    from hdrh.histogram import HdrHistogram

    one, two = (HdrHistogram.decode(histogram.encode(np.full(10, ms / 1e3))) for ms in (1, 3))
    one.add(two)
    assert one.get_total_count() == 20 and one.get_value_at_percentile(50) == pytest.approx(1e6, rel=1e-3)


def test_what_is_out_of_range_is_kept_at_the_ends() -> None:
    ends, counts = histogram.decode(histogram.encode(np.array([0.0, 1e9])))
    assert counts.tolist() == [1, 1] and ends[0] <= 1e-9 and ends[1] == pytest.approx(3600, rel=1e-3)


@pytest.mark.parametrize(
    "text", ["", "not base64 at all!", "SGVsbG8gd29ybGQsIHRoaXMgaXMgbm90IGEgaGlzdG9ncmFt"]
)
def test_what_is_no_histogram_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an encoded HdrHistogram"):
        histogram.decode(text)
