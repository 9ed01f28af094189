"""A Triton model repository: NAME/config.pbtxt, NAME/VERSION/, warmup samples and labels; see the Triton user guide,
"Model Repository", "Model Configuration" and "Ensemble Models".

Backends: onnxruntime, openvino and tensorrt run what the bundle holds; the flavour `python` runs an ONNX Runtime variant by a
model.py of ours, on any Triton whose Python has numpy and onnxruntime. With a raw step two more models are written:
NAME-prepare (our preprocessing, in the python backend) and the ensemble NAME-raw, which takes what clients have.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tlexport.bundle.layouts import Content, Model, Wanted, needs_onnxruntime, pbtxt
from tlexport.bundle.layouts.pbtxt import Enum
from tlexport.errors import RecipeError
from tlexport.tensors import TensorSpec

CONFIG = "config.pbtxt"
ON_SERVER = Path(__file__).parent / "on_server"
TYPES = {
    "bool": "BOOL", "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64", "int8": "INT8", "int16": "INT16",
    "int32": "INT32", "int64": "INT64", "float16": "FP16", "bfloat16": "BF16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
_BACKENDS = {
    "onnxruntime": ("onnxruntime", "onnxruntime_onnx", "model.onnx"),
    "openvino": ("openvino", "", "model.onnx"),
    "tensorrt": ("tensorrt", "tensorrt_plan", "model.plan"),
}
_NO_BACKEND = {
    "tensorrt_rtx": "Triton's tensorrt backend reads no TensorRT-RTX engine; build with compile.backends=[tensorrt] or [onnxruntime]",
    "inductor": "Triton has no backend for a library compiled by inductor; build the target with compile.backends=[onnxruntime]",
}


def config_path(name: str) -> str:
    return f"{name}/{CONFIG}"


def merged(current: bytes | None, config: bytes, name: str) -> bytes:
    return config


def served(current: bytes, name: str) -> int | None:
    """The newest version that the policy names. Raises ValueError if it names none, or is not text format."""
    document = pbtxt.read(current.decode())
    versions = [
        number
        for policy in document.get("version_policy", [])
        for specific in policy.get("specific", [])
        for number in specific.get("versions", [])
    ]
    if not versions:
        raise ValueError("it names no version (version_policy specific)")
    return max(int(version) for version in versions)


def refusal(wanted: Wanted) -> str:
    """Why Triton cannot run the variant; empty if it can."""
    backend = wanted.entry.variant.backend
    if wanted.flavour == "python" and (other := needs_onnxruntime(wanted, "the python flavour")):
        return other
    if wanted.flavour not in ("", "python"):
        return f"Triton has no flavour {wanted.flavour!r} here (there is: python)"
    if reason := _NO_BACKEND.get(backend):
        return f"{wanted.entry.variant.name} of {wanted.target}: {reason}"
    if backend not in _BACKENDS:
        return f"Triton has no backend for {backend} (there is: {', '.join(_BACKENDS)})"
    if unknown := [
        s.dtype for s in (*wanted.document.inputs, *wanted.document.outputs) if s.dtype not in TYPES
    ]:
        return f"Triton has no datatype for {', '.join(unknown)}"
    return ""


def models(wanted: Wanted) -> tuple[Model, ...]:
    """The model, and with a raw step what stands before it; the ensemble last, as it needs the others. Raises RecipeError."""
    if reason := refusal(wanted):
        raise RecipeError(reason)
    model = _model(wanted)
    return (model,) if wanted.raw is None else (_prepare(wanted), model, _ensemble(wanted))


def notes(wanted: Wanted) -> tuple[str, ...]:
    if wanted.raw is None:
        return ()
    return (f"{wanted.name}-prepare needs {', '.join(wanted.raw.needs)} in the server's Python",)


def _model(wanted: Wanted) -> Model:
    document = wanted.document
    shared: dict[str, Content] = {}
    outputs = [_tensor(spec) for spec in document.outputs]
    if labels := _labels(document.classes, document.outputs):
        file = _named(shared, "labels", labels, ".txt")
        outputs[0]["label_filename"] = file
    golden = [
        (spec.name, TYPES[spec.dtype], list(sample.shape), np.ascontiguousarray(sample).tobytes())
        for spec in document.inputs
        if (sample := wanted.golden.get(spec.name)) is not None
    ]
    config = {
        "name": wanted.name,
        **_engine(wanted),
        "max_batch_size": wanted.tuning.max_batch,
        "input": [_tensor(spec) for spec in document.inputs],
        "output": outputs,
        "version_policy": _policy(wanted),
        **_batching(wanted),
        "instance_group": _instances(wanted, "KIND_CPU" if wanted.target == "cpu" else "KIND_GPU"),
        **(_warmup(golden, {1, wanted.tuning.preferred}, shared) if golden else {}),
    }
    return Model(wanted.name, _version(wanted), shared, pbtxt.write(config).encode())


def _engine(wanted: Wanted) -> dict[str, Any]:
    variant = wanted.entry.variant
    if wanted.flavour == "python":
        told = {
            "file": "model.onnx",
            "sha256": wanted.document.files[wanted.entry.file].sha256,
            "threads": str(wanted.tuning.threads),
        }
        return {"backend": "python", "parameters": _parameters(told)}
    backend, platform, file = _BACKENDS[variant.backend]
    told = (
        {"intra_op_thread_count": str(wanted.tuning.threads)}
        if backend == "onnxruntime" and wanted.target == "cpu"
        else {}
    )
    return {
        **({"platform": platform} if platform else {}),
        "backend": backend,
        "default_model_filename": file,
        "parameters": _parameters(told),
    }


def _version(wanted: Wanted) -> dict[str, Content]:
    if wanted.flavour == "python":
        return {"model.py": ON_SERVER / "triton_model.py", "model.onnx": wanted.artifact}
    return {_BACKENDS[wanted.entry.variant.backend][2]: wanted.artifact}


def _prepare(wanted: Wanted) -> Model:
    """The preprocessing in the python backend: strings in, the graph's inputs out."""
    assert wanted.raw is not None
    raw = wanted.raw
    config = {
        "name": f"{wanted.name}-prepare",
        "backend": "python",
        "max_batch_size": wanted.tuning.max_batch,
        "input": [{"name": raw.input, "data_type": Enum("TYPE_STRING"), "dims": [1]}],
        "output": [_tensor(spec) for spec in wanted.document.inputs],
        "version_policy": _policy(wanted),
        **_batching(wanted),
        "instance_group": _instances(wanted, "KIND_CPU"),
        "parameters": _parameters({"call": raw.call, "input": raw.input}),
    }
    files: dict[str, Content] = {
        "model.py": ON_SERVER / "triton_prepare.py",
        "preprocessing.json": json.dumps(dict(wanted.document.preprocessing)).encode(),
        **{f"step/{path}": content for path, content in raw.files.items()},
    }
    return Model(f"{wanted.name}-prepare", files, {}, pbtxt.write(config).encode())


def _ensemble(wanted: Wanted) -> Model:
    """Pinned to this very version of both: a mixture of two versions never answers."""
    assert wanted.raw is not None
    inputs, outputs = wanted.document.inputs, wanted.document.outputs
    steps = [
        {
            "model_name": f"{wanted.name}-prepare",
            "model_version": wanted.version,
            "input_map": [{"key": wanted.raw.input, "value": wanted.raw.input}],
            "output_map": [{"key": spec.name, "value": f"prepared_{spec.name}"} for spec in inputs],
        },
        {
            "model_name": wanted.name,
            "model_version": wanted.version,
            "input_map": [{"key": spec.name, "value": f"prepared_{spec.name}"} for spec in inputs],
            "output_map": [{"key": spec.name, "value": spec.name} for spec in outputs],
        },
    ]
    config = {
        "name": f"{wanted.name}-raw",
        "platform": "ensemble",
        "max_batch_size": wanted.tuning.max_batch,
        "input": [{"name": wanted.raw.input, "data_type": Enum("TYPE_STRING"), "dims": [1]}],
        "output": [_tensor(spec) for spec in outputs],
        "version_policy": {"specific": {"versions": [wanted.version]}},
        "ensemble_scheduling": {"step": steps},
    }
    return Model(f"{wanted.name}-raw", {}, {}, pbtxt.write(config).encode())


def _policy(wanted: Wanted) -> dict[str, Any]:
    """Of a model that an ensemble is pinned to, the version served until now stays loaded until the ensemble has moved on."""
    both = wanted.raw is not None and wanted.previous is not None
    return {"specific": {"versions": [wanted.previous, wanted.version] if both else [wanted.version]}}


def _batching(wanted: Wanted) -> dict[str, Any]:
    tuning = wanted.tuning
    if tuning.max_batch == 1:
        return {}
    # A deadline is the client's to set: none by default.
    policy: dict[str, Any] = {"timeout_action": Enum("REJECT"), "allow_timeout_override": True}
    if tuning.queue is not None:
        policy["max_queue_size"] = tuning.queue
    return {"dynamic_batching": {"preferred_batch_size": [tuning.preferred], "default_queue_policy": policy}}


def _instances(wanted: Wanted, kind: str) -> dict[str, Any]:
    return {"count": wanted.tuning.instances, "kind": Enum(kind)}


def _warmup(
    inputs: list[tuple[str, str, list[int], bytes]], sizes: set[int], shared: dict[str, Content]
) -> dict[str, Any]:
    """A request a batch size, of one sample (name, datatype, dims, bytes) that Triton repeats."""
    values = [
        {
            "key": name,
            "value": {
                "data_type": Enum(f"TYPE_{dtype}"),
                "dims": dims,
                "input_data_file": _named(shared, f"warmup/{name}", content),
            },
        }
        for name, dtype, dims, content in inputs
    ]
    return {
        "model_warmup": [
            {"name": f"golden-{size}", "batch_size": size, "inputs": values} for size in sorted(sizes)
        ]
    }


def _named(shared: dict[str, Content], stem: str, content: bytes, suffix: str = "") -> str:
    """Add a file named by its content; its name in its own folder."""
    folder, _, own = stem.rpartition("/")
    plain = "".join(c if c.isalnum() else "_" for c in own)
    file = f"{plain}-{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
    shared[f"{folder}/{file}" if folder else file] = content
    return file


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    """Dims without the batch's, -1 for what the graph leaves free."""
    return {
        "name": spec.name,
        "data_type": Enum(f"TYPE_{TYPES[spec.dtype]}"),
        "dims": [-1 if isinstance(d, str) else d for d in spec.shape[1:]],
    }


def _labels(classes: tuple[str, ...], outputs: tuple[TensorSpec, ...]) -> bytes:
    """One class a line, for Triton's classification extension; none where no output has a value a class."""
    if len(classes) < 2 or len(outputs) != 1 or outputs[0].shape[-1] != len(classes):
        return b""
    return "".join(" ".join(name.split()) + "\n" for name in classes).encode()


def _parameters(told: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"string_value": value}} for key, value in told.items()]
