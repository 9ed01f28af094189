"""A pre-norm transformer encoder (Vaswani et al., arXiv 1706.03762; Xiong et al., arXiv 2002.04745), in plain products.

torch's own encoder layer switches to a fused path that cannot be exported, and scaled_dot_product_attention becomes eleven
nodes of shape arithmetic in a graph where four products and a softmax do: at batch 1 those nodes are the latency.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        weights = torch.softmax(logits if mask is None else logits + mask, dim=-1)
        found = self.dropout(weights) @ value
        mixed: Tensor = self.out(found.transpose(1, 2).reshape(batch, tokens, width))
        return mixed


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `mask` float [B, 1, 1, T], added to the attention's logits: 0, or -inf where padded."""
        x = x + self.dropout(self.attention(self.norm1(x), mask))
        mixed: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return mixed
