"""Triton's python backend: raw samples to the graph's inputs, by the very code that prepared the training data (step/)."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        told = {key: own["string_value"] for key, own in config["parameters"].items()}
        here = Path(args["model_repository"]) / args["model_version"]
        sys.path.insert(0, str(here / "step"))
        module, _, function = told["call"].partition(":")
        described = json.loads((here / "preprocessing.json").read_text(encoding="utf-8"))
        self.dtypes = {o["name"]: pb_utils.triton_string_to_numpy(o["data_type"]) for o in config["output"]}
        self.prepare = getattr(importlib.import_module(module), function)(described, list(self.dtypes))
        self.input = told["input"]

    def execute(self, requests: list[Any]) -> list[Any]:
        """Each request is prepared by itself: one sample that cannot be read fails its own request only."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        samples = pb_utils.get_input_tensor_by_name(request, self.input).as_numpy().reshape(-1)
        try:
            prepared = [self.prepare(bytes(sample)) for sample in samples]
        except Exception as error:  # noqa: BLE001 (what cannot be prepared is refused with the reason)
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"{type(error).__name__}: {error}"))
        tensors = [
            pb_utils.Tensor(name, np.stack([own[name] for own in prepared]).astype(dtype, copy=False))
            for name, dtype in self.dtypes.items()
        ]
        return pb_utils.InferenceResponse(tensors)
