"""A model on disk: `model.safetensors` and `model.json`, which holds all that is needed to rebuild it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tlexport.errors import RecipeError, RunError, WeightsError
from tlexport.models import statefile
from tlexport.models.image import ImageModel, ModelSpec, create
from tlexport.run import digest, read_json, replacing, write_json

WEIGHTS, DESCRIPTION = "model.safetensors", "model.json"


class Description(BaseModel):
    """What `model.json` holds. `sha256` is of `model.safetensors`: the two belong together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    spec: ModelSpec
    sha256: str
    extra: dict[str, Any] = {}


def save_checkpoint(folder: Path, model: ImageModel, spec: ModelSpec, extra: Mapping[str, Any]) -> None:
    """Write the two files, each whole or not at all. `extra` is anything JSON can hold (labels, metrics ...).

    Raises StorageError if the disk is full or the folder cannot be written.
    """
    with replacing(folder / WEIGHTS) as partial:
        try:
            save_file(_separate(model.state_dict()), partial, metadata={"format": "pt"})
        except SafetensorError as error:
            raise _as_os_error(error, folder / WEIGHTS) from error
    description = Description(spec=spec, sha256=digest(folder / WEIGHTS), extra=dict(extra))
    write_json(folder / DESCRIPTION, description.model_dump(mode="json"))


def load_checkpoint(folder: Path) -> tuple[ImageModel, ModelSpec, dict[str, Any]]:
    """The model in eval mode on the CPU, its spec and the extra that was saved with it.

    Raises RunError if a file is missing, damaged or was changed.
    """
    description = describe_checkpoint(folder)
    try:
        tensors = statefile.read(folder / WEIGHTS, strip=False).tensors
        with torch.random.fork_rng(devices=[]):
            model = create(description.spec)
        model.load_state_dict(tensors)
    except (WeightsError, RecipeError, RuntimeError) as error:
        raise RunError(f"{folder} cannot be loaded: {error}") from error
    return model.eval(), description.spec, description.extra


def describe_checkpoint(folder: Path) -> Description:
    """Read `model.json` and hold the weights against its hash. Raises RunError."""
    for name in (WEIGHTS, DESCRIPTION):
        if not (folder / name).is_file():
            raise RunError(f"{folder} is not a checkpoint: it has no {name}")
    try:
        description = Description.model_validate(read_json(folder / DESCRIPTION))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{folder / DESCRIPTION} is not a model's description ({where}: {first['msg']})"
        ) from error
    if digest(folder / WEIGHTS) != description.sha256:
        raise RunError(
            f"{folder / WEIGHTS} is not the file that {DESCRIPTION} describes: it is damaged or was changed"
        )
    return description


def _separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them; a tied tensor is stored twice."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def _as_os_error(error: SafetensorError, path: Path) -> OSError | SafetensorError:
    """safetensors keeps the operating system's error number only in its text."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), str(error), str(path)) if number else error
