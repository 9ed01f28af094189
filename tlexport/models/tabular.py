"""Tables: TabM, an ensemble of MLPs that share their matrices (Gorishniy et al., arXiv 2410.24210), on piecewise-linear
numeric embeddings (Gorishniy et al., arXiv 2203.05556, section 3.2).

The graph takes the cells as they are: a missing number is filled in with the middle of its range and flagged, a category
is found by comparison with the vocabulary, and one that training never saw has a code of its own.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from tlexport.errors import RecipeError
from tlexport.models import network
from tlexport.models.network import MemberLinear, Network, Stages
from tlexport.models.statefile import Found
from tlexport.recipe import Pretrain, Recipe

__all__ = ["Spec", "TabM", "align", "create", "describe", "prepare", "pretext", "published"]

NAME = "tabular/tabm"


class Options(BaseModel):
    """Sizes of the network (`backbone.options`)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    members: int = Field(16, ge=1, le=256)
    width: int = Field(192, ge=8, le=4096)
    depth: int = Field(3, ge=1, le=16)
    bins: int = Field(24, ge=2, le=256)
    embedding: int = Field(12, ge=1, le=128)
    dropout: float = Field(0.1, ge=0, lt=1)


class Spec(network.Spec):
    """`columns`: (name, codes of its categories; none: a number) in the order of the graph's input."""

    modality: Literal["tabular"] = "tabular"
    columns: tuple[tuple[str, tuple[float, ...]], ...]
    options: Options


class Cells(nn.Module):
    """Raw cells [B, F] -> embeddings [B, F, E], one small matrix a column."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        bins = spec.options.bins
        numeric = [index for index, (_, codes) in enumerate(spec.columns) if not codes]
        categorical = [index for index, (_, codes) in enumerate(spec.columns) if codes]
        most = max((len(spec.columns[index][1]) for index in categorical), default=0)
        # A code that no cell holds fills short vocabularies up: NaN equals nothing.
        codes = torch.full((len(categorical), most), float("nan"))
        for row, index in enumerate(categorical):
            own = spec.columns[index][1]
            codes[row, : len(own)] = torch.tensor(own)
        self.numeric: Tensor
        self.categorical: Tensor
        self.codes: Tensor
        self.low: Tensor
        self.width: Tensor
        self.middle: Tensor
        self.register_buffer("numeric", torch.tensor(numeric, dtype=torch.int64), persistent=False)
        self.register_buffer("categorical", torch.tensor(categorical, dtype=torch.int64), persistent=False)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("low", torch.zeros(len(numeric), bins))
        self.register_buffer("width", torch.ones(len(numeric), bins))
        self.register_buffer("middle", torch.zeros(len(numeric)))
        size = spec.options.embedding
        # Beside the bins: whether the number is missing. Beside the categories: unknown, missing.
        self.numbers = nn.Parameter(torch.randn(len(numeric), bins + 1, size) * (bins + 1) ** -0.5)
        self.number_bias = nn.Parameter(torch.zeros(len(numeric), 1, size))
        self.categories = nn.Parameter(torch.randn(len(categorical), most + 2, size))

    def forward(self, cells: Tensor) -> Tensor:
        parts = []
        if self.numeric.numel():
            parts.append(torch.relu(self._by_column(self.encoded(cells), self.numbers) + self._bias()))
        if self.categorical.numel():
            parts.append(self._by_column(self.matched(cells), self.categories))
        return torch.cat(parts, dim=1)

    def encoded(self, cells: Tensor) -> Tensor:
        """[B, F] -> [B, numeric, bins + 1]: how far each bin is filled, and the missing flag."""
        x = cells.index_select(1, self.numeric)  # one Gather in the graph, where indexing becomes four nodes
        missing = torch.isnan(x)
        x = torch.where(missing, self.middle, x)
        filled = ((x[:, :, None] - self.low) / self.width).clamp(0.0, 1.0)
        return torch.cat([filled, missing.float()[:, :, None]], dim=2)

    def matched(self, cells: Tensor) -> Tensor:
        """[B, F] -> [B, categorical, most + 2]: one-hot over the vocabulary, unknown, missing."""
        x = cells.index_select(1, self.categorical)
        missing = torch.isnan(x).float()[:, :, None]
        hit = (x[:, :, None] == self.codes).float()
        unknown = 1.0 - hit.sum(dim=2, keepdim=True) - missing
        return torch.cat([hit, unknown, missing], dim=2)

    def _bias(self) -> Tensor:
        return self.number_bias.transpose(0, 1)

    @staticmethod
    def _by_column(x: Tensor, weight: Tensor) -> Tensor:
        """[B, F, N] by [F, N, E] -> [B, F, E], as one batched matrix product."""
        return (x.transpose(0, 1) @ weight).transpose(0, 1)


class Ensemble(nn.Module):
    """MLPs [B, D] -> [B, M, width] with shared matrices; a member scales what goes in and what comes out (BatchEnsemble)."""

    def __init__(self, inputs: int, options: Options) -> None:
        super().__init__()
        widths = [inputs, *[options.width] * options.depth]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        # Only the first adapter starts random: more of them make members too different (TabM, section 3.3).
        self.scales_in = nn.ParameterList(
            nn.Parameter(
                (torch.randint(0, 2, (options.members, n)) * 2.0 - 1.0)
                if layer == 0
                else torch.ones(options.members, n)
            )
            for layer, n in enumerate(widths[:-1])
        )
        self.scales_out = nn.ParameterList(nn.Parameter(torch.ones(options.members, n)) for n in widths[1:])
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(options.members, n)) for n in widths[1:])
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        for linear, scale_in, scale_out, shift in zip(
            self.linears, self.scales_in, self.scales_out, self.shifts, strict=True
        ):
            assert isinstance(linear, nn.Linear)
            # The bias is scaled apart from the input, so that the graph holds it as a constant.
            bias = linear.bias * scale_out + shift
            product = functional.linear(x * scale_in, linear.weight)
            x = self.dropout(torch.relu(product * scale_out + bias))
        return x


class Backbone(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.cells = Cells(spec)
        self.ensemble = Ensemble(len(spec.columns) * spec.options.embedding, spec.options)

    def forward(self, cells: Tensor) -> Tensor:
        found: Tensor = self.ensemble(self.cells(cells).flatten(1))
        return found


class TabM(Network):
    """Cells float32 [B, F] -> answers [B, M, K]."""

    INPUTS = ("features",)
    spec: Spec
    backbone: Backbone

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = Backbone(spec)
        linear = MemberLinear(spec.options.members, spec.options.width, spec.classes)
        self.head = nn.Sequential(nn.Dropout(spec.dropout), linear)

    def features(self, *inputs: Tensor) -> Tensor:
        (cells,) = inputs
        found: Tensor = self.backbone(cells)
        return found

    def stages(self) -> Stages:
        names = [name for name, _ in self.backbone.named_parameters()]
        found: Stages = [("cells", [name for name in names if name.startswith("cells.")])]
        for layer in range(self.spec.options.depth):
            found.append(
                (
                    f"layer{layer + 1}",
                    [n for n in names if f".{layer}." in n + "." and not n.startswith("cells.")],
                )
            )
        return found


def describe(recipe: Recipe, data: Any) -> Spec:
    """The spec for the data's columns. Raises RecipeError for another backbone's name or unknown options."""
    if recipe.backbone.name != NAME:
        raise RecipeError(f"no tabular backbone {recipe.backbone.name!r} (there is: {NAME})")
    return Spec(
        backbone=NAME,
        **network.task_fields(recipe, data),
        columns=tuple((column.name, column.codes()) for column in data.preprocessing.columns),
        options=network.sizes(Options, recipe.backbone.options),
    )


def create(spec: Spec) -> TabM:
    return TabM(spec)


def prepare(model: Any, data: Any) -> None:
    """Bins from the training rows: quantiles of each number, so that every bin holds about as many rows."""
    cells = model.backbone.cells
    for row, index in enumerate(cells.numeric.tolist()):
        column = data.train.inputs[:, index].astype(np.float64)
        column = column[np.isfinite(column)]
        edges = np.unique(
            np.quantile(column, np.linspace(0, 1, model.spec.options.bins + 1)).astype(np.float32)
        )
        low, width = edges[:-1], np.diff(edges)
        if not len(low):
            low, width = edges[:1], np.ones(1, np.float32)
        # Bins that are left over repeat the last one: they carry nothing new.
        fill = model.spec.options.bins - len(low)
        cells.low[row] = torch.from_numpy(np.pad(low, (0, fill), mode="edge"))
        cells.width[row] = torch.from_numpy(np.pad(width, (0, fill), mode="edge"))
        cells.middle[row] = float(np.median(column)) if len(column) else 0.0


def published(spec: Spec) -> Found:
    raise network.unpublished(spec)


def align(tensors: dict[str, Tensor], source: Spec, spec: Spec) -> tuple[dict[str, Tensor], list[str]]:
    """Unchanged where the columns are the same. Raises RecipeError naming the columns where they differ."""
    if source.columns != spec.columns:
        differing = sorted({name for name, _ in set(source.columns) ^ set(spec.columns)})
        raise RecipeError(
            f"the weights were learned on other columns or categories (different: {', '.join(differing[:8])}); pretrain on "
            "a table of the same schema"
        )
    return tensors, []


def pretext(model: Any, pretrain: Pretrain, data: Any) -> nn.Module:
    """Masked cells. Raises RecipeError for another objective."""
    if pretrain.objective not in ("auto", "masked"):
        raise RecipeError(f"no objective {pretrain.objective!r} for tables (there is: masked)")
    return Masked(model, pretrain.mask)


class Masked(nn.Module):
    """Masked cells take another row's value; what they held, and which they are, has to be found out (VIME, Yoon et al.,
    NeurIPS 2020)."""

    backbone: Backbone

    def __init__(self, model: TabM, share: float) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.share = share
        cells, width = model.backbone.cells, model.spec.options.width
        self.sizes = (
            cells.numbers.shape[0],
            cells.numbers.shape[1],
            cells.categories.shape[0],
            cells.categories.shape[1],
        )
        numeric, bins, categorical, most = self.sizes
        self.decoder = nn.Linear(width, numeric * bins + categorical * most + len(model.spec.columns))

    def forward(self, *inputs: Tensor) -> Tensor:
        (cells,) = inputs
        mask = torch.rand_like(cells) < self.share
        order = torch.argsort(torch.rand_like(cells), dim=0)
        decoded = self.decoder(self.backbone(torch.where(mask, cells.gather(0, order), cells)).mean(dim=1))
        numeric, bins, categorical, most = self.sizes
        numbers, categories, masked = decoded.split(
            [numeric * bins, categorical * most, cells.shape[1]], dim=1
        )
        loss = functional.binary_cross_entropy_with_logits(masked, mask.float())
        front = self.backbone.cells
        if numeric:
            held = front.encoded(cells)
            cost = functional.binary_cross_entropy_with_logits(
                numbers.reshape(held.shape), held, reduction="none"
            )
            loss = loss + _over(cost.mean(dim=2), mask[:, front.numeric])
        if categorical:
            kind = front.matched(cells).argmax(dim=2)
            logits = categories.reshape(len(cells), categorical, most)
            cost = functional.cross_entropy(logits.transpose(1, 2), kind, reduction="none")
            loss = loss + _over(cost, mask[:, front.categorical])
        return loss


def _over(cost: Tensor, mask: Tensor) -> Tensor:
    return (cost * mask).sum() / mask.sum().clamp(min=1)
