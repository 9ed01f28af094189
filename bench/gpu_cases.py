"""What bench/gpu.py times: the networks of bench/latency.py, on inputs of any batch size, and torch's own ways to run them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from latency_cases import IMAGES, QUICK_IMAGES, Case, image, small

MODELS = (*IMAGES, "tabular", "series")
EAGER, COMPILE, GRAPHED = "eager", "compile", "compile-cudagraphs"
TORCH = (EAGER, COMPILE, GRAPHED)
COMPILERS = ("onnxruntime", "tensorrt", "tensorrt_rtx")
BACKENDS = (*TORCH, *COMPILERS)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")


def case_of(name: str, quick: bool, work: Path) -> Case:
    """The series network is prepared on made-up prices, so that no data has to be there: its speed does not depend on them."""
    if name == "series":
        return small(name, quick, made_up_prices(work / "prices"))
    if name == "tabular":
        return small(name, quick)
    return image({**IMAGES, **QUICK_IMAGES}[name], 64 if quick else 224)


def made_up_prices(folder: Path, assets: int = 4, days: int = 500) -> Path:
    """Random walks, a CSV an asset."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    dates = np.busday_offset("2020-01-01", np.arange(days), roll="forward")
    for asset in range(assets):
        close = 100 * np.exp(np.cumsum(rng.normal(0, 0.01, days)))
        opened = np.concatenate([[100.0], close[:-1]])
        spread = np.exp(np.abs(rng.normal(0, 0.005, (2, days))))
        high, low = np.maximum(opened, close) * spread[0], np.minimum(opened, close) / spread[1]
        volume = rng.integers(1_000, 100_000, days)
        rows = zip(dates, opened, high, low, close, volume, strict=True)
        lines = [f"{day},{','.join(f'{price:.6f}' for price in prices)},{n}" for day, *prices, n in rows]
        text = "\n".join(["date,open,high,low,close,volume", *lines])
        (folder / f"asset{asset}.csv").write_text(text + "\n")
    return folder


def batches(fresh: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
    """The samples in batches of just `size`; where they are too few, they are repeated."""
    count = len(next(iter(fresh.values())))
    rows = [np.arange(start, start + size) % count for start in range(0, count, size)]
    return [{name: array[row] for name, array in fresh.items()} for row in rows]


def torch_module(serving: Any, precision: str, device: str) -> Any:
    """The network on the device. In 16 bits: its products' weights are, channels last, and it runs under torch.autocast.

    (`.half()` fails where a network itself makes floats of raw inputs.)
    """
    import torch

    module = copy.deepcopy(serving).to(device)
    if precision == "fp32":
        return module
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    products = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d)
    for part in module.modules():
        if isinstance(part, products):
            part.to(dtype)
    module = module.to(memory_format=torch.channels_last)

    class InHalf(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *inputs: Any) -> Any:
            with torch.autocast(device, dtype):
                return self.inner(*inputs).float()

    return InHalf().eval()


def compiled(module: Any, backend: str) -> Any:
    """`module` as torch runs it in `backend`; shapes are fixed, so that inductor need not allow for others."""
    import torch

    if backend == EAGER:
        return module
    mode = "reduce-overhead" if backend == GRAPHED else None
    return torch.compile(module, dynamic=False, mode=mode)


def refusal(backend: str, precision: str, target: str) -> str:
    """Why there is no such candidate on this machine; empty if it can be tried."""
    from tlexport.backends import registry
    from tlexport.errors import TlexportError

    if backend in TORCH:
        if precision == "int8":
            return (
                "torch runs no INT8 convolutions of an FP32 network; its quantised models are other networks"
            )
        return "CUDA graphs need a GPU" if backend == GRAPHED and target == "cpu" else ""
    try:
        module = registry.get(backend)
        here = module.availability()
    except (TlexportError, ImportError) as error:
        return f"{backend} cannot be loaded: {error}"
    if not here.installed:
        return f"{backend} is not installed ({here.note})"
    if reason := module.refusal(target, precision):
        return reason
    if target not in here.builds or target not in here.runs:
        return f"{backend} cannot run {target} here ({here.note or 'it runs ' + ', '.join(here.runs)})"
    return ""
