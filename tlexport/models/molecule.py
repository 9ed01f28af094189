"""Molecules: a transformer reads the SMILES, a second branch a fingerprint and descriptors, an ensemble answers from both.

The graph takes what `modalities.molecule_preparation` writes; scaling is in it. A molecule's own branch and the ensemble
belong to the task: pretraining and its weights are of the transformer alone.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from tlexport.errors import RecipeError
from tlexport.models import huggingface, network, smiles, tabular
from tlexport.models.network import MemberLinear, Network, Stages
from tlexport.models.statefile import Found
from tlexport.recipe import Pretrain, Recipe

__all__ = ["Spec", "align", "create", "describe", "prepare", "pretext", "published"]

NAME = "molecule/smiles"
_LIMIT = 4.0  # standard deviations of a descriptor


class Options(BaseModel):
    """Sizes of the network (`backbone.options`): of the transformer, of the fingerprint's layer, of the ensemble."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens: int = Field(64, ge=8, le=2048)
    layers: int = Field(2, ge=1, le=24)
    heads: int = Field(2, ge=1, le=32)
    fingerprint: int = Field(256, ge=8, le=4096)
    members: int = Field(16, ge=1, le=256)
    width: int = Field(192, ge=8, le=4096)
    depth: int = Field(2, ge=1, le=16)
    dropout: float = Field(0.2, ge=0, lt=1)

    @model_validator(mode="after")
    def _divisible(self) -> Options:
        if self.tokens % self.heads or self.tokens % 2:
            raise ValueError(f"tokens {self.tokens} must be even and a multiple of heads ({self.heads})")
        return self


class Spec(network.Spec):
    """`descriptors`: (mean, standard deviation) of each in train, after `squashed`; none of them in pretraining.

    `config` is a Hugging Face network's own, empty for ours, and `padding` the token number that it does not read.
    """

    modality: Literal["molecule"] = "molecule"
    vocabulary: tuple[str, ...]
    length: int
    config: dict[str, Any] = Field({})
    padding: int = smiles.PAD
    bits: int
    descriptors: tuple[tuple[float, float], ...]
    options: Options


class Branch(nn.Module):
    """Fingerprint uint8 [B, bits] and descriptors float32 [B, D], NaN where undefined -> [B, F + D]."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        mean, spread = torch.tensor(spec.descriptors).T
        self.mean: Tensor
        self.rate: Tensor
        self.register_buffer("mean", mean.clone(), persistent=False)
        # What never changes in train says nothing: it is multiplied by 0.
        self.register_buffer(
            "rate", torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), 0.0), persistent=False
        )
        self.substructures = nn.Linear(spec.bits, spec.options.fingerprint)
        self.dropout = nn.Dropout(spec.options.dropout)

    def forward(self, fingerprint: Tensor, descriptors: Tensor) -> Tensor:
        counts = torch.log2(fingerprint.float() + 1.0)
        substructures = torch.relu(self.substructures(self.dropout(counts)))
        return torch.cat([substructures, self.scaled(descriptors)], dim=1)

    def scaled(self, descriptors: Tensor) -> Tensor:
        values = squashed(descriptors)
        known = torch.where(torch.isnan(values), self.mean.expand_as(values), values)
        return ((known - self.mean) * self.rate).clamp(-_LIMIT, _LIMIT)


class Backbone(nn.Module):
    """Without descriptors (pretraining) it is the encoder alone."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        own = spec.options
        self.encoder: smiles.Encoder | huggingface.Encoder = (
            huggingface.Encoder(spec.config, spec.padding)
            if spec.config
            else smiles.Encoder(
                len(spec.vocabulary), spec.length, own.tokens, own.layers, own.heads, own.dropout
            )
        )
        if spec.descriptors:
            self.branch = Branch(spec)
            inputs = self.encoder.width + own.fingerprint + len(spec.descriptors)
            sizes = own.model_dump(include={"members", "width", "depth", "dropout"})
            self.ensemble = tabular.Ensemble(inputs, tabular.Options(**sizes))

    def forward(self, *inputs: Tensor) -> Tensor:
        read: Tensor = self.encoder(inputs[0])
        if len(inputs) == 1:
            return read
        found: Tensor = self.ensemble(torch.cat([read, self.branch(*inputs[1:])], dim=1))
        return found


class Reader(Network):
    """What is pretrained: tokens int32 [B, L] -> features [B, W]."""

    INPUTS: ClassVar[tuple[str, ...]] = ("tokens",)
    spec: Spec
    backbone: Backbone

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = Backbone(spec)
        self.head = nn.Sequential(nn.Dropout(spec.dropout), self._linear())

    def _linear(self) -> nn.Module:
        return nn.Linear(self.backbone.encoder.width, self.spec.classes)

    def features(self, *inputs: Tensor) -> Tensor:
        found: Tensor = self.backbone(*inputs)
        return found

    def stages(self) -> Stages:
        names = [name for name, _ in self.backbone.named_parameters()]
        found: Stages = []
        for name in names:
            stage = _stage(name)
            if not found or found[-1][0] != stage:
                found.append((stage, []))
            found[-1][1].append(name)
        return found


class Joint(Reader):
    """Tokens int32 [B, L], fingerprint uint8 [B, bits] and descriptors float32 [B, D] -> answers [B, M, K]."""

    INPUTS = ("tokens", "fingerprint", "descriptors")
    NEW = ("branch.", "ensemble.")

    def _linear(self) -> nn.Module:
        return MemberLinear(self.spec.options.members, self.spec.options.width, self.spec.classes)


def _stage(name: str) -> str:
    """The stage of a parameter, by where it stands: encoder.layers.1.mlp.0.weight -> layer2."""
    parts = name.split(".")
    if parts[0] != "encoder":
        return parts[0]
    place = next((int(part) for part in parts if part.isdigit()), None)
    return next(part for part in parts[1:] if part != "network") if place is None else f"layer{place + 1}"


def describe(recipe: Recipe, data: Any) -> Spec:
    """The spec for the data's vocabulary. Raises RecipeError for another backbone's name or unknown options."""
    name, prepared = recipe.backbone.name, data.preprocessing
    foreign = name.startswith(huggingface.PREFIX)
    if name != NAME and not foreign:
        raise RecipeError(
            f"no molecule backbone {name!r} (there are: {NAME}, {huggingface.PREFIX}<name or folder>)"
        )
    if foreign != bool(prepared.tokenizer):
        raise RecipeError(
            f"{name} does not read the tokens of data.molecule.tokenizer={recipe.data.molecule.tokenizer}"
        )
    tokens = data.train.inputs["tokens"]
    return Spec(
        backbone=name,
        **network.task_fields(recipe, data),
        vocabulary=prepared.vocabulary,
        length=prepared.length,
        config=huggingface.configured(name, prepared.length, tokens) if foreign else {},
        padding=prepared.padding,
        bits=prepared.bits,
        descriptors=_measured(data.train.inputs["descriptors"]) if prepared.bits else (),
        options=network.sizes(Options, recipe.backbone.options),
    )


def _measured(descriptors: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Mean and standard deviation of each descriptor in train once it is squashed; (0, 0) where all are undefined."""
    values = squashed(torch.from_numpy(descriptors.astype(np.float64))).numpy()
    known = np.isfinite(values)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, values, 0.0).sum(axis=0) / count
    spread = np.sqrt((np.where(known, values - mean, 0.0) ** 2).sum(axis=0) / count)
    return tuple(zip(mean.tolist(), spread.tolist(), strict=True))


def squashed(values: Tensor) -> Tensor:
    """Logarithmic away from 0, on both sides: descriptors reach from 1e-3 to 1e4."""
    return torch.sign(values) * torch.log1p(values.abs())


def create(spec: Spec) -> Reader:
    return Joint(spec) if spec.descriptors else Reader(spec)


def prepare(model: Any, data: Any) -> None:
    """Nothing: the descriptors' means are in the spec, so that weights from elsewhere cannot bring their own."""


def published(spec: Spec) -> Found:
    if spec.config:
        return huggingface.published(spec.backbone)
    raise network.unpublished(spec)


def align(tensors: dict[str, Tensor], source: Spec, spec: Spec) -> tuple[dict[str, Tensor], list[str]]:
    """The transformer of another run with its embedding in the order of this vocabulary; a token it never saw starts as
    its unknown one. The branch and the ensemble stay behind: they were learned on other scales."""
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    notes = []
    name = "encoder.embedding.weight"
    if source.vocabulary != spec.vocabulary and name in kept:
        places = {token: row for row, token in enumerate(source.vocabulary)}
        rows = [places.get(token, smiles.UNKNOWN) for token in spec.vocabulary]
        kept[name] = kept[name][rows].clone()
        new = [token for token in spec.vocabulary if token not in places]
        told = f", {len(new)} start as the unknown token ({', '.join(new[:5])})" if new else ""
        notes.append(f"vocabulary: {len(rows) - len(new)} of {len(rows)} tokens by name{told}")
    return kept, notes


def pretext(model: Any, pretrain: Pretrain, data: Any) -> nn.Module:
    """Masked tokens. Raises RecipeError for another objective."""
    if pretrain.objective not in ("auto", "masked"):
        raise RecipeError(f"no objective {pretrain.objective!r} for molecules (there is: masked)")
    if not isinstance(model.backbone.encoder, smiles.Encoder):
        raise RecipeError(f"{model.spec.backbone} is not pretrained here; {NAME} is")
    return smiles.Masked(model.backbone.encoder, pretrain.mask)
