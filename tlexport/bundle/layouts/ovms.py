"""OpenVINO Model Server: NAME/VERSION/model.onnx and one config.json for all models; see docs.openvino.ai, "Preparing a Model
Repository", "Model Version Policy" and "Model Server Parameters". The server watches config.json and reloads by itself.
"""

from __future__ import annotations

import json
from typing import Any

from tlexport.bundle.layouts import Model, Wanted, require_own_inputs
from tlexport.errors import RecipeError

CONFIG = "ovms.json"
_ONNX = ("openvino", "onnxruntime")


def models(wanted: Wanted) -> tuple[Model, ...]:
    """Raises RecipeError for what is no graph for a CPU."""
    variant = wanted.entry.variant
    if variant.backend not in _ONNX or wanted.target != "cpu":
        raise RecipeError(
            f"OpenVINO Model Server runs ONNX graphs on a CPU, and {wanted.target} has {variant.name}; "
            "build cpu with compile.backends=[onnxruntime] or [openvino]"
        )
    require_own_inputs(wanted, "OpenVINO Model Server")
    config = {
        "name": wanted.name,
        "base_path": wanted.name,
        "model_version_policy": {"specific": {"versions": [wanted.version]}},
        "nireq": wanted.tuning.instances,
        "plugin_config": {
            "INFERENCE_NUM_THREADS": wanted.tuning.threads * wanted.tuning.instances,
            "NUM_STREAMS": str(wanted.tuning.instances),
        },
    }
    return (Model(wanted.name, {"model.onnx": wanted.artifact}, {}, json.dumps(config, indent=2).encode()),)


def notes(wanted: Wanted) -> tuple[str, ...]:
    if wanted.entry.variant.backend == "openvino":
        return ()
    return (
        f"{wanted.entry.variant.name} was verified in ONNX Runtime; this server runs it in OpenVINO: hold it against the reference",
    )


def config_path(name: str) -> str:
    return "config.json"


def merged(current: bytes | None, config: bytes, name: str) -> bytes:
    """The other models' entries stay as they are."""
    document = json.loads(current) if current else {}
    others = [one for one in document.get("model_config_list", []) if one["config"]["name"] != name]
    document["model_config_list"] = [*others, {"config": json.loads(config)}]
    return (json.dumps(document, indent=2) + "\n").encode()


def served(current: bytes, name: str) -> int | None:
    try:
        entries: list[dict[str, Any]] = [one["config"] for one in json.loads(current)["model_config_list"]]
        own = [entry for entry in entries if entry["name"] == name]
        return max(own[0]["model_version_policy"]["specific"]["versions"]) if own else None
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"it is no configuration with a specific version ({error!r})") from error
