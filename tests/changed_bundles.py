"""Bundles as somebody who may write them would leave them: changed, and whole again by their hashes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tlexport.bundle import manifest
from tlexport.bundle.manifest import File
from tlexport.run import digest, write_json


def rewritten(bundle: Path, **changes: object) -> Path:
    """The bundle with another manifest, as one who may write it would leave it."""
    document = json.loads((bundle / manifest.NAME).read_text())
    document.update(changes)
    document["files"] = {
        name: File(sha256=digest(bundle / name), bytes=(bundle / name).stat().st_size).model_dump()
        for name in document["files"]
    }
    write_json(bundle / manifest.NAME, document)
    return bundle


def for_onnxruntime(bundle: Path) -> Path:
    """Whatever variant won on this machine, the graph is ONNX: named as ONNX Runtime's, so that each layout takes it."""
    document = json.loads((bundle / manifest.NAME).read_text())
    targets = {"cpu": document["targets"]["cpu"]}
    targets["cpu"]["variant"]["backend"] = "onnxruntime"
    return rewritten(bundle, targets=targets)


def another(bundle: Path) -> Path:
    """Another bundle of the same model: its first golden sample differs."""
    golden = np.load(bundle / "golden" / "inputs.npy")
    np.save(bundle / "golden" / "inputs.npy", golden[::-1].copy())
    return rewritten(bundle)
