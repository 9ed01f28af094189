"""What the tests of the whole way share: one small recipe, and how a run and a command ended."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A network of 0.4 million parameters that timm keeps for tests: the whole way from images to a bundle takes seconds.
SMALL = (
    "backbone.name=timm/test_efficientnet",
    "backbone.weights=none",
    "data.image_size=32",
    "data.limit=200",
    "transfer.epochs=4",
    "transfer.lr=5e-3",
    "calibration.samples=32",
    "export.batch.max=4",
    "verify.resamples=200",
    "gates.max_drop=0.15",
    "bench.samples=10",
    "bench.batch_sizes=[2]",
    "bench.threads=1",
)
RTX = importlib.util.find_spec("tensorrt_rtx") is not None
OPENVINO = importlib.util.find_spec("openvino") is not None


@dataclass(frozen=True)
class Built:
    """A finished run and its bundle, and what the run looked like before each stage. To be copied, never changed."""

    run: Path
    bundle: Path
    before: dict[str, Path]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on standard output; anything beside it fails to parse."""
        return json.loads(self.out)
