"""Latency on an NVIDIA GPU of every backend that runs there: torch eager, torch.compile (inductor) with and without CUDA graphs,
ONNX Runtime CUDA, TensorRT, TensorRT-RTX; the five image networks of bench/latency.py, a tabular and a series one, all with
random weights; batch 1 and 64; FP32 (no TF32), FP16, BF16, INT8.

A cell is one network, batch size, backend and precision. Each is measured, or refused with the reason, or `left` for want of
time; the file is written anew after every group (a network at a batch size, a process of its own), and --resume goes on where
it stopped. Within a group all candidates take turns; times are of whole calls, copies to the GPU and back included. Backends
of graphs replay CUDA graphs where they can (`note`). torch in 16 bits: gpu_cases.torch_module. --device cpu runs the same
program without a GPU, to see that it works. It takes the 60 minutes of --budget at most, and goes on with --resume.

Result: `device`, `target`, `settings`, `cells` {"network/batch/backend-precision": {state, reason} or {state, count, latency
{p50, p90, p99 {value_ms, low_ms, high_ms, reason}, mean_ms ...}, items_per_s, speedup {ratio, low, high} over eager FP32 of
the same rounds, parts {enqueue, h2d, compute, d2h {value_ms, low_ms, high_ms}} or null, receipt, max_abs_error (against
eager FP32), note, samples_ms}}, `groups` {"network/batch": {gpu_before, gpu_after (clocks, temperature, throttling), seconds,
date, git, unsettled}}, `left` [cells].
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# Module -> its package. Without these nothing can be said; without others single cells are refused.
NEEDED = {
    "ml_dtypes": "ml_dtypes", "numpy": "numpy", "onnx": "onnx", "psutil": "psutil", "pydantic": "pydantic", "scipy": "scipy",
    "torch": "torch", "yaml": "pyyaml",
}  # fmt: skip


def main() -> None:
    if missing := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        sys.exit(f"bench/gpu.py cannot run without {', '.join(missing)}: pip install {' '.join(missing)}")
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # tlexport, where it is not installed
    import gpu_run

    gpu_run.main(__doc__ or "")


if __name__ == "__main__":
    main()
