"""KServe: an InferenceService that serves a Triton model repository of its own, one for each version, over protocol v2.

A pod reads its whole storageUri once, when it starts, so a version's repository is never changed: NAME/VERSION/repository.
Sources: KServe's API reference (serving.kserve.io/v1beta1), runtime kserve-tritonserver.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import yaml

from tlexport.bundle.layouts import Content, Model, Wanted, triton
from tlexport.errors import RecipeError

CONFIG = "inferenceservice.yaml"
_DNS = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_FORMATS = {"onnxruntime": "onnx", "tensorrt": "tensorrt"}


def models(wanted: Wanted) -> tuple[Model, ...]:
    """Raises RecipeError for a name that is none in Kubernetes, a place that no cluster can read, and as triton.models does."""
    if not _DNS.fullmatch(wanted.name):
        raise RecipeError(
            f"{wanted.name!r} is no name for an InferenceService (a-z, 0-9 and -, at most 63); give one with --name"
        )
    if "://" not in wanted.place:
        raise RecipeError(
            f"a cluster cannot read the folder {wanted.place}: say with --storage-uri where it finds it (pvc://CLAIM/PATH, s3://...)"
        )
    files: dict[str, Content] = {}
    for own in triton.models(dataclasses.replace(wanted, version=1, previous=None)):
        below = f"repository/{own.name}"
        files[f"{below}/{triton.CONFIG}"] = own.config
        files |= {f"{below}/{path}": content for path, content in own.shared.items()}
        # A directory of its own even where the version has no file: Triton wants one, and stores keep no empty ones.
        files |= {f"{below}/1/{path}": content for path, content in (own.version or {".keep": b""}).items()}
    return (Model(wanted.name, files, {}, yaml.safe_dump(_service(wanted), sort_keys=False).encode()),)


def _service(wanted: Wanted) -> dict[str, Any]:
    variant = wanted.entry.variant
    format_ = "triton" if wanted.flavour or wanted.raw else _FORMATS.get(variant.backend, "triton")
    model: dict[str, Any] = {
        "modelFormat": {"name": format_},
        "protocolVersion": "v2",
        "runtime": "kserve-tritonserver",
        "storageUri": f"{wanted.place.rstrip('/')}/{wanted.name}/{wanted.version}/repository",
    }
    if wanted.target != "cpu":
        model["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
    scale = {
        "scaleMetric": "concurrency",
        "scaleTarget": 2 * wanted.tuning.preferred * wanted.tuning.instances,
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": wanted.name,
            "labels": {"app.kubernetes.io/managed-by": "tlexport"},
            "annotations": {"tlexport/version": str(wanted.version), "tlexport/variant": variant.name},
        },
        "spec": {"predictor": {"minReplicas": 1, **(scale if wanted.tuning.queue else {}), "model": model}},
    }


def notes(wanted: Wanted) -> tuple[str, ...]:
    return triton.notes(wanted)


def config_path(name: str) -> str:
    return f"{name}.yaml"


def merged(current: bytes | None, config: bytes, name: str) -> bytes:
    return config


def served(current: bytes, name: str) -> int | None:
    try:
        return int(yaml.safe_load(current)["metadata"]["annotations"]["tlexport/version"])
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ValueError(f"it is no InferenceService of ours ({type(error).__name__})") from error
