"""A pre-norm transformer encoder block (Vaswani et al., arXiv 1706.03762; Xiong et al., arXiv 2002.04745), in plain products.

torch's own encoder layer switches to a fused path that cannot be exported, and scaled_dot_product_attention becomes eleven
nodes of shape arithmetic in a graph where two products and a softmax do: at batch 1 those nodes are the latency.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """[B, T, W] -> [B, T, W]; `bias` [B, 1, 1, T] is added to the scores.

    Three matrices, not one: TensorRT-RTX computes a joint one in FP32 though its graph says INT8.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = (
            part(x).reshape(batch, tokens, self.heads, width // self.heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(2, 3) * (width // self.heads) ** -0.5
        weights = torch.softmax(scores if bias is None else scores + bias, dim=3)
        mixed: Tensor = self.out((weights @ v).transpose(1, 2).reshape(batch, tokens, width))
        return mixed


class Block(nn.Module):
    """Attention, then an MLP of twice the width, each added to what it was given."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[B, T, W] -> [B, T, W]"""
        x = x + self.dropout(self.attention(self.norm1(x), bias))
        mixed: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return mixed
