"""Memory of a child process that loads and runs something."""

from __future__ import annotations

import mmap
import sys

import pytest
from pipeline import Built

from tlexport import tensors
from tlexport.backends import Options, footprint, registry
from tlexport.results import BenchResult
from tlexport.run import Run, read_json

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


def touched(size: int) -> mmap.mmap:
    """Of the system, page by page: an allocator may give what an earlier test has touched already."""
    block = mmap.mmap(-1, size)
    for start in range(0, size, mmap.PAGESIZE):
        block[start] = 1
    return block


def test_the_peak_grows_with_what_is_touched_and_starts_anew_when_it_is_reset() -> None:
    block = touched(64 << 20)
    peak = footprint.peak_kib()
    assert peak is not None and peak >= footprint.peak_kib("VmRSS") > len(block) / 1024
    block.close()
    if not footprint.reset_peak():
        pytest.skip("this container may not reset the peak")
    before = footprint.peak_kib()
    assert before <= peak
    again = touched(32 << 20)
    assert 30_000 < footprint.peak_kib() - before < 60_000 and again[0] == 1


def test_an_artifact_takes_at_least_its_weights_and_no_gpu(built: Built) -> None:
    run = Run(built.run)
    measured = BenchResult.model_validate(read_json(run / "bench.json"))
    variant = next(v for v in measured.variants if v.name == "cpu-onnxruntime-fp32")
    inputs = tensors.first(run / "reference/inputs.npy", ("images",), 2)
    assert inputs["images"].shape[0] == 2
    found = registry.memory(
        variant.backend, run / variant.file, inputs, target="cpu", threads=1, options=Options()
    )
    assert variant.size_bytes / 2**20 < found.host_peak_mib < 500 and found.device_mib is None
