"""A model on disk: `model.safetensors` and `model.json`, which holds all that is needed to rebuild it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tlexport.errors import RecipeError, RunError, WeightsError
from tlexport.models import MODELS, statefile
from tlexport.models.network import Network, Spec
from tlexport.run import digest, read_json, replacing, write_json

WEIGHTS, GRAPH, DESCRIPTION = "model.safetensors", "model.onnx", "model.json"


class Description(BaseModel):
    """What `model.json` holds. `sha256` is of `file`: the two belong together.

    A plain baseline has no network: its `file` is a graph, and `spec` holds no more than its name and task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = 1
    file: Literal["model.safetensors", "model.onnx"] = "model.safetensors"
    spec: dict[str, Any]
    sha256: str
    extra: dict[str, Any] = {}

    @property
    def backbone(self) -> str:
        return str(self.spec["backbone"])

    @property
    def task(self) -> str:
        return str(self.spec["task"])

    @property
    def modality(self) -> str:
        return str(self.spec.get("modality", "image"))

    def network(self) -> Spec:
        """The spec in its modality's own type. Raises pydantic's ValidationError."""
        spec: Spec = MODELS[self.modality].Spec.model_validate(self.spec)
        return spec


def save_checkpoint(folder: Path, model: Network, spec: Spec, extra: Mapping[str, Any]) -> None:
    """Write the two files, each whole or not at all. `extra` is anything JSON can hold (labels, metrics ...).

    Raises StorageError if the disk is full or the folder cannot be written.
    """
    with replacing(folder / WEIGHTS) as partial:
        try:
            save_file(_separate(model.state_dict()), partial, metadata={"format": "pt"})
        except SafetensorError as error:
            raise _as_os_error(error, folder / WEIGHTS) from error
    description = Description(
        spec=spec.model_dump(mode="json"), sha256=digest(folder / WEIGHTS), extra=dict(extra)
    )
    write_json(folder / DESCRIPTION, description.model_dump(mode="json"))


def save_graph(folder: Path, graph: bytes, name: str, task: str, extra: Mapping[str, Any]) -> None:
    """A checkpoint of a model that is nothing but a graph. Raises StorageError."""
    with replacing(folder / GRAPH) as partial:
        partial.write_bytes(graph)
    spec = {"backbone": name, "task": task}
    description = Description(file="model.onnx", spec=spec, sha256=digest(folder / GRAPH), extra=dict(extra))
    write_json(folder / DESCRIPTION, description.model_dump(mode="json"))


def load_checkpoint(folder: Path) -> tuple[Network, Spec, dict[str, Any]]:
    """The model in eval mode on the CPU, its spec and the extra that was saved with it.

    Raises RunError if a file is missing, damaged or was changed.
    """
    description = describe_checkpoint(folder)
    if description.file == GRAPH:
        raise RunError(f"{folder} holds {description.backbone}, a graph without a network")
    try:
        tensors = statefile.read(folder / WEIGHTS, strip=False).tensors
        with torch.random.fork_rng(devices=[]):
            spec = description.network()
            model = MODELS[spec.modality].create(spec)
        model.load_state_dict(tensors)
    except (WeightsError, RecipeError, RuntimeError) as error:
        raise RunError(f"{folder} cannot be loaded: {error}") from error
    return model.eval(), spec, description.extra


def describe_checkpoint(folder: Path) -> Description:
    """Read `model.json` and hold the model's file against its hash. Raises RunError."""
    if not (folder / DESCRIPTION).is_file():
        raise RunError(f"{folder} is not a checkpoint: it has no {DESCRIPTION}")
    try:
        description = Description.model_validate(read_json(folder / DESCRIPTION))
        if description.file == WEIGHTS:
            if description.modality not in MODELS:
                raise RunError(
                    f"{folder / DESCRIPTION} is of modality {description.modality!r} (known: {', '.join(MODELS)})"
                )
            description.network()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{folder / DESCRIPTION} is not a model's description ({where}: {first['msg']})"
        ) from error
    if not (folder / description.file).is_file():
        raise RunError(f"{folder} is not a checkpoint: it has no {description.file}")
    if digest(folder / description.file) != description.sha256:
        raise RunError(
            f"{folder / description.file} is not the file that {DESCRIPTION} describes: it is damaged or was changed"
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
