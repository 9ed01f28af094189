"""Series: a channel-independent patch transformer (PatchTST, Nie et al., arXiv 2211.14730) beside the terms of a HAR model
(Corsi 2009, J. Financial Econometrics 7), both from raw prices.

The graph takes prices as they are. From them it makes each day's log variance, returns and volume, normalises them by the
window's own level (RevIN, Kim et al., ICLR 2022), and gives the level back at the end: a variance leaves in the unit of the
prices' own log returns, whatever the asset.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from tlexport.errors import RecipeError
from tlexport.models import network
from tlexport.models.network import Network, Stages
from tlexport.models.statefile import Found
from tlexport.models.transformer import Block
from tlexport.recipe import Pretrain, Recipe

__all__ = ["PatchNet", "Spec", "align", "create", "describe", "prepare", "pretext", "published"]

NAME = "series/patch"
TERMS = (1, 5, 22)  # days of the HAR model's averages: a day, a week, a month
PARKINSON = math.log(4 * math.log(2))
LEAST_RANGE = 1e-4  # of a day's log range, or of a change of the close: its logarithm is taken
LARGEST_MOVE = 8.0  # in the window's own standard deviations
SMALLEST_MOVE = 0.05


class Options(BaseModel):
    """Sizes of the network (`backbone.options`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch: int = Field(8, ge=2, le=256)
    width: int = Field(16, ge=8, le=1024)
    depth: int = Field(1, ge=1, le=16)
    heads: int = Field(2, ge=1, le=32)
    summary: int = Field(48, ge=8, le=4096)
    dropout: float = Field(0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _divisible(self) -> Options:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


class Spec(network.Spec):
    """`channels` as the graph takes them; `window` in days; `target` as in the recipe."""

    modality: Literal["series"] = "series"
    channels: tuple[str, ...]
    window: int
    target: str
    options: Options


class Days(nn.Module):
    """Raw prices [B, W, C] -> one series a signal, normalised by the window [B, S, W], and the window's level [B, 1].

    Signals: log variance about the window's mean (the level); changes of the close, and overnight where there is an open, in
    the window's standard deviations; the logarithms of their sizes; log volume about its mean where there is one.
    """

    def __init__(self, channels: Sequence[str]) -> None:
        super().__init__()
        self.place = {name: index for index, name in enumerate(channels)}

    @property
    def signals(self) -> int:
        moving = 1 + ("open" in self.place)
        return 1 + 2 * moving + ("volume" in self.place)

    def forward(self, prices: Tensor) -> tuple[Tensor, Tensor]:
        by_channel = prices.transpose(1, 2)
        close = self._of(by_channel, "close")
        over, under = [close], [_after(close, close)]
        if "open" in self.place:
            opened = self._of(by_channel, "open")
            over, under = [*over, opened], [*under, _after(opened, close)]
        moving = len(over)
        if "high" in self.place:
            over.append(self._of(by_channel, "high"))
            under.append(self._of(by_channel, "low"))
        # One logarithm of all ratios: a ratio first, because the logarithms of two near prices differ by their rounding.
        changes = torch.log(torch.cat(over, dim=1) / torch.cat(under, dim=1))
        moves = changes[:, :moving]
        if "high" in self.place:
            variance = 2 * torch.log(changes[:, moving:].clamp(min=LEAST_RANGE)) - PARKINSON
        else:
            variance = 2 * torch.log(moves.abs().clamp(min=LEAST_RANGE))
        level = variance.mean(dim=2, keepdim=True)
        moves = (moves * torch.exp(-0.5 * level)).clamp(-LARGEST_MOVE, LARGEST_MOVE)
        found = [variance - level, moves, torch.log(moves.abs() + SMALLEST_MOVE)]
        if "volume" in self.place:
            volume = torch.log(self._of(by_channel, "volume") + 1)
            found.append((volume - volume.mean(dim=2, keepdim=True)).clamp(-LARGEST_MOVE, LARGEST_MOVE))
        return torch.cat(found, dim=1), level.flatten(1)

    def _of(self, by_channel: Tensor, channel: str) -> Tensor:
        """[B, C, W] -> [B, 1, W]"""
        place = self.place[channel]
        return by_channel[:, place : place + 1]


def _after(own: Tensor, close: Tensor) -> Tensor:
    """[B, 1, W]: the close of the day before; on the first day, which has none, `own`, so that its change is 0."""
    return torch.cat([own[:, :, :1], close[:, :, :-1]], dim=2)


class Backbone(nn.Module):
    """Prices [B, W, C] -> features [B, D]: the network's summary, then each signal's HAR terms and the level."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        size = spec.options
        self.days = Days(spec.channels)
        self.patch, self.patches = size.patch, spec.window // size.patch
        self.embed = nn.Linear(size.patch, size.width)
        self.position = nn.Parameter(torch.randn(self.patches, size.width) * 0.02)
        self.signal = nn.Parameter(torch.randn(self.days.signals, 1, size.width) * 0.02)
        self.blocks = nn.ModuleList(Block(size.width, size.heads, size.dropout) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.summary = nn.Linear(self.days.signals * self.patches * size.width, size.summary)
        self.dropout = nn.Dropout(size.dropout)
        self.level: Tensor
        self.register_buffer("level", torch.tensor([0.0, 1.0]))

    @property
    def width(self) -> int:
        return self.summary.out_features + self.days.signals * len(TERMS) + 1

    def forward(self, prices: Tensor) -> Tensor:
        signals, level = self.days(prices)
        encoded = self.encode(self.patched(signals)).flatten(1)
        summary = functional.gelu(self.summary(self.dropout(encoded)))
        means = [signals[:, :, -days:].mean(dim=2, keepdim=True) for days in TERMS]
        terms = torch.cat(means, dim=2).flatten(1)
        return torch.cat([summary, terms, (level - self.level[0]) / self.level[1]], dim=1)

    def patched(self, signals: Tensor) -> Tensor:
        """[B, S, W] -> [B, S, patches, patch]; days before the first whole patch are left out."""
        whole = signals[:, :, -self.patches * self.patch :]
        return whole.reshape(-1, self.days.signals, self.patches, self.patch)

    def encode(self, patches: Tensor, hidden: Tensor | None = None) -> Tensor:
        """[B, S, patches, patch] -> [B, S, patches, width]. `hidden`: bool [B, S, patches, 1], patches that are masked."""
        tokens = self.embed(patches)
        if hidden is not None:
            tokens = tokens.masked_fill(hidden, 0.0)
        tokens = (tokens + (self.position + self.signal)).flatten(0, 1)
        for block in self.blocks:
            tokens = block(tokens)
        found: Tensor = self.norm(tokens).unflatten(0, (-1, self.days.signals))
        return found


class PatchNet(Network):
    """Prices float32 [B, W, C] -> answers [B, K].

    A variance starts as a HAR forecast with fixed weights: that is where an untrained head stands.
    """

    INPUTS = ("prices",)
    spec: Spec
    backbone: Backbone

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = Backbone(spec)
        self.head = nn.Sequential(nn.Dropout(spec.dropout), nn.Linear(self.backbone.width, spec.classes))

    def features(self, *inputs: Tensor) -> Tensor:
        (prices,) = inputs
        found: Tensor = self.backbone(prices)
        return found

    def stages(self) -> Stages:
        names = [name for name, _ in self.backbone.named_parameters()]
        layers = {f"block{n + 1}": f"blocks.{n}." for n in range(self.spec.options.depth)}
        found: Stages = [("embedding", [n for n in names if n.startswith(("embed.", "position", "signal"))])]
        found += [(layer, [n for n in names if n.startswith(prefix)]) for layer, prefix in layers.items()]
        return [*found, ("summary", [n for n in names if n.startswith(("norm.", "summary."))])]


def describe(recipe: Recipe, data: Any) -> Spec:
    """The spec for the data's windows. Raises RecipeError for another backbone's name or sizes that do not fit."""
    if recipe.backbone.name != NAME:
        raise RecipeError(f"no backbone {recipe.backbone.name!r} for series (there is: {NAME})")
    options = network.sizes(Options, recipe.backbone.options)
    windows = data.preprocessing
    if windows.window < max(options.patch, TERMS[-1]):
        raise RecipeError(
            f"data.series.window={windows.window} is shorter than {max(options.patch, TERMS[-1])} days, "
            "what the network averages over"
        )
    return Spec(
        backbone=NAME,
        **network.task_fields(recipe, data, link="log"),
        channels=windows.channels,
        window=windows.window,
        target=windows.target,
        options=options,
    )


def create(spec: Spec) -> PatchNet:
    return PatchNet(spec)


def prepare(model: Any, data: Any) -> None:
    """The training windows' mean level and its spread; the head starts at even odds, or at a HAR forecast of a variance.

    The fixed weights are those that a log-HAR has on almost any asset: half the month, a quarter the week, a quarter the
    day, all relative to the level.
    """
    rows = np.linspace(0, len(data.train) - 1, min(len(data.train), 4096), dtype=int)
    with torch.no_grad():
        level = model.backbone.days(torch.from_numpy(data.train.batch(rows)))[1]
        mean, spread = float(level.mean()), float(level.std(correction=0).clamp(min=1e-3))
        model.backbone.level.copy_(torch.tensor([mean, spread]))
        linear = model.head[-1]
        linear.weight.zero_()  # a class starts at even odds, not at a guess that has to be unlearned
        if model.spec.task != "regression":
            return
        scale = model.spec.scale[0]
        first = model.spec.options.summary
        linear.weight[:, first : first + len(TERMS)] = torch.tensor([0.25, 0.25, 0.5]) / scale
        linear.weight[:, -1] = spread / scale
        linear.bias.fill_((mean - model.spec.center[0]) / scale)


def published(spec: Spec) -> Found:
    raise network.unpublished(spec)


def align(tensors: dict[str, Tensor], source: Spec, spec: Spec) -> tuple[dict[str, Tensor], list[str]]:
    """Unchanged where channels, window and sizes are the same. Raises RecipeError saying what differs."""
    for field in ("channels", "window", "options"):
        there, here = getattr(source, field), getattr(spec, field)
        if there != here:
            raise RecipeError(f"the pretrained network's {field} are {there}, this recipe's {here}")
    return tensors, []


def pretext(model: Any, pretrain: Pretrain, data: Any) -> nn.Module:
    """Hidden patches are filled in. `masked`: drawn at random; `forecast`: the last one of every signal; auto: both.

    Raises RecipeError for another objective.
    """
    if pretrain.objective not in ("auto", "masked", "forecast"):
        raise RecipeError(
            f"no objective {pretrain.objective!r} for series (there are: auto, masked, forecast)"
        )
    return Pretext(model, pretrain.objective, pretrain.mask)


class Pretext(nn.Module):
    """Prices [B, W, C] -> mean absolute error over the hidden patches, in the signals' normalised units."""

    def __init__(self, model: PatchNet, objective: str, share: float) -> None:
        super().__init__()
        self.backbone, self.objective, self.share = model.backbone, objective, share
        self.decoder = nn.Linear(model.spec.options.width, model.spec.options.patch)

    def forward(self, *inputs: Tensor) -> Tensor:
        (prices,) = inputs
        patches = self.backbone.patched(self.backbone.days(prices)[0])
        hidden = self._hidden(patches)
        decoded = self.decoder(self.backbone.encode(patches, hidden))
        cost = functional.l1_loss(decoded, patches, reduction="none").mean(dim=3, keepdim=True)
        return (cost * hidden).sum() / hidden.sum().clamp(min=1)

    def _hidden(self, patches: Tensor) -> Tensor:
        """bool [B, S, patches, 1]"""
        drawn = torch.rand_like(patches[:, :, :, :1]) < self.share
        last = torch.zeros_like(drawn)
        last[:, :, -1] = True
        if self.objective == "auto":
            coin = torch.rand_like(patches[:, :1, :1, :1]) < 0.5
            return torch.where(coin, drawn, last)
        return drawn if self.objective == "masked" else last
