"""onnxruntime-server (github.com/kibae/onnxruntime-server): NAME/VERSION/model.onnx; a session is opened by name and version.

What version is meant to be served stands in NAME/onnxruntime-server.env, which `docker run --env-file` or a unit file reads.
"""

from __future__ import annotations

import re

from tlexport.bundle.layouts import Model, Wanted, needs_onnxruntime, require_own_inputs
from tlexport.errors import RecipeError

CONFIG = "onnxruntime-server.env"
_PREPARED = re.compile(r"^ONNX_SERVER_PREPARE_MODEL=(?P<name>[^:\n]+):(?P<version>\d+)", re.MULTILINE)


def models(wanted: Wanted) -> tuple[Model, ...]:
    """Raises RecipeError for what is not a graph of ONNX Runtime's."""
    if reason := needs_onnxruntime(wanted, "onnxruntime-server"):
        raise RecipeError(reason)
    require_own_inputs(wanted, "onnxruntime-server")
    cuda = "(cuda=true)" if wanted.target != "cpu" else ""
    config = (
        f"ONNX_SERVER_WORKERS={wanted.tuning.instances}\n"
        f"ONNX_SERVER_PREPARE_MODEL={wanted.name}:{wanted.version}{cuda}\n"
    )
    return (Model(wanted.name, {"model.onnx": wanted.artifact}, {}, config.encode()),)


def notes(wanted: Wanted) -> tuple[str, ...]:
    return ()


def config_path(name: str) -> str:
    return f"{name}/{CONFIG}"


def merged(current: bytes | None, config: bytes, name: str) -> bytes:
    return config


def served(current: bytes, name: str) -> int | None:
    found = _PREPARED.search(current.decode())
    if found is None or found["name"] != name:
        raise ValueError(f"it prepares no version of {name} (ONNX_SERVER_PREPARE_MODEL)")
    return int(found["version"])
