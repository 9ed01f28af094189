"""A small trained-like network as a typed graph in each precision, made by the real exporter and quantiser."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

COMPUTE = ("Conv", "Gemm", "MatMul")
SIZE = 32


class SmallNet(nn.Module):
    """uint8 images [n x 3 x 32 x 32] -> probabilities [n x 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.features((images.float() / 255 - 0.5) / 0.5)
        return torch.softmax(self.head(x.mean((2, 3))) * 4, -1)


@dataclass(frozen=True)
class Graphs:
    """Paths by precision, and what each compute node is expected to be built with."""

    module: SmallNet
    images: np.ndarray
    paths: dict[str, Path]

    def expected(self, precision: str) -> dict[str, str]:
        nodes = onnx.load(self.paths[precision]).graph.node
        dtype = precision.split("-")[0]
        return {node.name: dtype for node in nodes if node.op_type in COMPUTE}

    def reference(self) -> np.ndarray:
        with torch.inference_mode():
            return self.module(torch.from_numpy(self.images)).numpy()


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    folder = tmp_path_factory.mktemp("graphs")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    module, images = SmallNet(), np.random.default_rng(0).integers(0, 256, (6, 3, SIZE, SIZE), dtype=np.uint8)
    module(torch.from_numpy(images))  # fills the running statistics
    module.eval()
    paths = {p: folder / f"{p}.onnx" for p in ("fp32", "fp16", "int8-cpu", "int8-trt")}
    _export(module, images, paths["fp32"])
    _half(paths["fp32"], paths["fp16"])
    _quantize(paths["fp32"], paths["int8-cpu"], images, for_cpu=True)
    _quantize(paths["fp32"], paths["int8-trt"], images, for_cpu=False)
    return Graphs(module, images, paths)


def _export(module: SmallNet, images: np.ndarray, path: Path) -> None:
    torch.onnx.export(
        module,
        (torch.from_numpy(images[:2]),),
        str(path),
        dynamo=True,
        opset_version=20,
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1, max=64)}},
        external_data=False,
        verbose=False,
    )


def _half(source: Path, path: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(source), keep_io_types=True), path)


def _quantize(source: Path, path: Path, images: np.ndarray, *, for_cpu: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"images": images}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    symmetric = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "QuantizeBias": False,
        "DedicatedQDQPair": True,
        "OpTypesToExcludeOutputQuantization": list(COMPUTE),
    }
    quantize_static(
        str(source),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8 if for_cpu else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=list(COMPUTE),
        extra_options={} if for_cpu else symmetric,
    )
