"""Encoders of the Hugging Face library by name or folder: `huggingface/<name>`. Only safetensors are read, no code is run."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from torch import Tensor, nn

from tlexport.errors import NotInstalledError, RecipeError, WeightsError
from tlexport.models import smiles
from tlexport.models.statefile import Found, StateFile

PREFIX = "huggingface/"

# What the library raises for a name, folder or file that is not there or not what it should be.
_BROKEN = (OSError, ValueError, KeyError)


class Encoder(nn.Module):
    """Token numbers int32 [B, L] -> features [B, W]: the mean of the last hidden states over what is not padding."""

    def __init__(self, config: dict[str, Any], padding: int) -> None:
        super().__init__()
        self.network = _network(config)
        self.padding = padding
        self.width = int(self.network.config.hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = smiles.shortened(tokens, self.padding) if self.training else tokens
        present = tokens != self.padding
        states = self.network(input_ids=tokens.long(), attention_mask=present.long()).last_hidden_state
        return smiles.mean_over(states, present.float()[:, :, None])


def configured(name: str, length: int, tokens: np.ndarray) -> dict[str, Any]:
    """The network's own configuration, all that rebuilds it. Raises RecipeError if there is none under this name or it
    cannot take these tokens, NotInstalledError without transformers."""
    _require()
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name.removeprefix(PREFIX), trust_remote_code=False)
    except _BROKEN as error:
        raise RecipeError(f"backbone.name={name}: no Hugging Face network ({_first(error)})") from error
    most = getattr(config, "max_position_embeddings", None) or length
    if length > most:
        raise RecipeError(f"{name} reads at most {most} tokens; set data.molecule.max_length={most} or less")
    if int(tokens.max()) >= config.vocab_size:
        raise RecipeError(
            f"{name} knows {config.vocab_size} tokens, its input holds number {int(tokens.max())}: the tokenizer "
            "(data.molecule.tokenizer) is another network's"
        )
    return dict(config.to_dict())


def published(name: str) -> Found:
    """The weights under this name or in this folder, downloaded if need be. Raises WeightsError, NotInstalledError."""
    _require()
    from transformers import AutoModel
    from transformers.utils import logging

    source = name.removeprefix(PREFIX)
    logging.disable_progress_bar()  # what was loaded is told by whoever asks
    try:
        model = AutoModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False)
    except _BROKEN as error:
        raise WeightsError(
            f"the weights of {source} cannot be had ({_first(error)}); they must be safetensors: give a folder that holds "
            "them, another backbone.name, or backbone.weights=none"
        ) from error
    tensors = {
        f"encoder.network.{key}": tensor for key, tensor in _without_pooler(model).state_dict().items()
    }
    licence = getattr(getattr(model, "config", None), "license", None) or "not stated"
    return Found(StateFile(tensors, ordered=False), f"Hugging Face {source}", str(licence))


def _require() -> None:
    if importlib.util.find_spec("transformers") is None:
        raise NotInstalledError("transformers, which builds Hugging Face networks,", "transformers")


def _network(config: dict[str, Any]) -> Any:
    _require()
    from transformers import AutoConfig, AutoModel

    own = {key: value for key, value in config.items() if key != "model_type"}
    # Attention in plain products: they can be exported, quantised and vouched for.
    made = AutoModel.from_config(
        AutoConfig.for_model(config["model_type"], **own),
        attn_implementation="eager",
        trust_remote_code=False,
    )
    return _without_pooler(made.float())


def _without_pooler(network: Any) -> Any:
    """The first token's own layer has no part in a mean over all tokens."""
    if getattr(network, "pooler", None) is not None:
        network.pooler = None
    return network


def _first(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
