"""A Ray Serve application for one machine or many: NAME/VERSION/app.py with the graph, and NAME/serve.yaml (Ray's config schema).

app.py needs ray[serve], numpy and onnxruntime on every node, and the folder under the same path on each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tlexport.bundle.layouts import Model, Wanted, needs_onnxruntime, require_own_inputs
from tlexport.errors import RecipeError

CONFIG = "serve.yaml"
APP = Path(__file__).parent / "on_server" / "ray_app.py"
FEW, MANY = 1, 8


def models(wanted: Wanted) -> tuple[Model, ...]:
    """Raises RecipeError for a variant that is not ONNX Runtime's, and for a place that is no folder."""
    if reason := needs_onnxruntime(wanted, "the Ray application"):
        raise RecipeError(reason)
    require_own_inputs(wanted, "the Ray application")
    if "://" in wanted.place:
        raise RecipeError(
            f"Ray imports the application from a folder that every node sees; {wanted.place} is none"
        )
    files = {"app.py": APP, "model.onnx": wanted.artifact}
    return (Model(wanted.name, files, {}, yaml.safe_dump(_config(wanted), sort_keys=False).encode()),)


def _config(wanted: Wanted) -> dict[str, Any]:
    """A replica takes two batches at a time: one that runs, one that gathers; more of them mean another replica."""
    tuning, document = wanted.tuning, wanted.document
    folder = Path(wanted.place).absolute() / wanted.name / str(wanted.version)
    gpu = wanted.target != "cpu"
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {
                "name": wanted.name,
                "route_prefix": "/",
                "import_path": "app:application",
                "runtime_env": {
                    "env_vars": {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(tuning.threads)}
                },
                "args": {
                    "name": wanted.name,
                    "version": wanted.version,
                    "model": str(folder / "model.onnx"),
                    "sha256": document.files[wanted.entry.file].sha256,
                    "threads": tuning.threads,
                    "cuda": gpu,
                    "max_batch": tuning.preferred,
                    "max_samples": tuning.max_batch,
                },
                "deployments": [
                    {
                        "name": "Model",
                        "max_ongoing_requests": 2 * tuning.preferred,
                        **({"max_queued_requests": tuning.queue} if tuning.queue else {}),
                        "autoscaling_config": {
                            "min_replicas": FEW,
                            "initial_replicas": max(FEW, tuning.instances),
                            "max_replicas": max(MANY, tuning.instances),
                            "target_ongoing_requests": tuning.preferred,
                        },
                        "ray_actor_options": {"num_cpus": tuning.threads, **({"num_gpus": 1} if gpu else {})},
                    }
                ],
            }
        ],
    }


def notes(wanted: Wanted) -> tuple[str, ...]:
    return ()


def config_path(name: str) -> str:
    return f"{name}/{CONFIG}"


def merged(current: bytes | None, config: bytes, name: str) -> bytes:
    return config


def served(current: bytes, name: str) -> int | None:
    try:
        return int(yaml.safe_load(current)["applications"][0]["args"]["version"])
    except (yaml.YAMLError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"it is no Ray Serve application of ours ({type(error).__name__})") from error
