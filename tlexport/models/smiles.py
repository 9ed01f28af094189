"""A small transformer that reads SMILES tokens, and the task it is pretrained on: tokens that were hidden."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from tlexport.models.transformer import Block

PAD, UNKNOWN, MASK = 0, 1, 2  # places in every vocabulary (modalities.molecule_preparation)
SPECIAL = 3
_HIDDEN = -1e4  # of attention to padding; within FP16


class Encoder(nn.Module):
    """Token numbers int32 [B, L], PAD where there is none -> a molecule's features [B, W]: the mean over its tokens."""

    def __init__(
        self, vocabulary: int, length: int, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.positions: Tensor
        self.register_buffer("positions", _sinusoids(length, width), persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    @property
    def width(self) -> int:
        return self.embedding.embedding_dim

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = shortened(tokens, PAD) if self.training else tokens
        present = (tokens != PAD).float()[:, :, None]
        return mean_over(self.states(tokens), present)

    def states(self, tokens: Tensor) -> Tensor:
        """int32 [B, l] -> [B, l, W], l at most L."""
        bias = (tokens == PAD).float()[:, None, None, :] * _HIDDEN
        x = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, bias)
        found: Tensor = self.norm(x)
        return found


class Masked(nn.Module):
    """Masked tokens have to be found out from the others (BERT, Devlin et al., arXiv 1810.04805, section 3.1: of those
    chosen 80% are hidden, 10% replaced, 10% left)."""

    def __init__(self, encoder: Encoder, share: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.share = share
        self.size = encoder.embedding.num_embeddings
        self.transform = nn.Linear(encoder.width, encoder.width)
        self.bias = nn.Parameter(torch.zeros(self.size))

    def forward(self, *inputs: Tensor) -> Tensor:
        tokens = shortened(inputs[0], PAD)
        drawn = torch.rand(tokens.shape, device=tokens.device)
        chosen = (drawn < self.share) & (tokens != PAD)
        others = torch.randint_like(tokens, min(SPECIAL, self.size - 1), self.size)
        how = drawn / self.share
        shown = torch.where(chosen & (how < 0.8), MASK, torch.where(chosen & (how > 0.9), others, tokens))
        states = functional.gelu(self.transform(self.encoder.states(shown)[chosen]))
        # The embedding is also what a state is compared with (Press and Wolf, arXiv 1608.05859).
        logits = states @ self.encoder.embedding.weight.T + self.bias
        cost = functional.cross_entropy(logits, tokens[chosen].long(), reduction="sum")
        return cost / chosen.sum().clamp(min=1)


def shortened(tokens: Tensor, padding: int) -> Tensor:
    """Without the columns that are padding in every row. Not for a graph, whose shapes are fixed."""
    longest = int((tokens != padding).sum(dim=1).max())
    return tokens[:, : max(longest, 1)]


def mean_over(states: Tensor, present: Tensor) -> Tensor:
    """[B, L, W] by [B, L, 1] of 0 or 1 -> [B, W]."""
    return (states * present).sum(dim=1) / present.sum(dim=1).clamp(min=1.0)


def _sinusoids(length: int, width: int) -> Tensor:
    """Positions [L, W] (Vaswani et al., arXiv 1706.03762, section 3.5), at the scale of the embedding."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return 0.02 * torch.cat([angles.sin(), angles.cos()], dim=1)
