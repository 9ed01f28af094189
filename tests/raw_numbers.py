"""A network that takes raw numbers, tokens and flags, and samples with everything in them that goes wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from tlexport.graph import trace

CENTER = (0.0, 5e5, 2e9, 0.5)
SPREAD = (1e-3, 1e6, 1e10, 0.0)  # the last column is constant
Feed = dict[str, np.ndarray]


class Mixed(nn.Module):
    """float32 numbers [N, 4] with NaN, int32 tokens [N, 6] with 0 for padding, uint8 flags [N, 3] -> float32 [N, 2].

    The first number's logarithm is added to the answer after the last product, in its own unit.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("center", torch.tensor(CENTER))
        self.register_buffer("spread", torch.tensor(SPREAD))
        self.register_buffer("codes", torch.tensor([1.0, 3.0, float("nan")]))  # NaN fills a vocabulary up
        self.embedding = nn.Embedding(20, 8)
        self.norm = nn.LayerNorm(8)
        # One layer for all three, split afterwards, is what TensorRT-RTX takes out of INT8.
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.members = nn.Parameter(torch.randn(3, 8, 16) * 0.3)
        self.first = nn.Linear(4 + 4 + 3 + 3, 8)
        self.last = nn.Linear(16, 2)

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        numbers, tokens, flags = inputs
        missing = torch.isnan(numbers)
        scaled = (torch.where(missing, self.center, numbers) - self.center) / (self.spread + 1e-9)
        known = (flags.float()[:, :1] == self.codes).float()
        x = torch.cat([scaled.clamp(-4, 4), missing.float(), known, flags.float() / 255], dim=1)
        x = torch.relu(self.first(x)) + self._read(tokens)
        members = torch.einsum("bd,mdk->bmk", x, self.members)
        answer = self.last(torch.tanh(members).mean(dim=1))
        return answer + torch.log1p(torch.where(missing, 0.0, numbers).abs())[:, 1:3]

    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Masked attention over the tokens and their masked mean [N, 8]."""
        x = self.norm(self.embedding(tokens))
        q, k, v = self.query(x), self.key(x), self.value(x)
        mask = (tokens == 0).float()[:, None, :] * -1e4
        read = torch.softmax(q @ k.transpose(1, 2) / 8**0.5 + mask, dim=-1) @ v
        kept = (tokens != 0).float()[:, :, None]
        return (read * kept).sum(1) / kept.sum(1).clamp(min=1.0)


def feed_of(count: int = 32) -> Feed:
    rng = np.random.default_rng(0)
    numbers = rng.normal(CENTER, SPREAD, (count, 4)).astype(np.float32)
    numbers[0] = np.nan
    numbers[1, ::2] = np.nan
    numbers[2] = (1e-3, 1e6, 1e10, 0.5)
    numbers[3] = (-1, -3e6, -4e10, 0.5)
    tokens = rng.integers(1, 20, (count, 6), dtype=np.int32)
    tokens[4, 2:] = 0
    return {
        "numbers": numbers,
        "tokens": tokens,
        "flags": rng.choice(np.array([0, 1, 3, 7, 255], np.uint8), (count, 3)),
    }


def eager(module: nn.Module, feed: Feed) -> np.ndarray:
    with torch.no_grad():
        answer: np.ndarray = module(*map(torch.from_numpy, feed.values())).numpy()
    return answer


def traced(module: nn.Module, feed: Feed, **changes: Any) -> onnx.ModelProto:
    about = {"class_names": "[]", "preprocessing": "{}", "task": "regression"}
    example = tuple(torch.from_numpy(array[:2]) for array in feed.values())
    settings = {"opset": 20, "input_names": tuple(feed), "output_name": "values", "metadata": about} | changes
    return trace.trace(module, example, **settings)
