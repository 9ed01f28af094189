"""Small networks of every modality with random weights, and real or plausible samples for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import timm
import torch
from sklearn.datasets import load_sample_images

from tlexport.graph.trace import trace

SIZE = 64
CHANNELS = ("open", "high", "low", "close", "volume")
COLUMNS = ("a", "b", "c", "d", "e", "f")
DAYS = 32
METADATA = {"class_names": "[]", "preprocessing": "{}", "task": "multiclass"}


class Image(torch.nn.Module):
    """uint8 [n, 3, S, S] to probabilities [n, K], normalised as ImageNet."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.network = timm.create_model(name, pretrained=False, num_classes=5)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1) * 255)
        self.gain = torch.nn.Parameter(torch.ones(5))
        self.shift = torch.nn.Parameter(torch.zeros(5))

    def raw(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images.float() - self.mean) / self.std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.softmax((self.raw(images) - self.shift) * self.gain, dim=1)


def image(name: str, samples: np.ndarray, seed: int = 0) -> onnx.ModelProto:
    """The samples' logits are brought to a spread of 2 a class, as random weights hardly tell pictures apart."""
    model = Image(name, seed).eval()
    with torch.no_grad():
        logits = model.raw(torch.from_numpy(samples))
        model.gain.copy_(2 / logits.std(dim=0).clamp(min=1e-6))
        model.shift.copy_(logits.mean(dim=0))
    return traced(model, samples, ("images",))


def photographs(count: int = 16) -> np.ndarray:
    """uint8 [count, 3, SIZE, SIZE]: parts of two photographs in colour."""
    rng = np.random.default_rng(0)
    found = []
    for index in range(count):
        picture = load_sample_images().images[index % 2]
        side = int(rng.integers(100, 400))
        top, left = (int(rng.integers(0, of - side)) for of in picture.shape[:2])
        part = torch.from_numpy(picture[top : top + side, left : left + side].transpose(2, 0, 1).copy())[None]
        small = torch.nn.functional.interpolate(part.float(), (SIZE, SIZE), mode="bilinear", antialias=True)
        found.append(small[0].round().to(torch.uint8).numpy())
    return np.stack(found)


class Table(torch.nn.Module):
    """float32 [n, F] with NaN for missing to probabilities [n, 3]."""

    def __init__(self, features: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = torch.nn.Linear(2 * features, 16), torch.nn.Linear(16, 3)

    def forward(self, cells: torch.Tensor) -> torch.Tensor:
        missing = torch.isnan(cells)
        known = torch.where(missing, torch.full_like(cells, 2.0), cells)
        hidden = torch.tanh(self.first(torch.cat([known, missing.float()], dim=1)))
        return torch.softmax(3 * self.last(hidden), dim=1)


def table(count: int = 16) -> tuple[onnx.ModelProto, np.ndarray]:
    samples = np.random.default_rng(2).normal(1, 1, (count, len(COLUMNS))).astype(np.float32)
    samples[np.random.default_rng(3).random(samples.shape) < 0.15] = np.nan
    return traced(Table(len(COLUMNS)).eval(), samples, ("features",)), samples


class Series(torch.nn.Module):
    """float32 prices [n, days, channels] to a value [n, 1]: a weighted mean of the returns' squares."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.linspace(0, 1, DAYS - 1))

    def forward(self, prices: torch.Tensor) -> torch.Tensor:
        close = prices[:, :, 3].abs() + 1e-6
        moves = torch.log(close[:, 1:] / close[:, :-1]) ** 2
        level = torch.log(prices[:, -1, 1].abs() + 1) - torch.log(prices[:, -1, 2].abs() + 1)
        return ((moves * self.weights).sum(dim=1) * 100 + level)[:, None]


def series(count: int = 16) -> tuple[onnx.ModelProto, np.ndarray]:
    rng = np.random.default_rng(4)
    close = 100 * np.exp(rng.normal(0, 0.02, (count, DAYS)).cumsum(axis=1))
    spread = 1 + np.abs(rng.normal(0, 0.01, (2, count, DAYS)))
    opened = close * np.exp(rng.normal(0, 0.005, (count, DAYS)))
    volume = rng.lognormal(10, 1, (count, DAYS))
    samples = np.stack([opened, close * spread[0], close / spread[1], close, volume], axis=2).astype(
        np.float32
    )
    return traced(Series().eval(), samples, ("prices",), "values"), samples


class Molecule(torch.nn.Module):
    """Tokens, counts and descriptors to probabilities [n, 2]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.places = torch.nn.Parameter(torch.randn(12, 8))
        self.tokens = torch.nn.Embedding(20, 8)
        self.rest = torch.nn.Linear(16 + 4 + 8, 2)

    def forward(
        self, tokens: torch.Tensor, fingerprint: torch.Tensor, descriptors: torch.Tensor
    ) -> torch.Tensor:
        read = (self.tokens(tokens.long()) * self.places).sum(dim=1)
        known = torch.where(torch.isnan(descriptors), torch.full_like(descriptors, 0.5), descriptors)
        joined = torch.cat([read, torch.log2(fingerprint.float() + 1), known], dim=1)
        return torch.softmax(self.rest(joined), dim=1)


def molecule(count: int = 16) -> tuple[onnx.ModelProto, np.ndarray]:
    rng = np.random.default_rng(6)
    kind = np.dtype(
        [("tokens", np.int32, (12,)), ("fingerprint", np.uint8, (16,)), ("descriptors", np.float32, (4,))]
    )
    samples = np.zeros(count, kind)
    for row in samples:
        length = int(rng.integers(4, 11))
        row["tokens"][:length] = rng.integers(3, 19, length)
    samples["fingerprint"] = rng.poisson(1.0, (count, 16))
    samples["descriptors"] = rng.normal(size=(count, 4))
    samples["descriptors"][rng.random((count, 4)) < 0.2] = np.nan
    return traced(Molecule().eval(), samples, ("tokens", "fingerprint", "descriptors")), samples


def traced(
    module: torch.nn.Module, samples: np.ndarray, names: tuple[str, ...], output: str = "probabilities"
) -> onnx.ModelProto:
    fields: list[Any] = [samples[name] for name in names] if samples.dtype.names else [samples]
    example = tuple(torch.from_numpy(np.ascontiguousarray(of[:2])) for of in fields)
    return trace(module, example, input_names=names, output_name=output, opset=20, metadata=METADATA)
