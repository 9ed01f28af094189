"""The recipe's `tensorrt` section: what each of the two libraries can do of it, and how it is told.

What TensorRT alone can do was never run on a GPU by the tests: they hold the names used against its bindings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tlexport.errors import CompileError
from tlexport.recipe import TensorRT
from tlexport.run import replacing

# TensorRT-RTX 1.7 was seen to build the very same engine with and without the options it is said to ignore.
_CANNOT = {
    "tensorrt_rtx": {
        "optimization_level": "it builds the same engine at every level and chooses kernels when one is loaded",
        "hardware_compatibility": "it ignores it; name every GPU as a target instead",
        "version_compatible": "its package lacks the lean runtime that such an engine carries (libnvinfer_lean)",
        "strip_weights": "it needs the GPU for that while it builds, and is used ahead of time here",
        "sparse_weights": "it ignores it: the engine is the same without",
        "aux_streams": "it ignores it: the engine is the same without",
        "timing_cache": "it times nothing when it builds; tensorrt.runtime_cache keeps what it compiles later",
    },
    "tensorrt": {
        "runtime_cache": "it compiles nothing when it loads an engine; tensorrt.timing_cache shortens its builds",
    },
}


def supported(backend: str) -> tuple[str, ...]:
    """The options that `backend` honours."""
    return tuple(name for name in TensorRT.model_fields if name not in _CANNOT[backend])


def refusal(backend: str, options: TensorRT) -> str:
    """Why `backend` cannot honour what is set; empty if it can."""
    wrong = [name for name in chosen(options) if name in _CANNOT[backend]]
    return "; ".join(
        f"{backend} cannot honour tensorrt.{name}: {_CANNOT[backend][name]} (set tensorrt.{name} back to its default)"
        for name in wrong
    )


def chosen(options: TensorRT) -> dict[str, Any]:
    """What is not as by default."""
    return options.model_dump(mode="json", exclude_defaults=True)


def used(backend: str, options: TensorRT) -> dict[str, Any]:
    """What an artifact of `backend` was built with that is not as by default; for other libraries nothing."""
    return chosen(options) if backend in _CANNOT else {}


def apply(trt: Any, config: Any, options: TensorRT) -> None:
    """Write the options into an IBuilderConfig. Raises CompileError if it holds another value than it was given."""
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatibility != "none":
        config.hardware_compatibility_level = _level(trt, options)
    if options.aux_streams is not None:
        config.max_aux_streams = options.aux_streams
    for flag, wanted in _flags(trt, options).values():
        if wanted:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
    for name, (given, held) in _read_back(trt, config, options).items():
        if given != held:
            raise CompileError(
                f"{trt.__name__} does not take tensorrt.{name}: given {given}, it holds {held}"
            )


def _level(trt: Any, options: TensorRT) -> Any:
    return {
        "ampere_plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
        "same_compute_capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
    }[options.hardware_compatibility]


def _flags(trt: Any, options: TensorRT) -> dict[str, tuple[Any, bool]]:
    """TF32 is on where it is not cleared."""
    return {
        "tf32": (trt.BuilderFlag.TF32, options.tf32),
        "version_compatible": (trt.BuilderFlag.VERSION_COMPATIBLE, options.version_compatible),
        "strip_weights": (trt.BuilderFlag.STRIP_PLAN, options.strip_weights),
        "sparse_weights": (trt.BuilderFlag.SPARSE_WEIGHTS, options.sparse_weights),
    }


def _read_back(trt: Any, config: Any, options: TensorRT) -> dict[str, tuple[Any, Any]]:
    """Option -> what it was set to and what the config holds: a library corrects some values without a word."""
    flags = _flags(trt, options).items()
    found: dict[str, tuple[Any, Any]] = {
        name: (wanted, config.get_flag(flag)) for name, (flag, wanted) in flags
    }
    if options.workspace_mb is not None:
        limit = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
        found["workspace_mb"] = (options.workspace_mb << 20, limit)
    if options.optimization_level is not None:
        found["optimization_level"] = (options.optimization_level, config.builder_optimization_level)
    if options.hardware_compatibility != "none":
        found["hardware_compatibility"] = (_level(trt, options), config.hardware_compatibility_level)
    if options.aux_streams is not None:
        found["aux_streams"] = (options.aux_streams, config.max_aux_streams)
    return found


@contextlib.contextmanager
def timing_cache(config: Any, options: TensorRT) -> Iterator[None]:
    """Builds inside read and extend the file `timing_cache`. Never run here: TensorRT-RTX has no use for it.

    Raises CompileError if the file is of another GPU or another TensorRT. Of two builds at once the later one's
    file stays.
    """
    if options.timing_cache is None:
        yield
        return
    path = Path(options.timing_cache)
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, False):
        raise CompileError(_foreign("timing", path))
    yield
    with replacing(path) as partial:
        partial.write_bytes(memoryview(cache.serialize()))


@contextlib.contextmanager
def execution_context(trt: Any, engine: Any, options: TensorRT, *, graphs: bool) -> Iterator[Any]:
    """An IExecutionContext, which reads and extends the file `runtime_cache`. Never run here: it needs a GPU.

    `graphs` asks TensorRT-RTX for CUDA graphs. Raises CompileError if it does not take that, or if the file is of another
    GPU, driver or TensorRT-RTX.
    """
    if options.runtime_cache is None and not graphs:
        yield engine.create_execution_context()
        return
    runtime_config = engine.create_runtime_config()
    if graphs:
        _capture_graphs(trt, runtime_config)
    if options.runtime_cache is None:
        yield engine.create_execution_context(runtime_config)
        return
    path = Path(options.runtime_cache)
    runtime_cache = runtime_config.create_runtime_cache()
    if path.is_file() and not runtime_cache.deserialize(path.read_bytes()):
        raise CompileError(_foreign("runtime", path))
    runtime_config.set_runtime_cache(runtime_cache)
    yield engine.create_execution_context(runtime_config)
    with replacing(path) as partial:
        partial.write_bytes(memoryview(runtime_cache.serialize()))


def _capture_graphs(trt: Any, runtime_config: Any) -> None:
    """Have the whole engine captured once the kernels for a shape are there, which are then compiled by the first call.

    NVIDIA's "Working with RTX CUDA Graphs": by default these come later, from the background, and the graph with them.
    """
    whole = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    at_once = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    runtime_config.cuda_graph_strategy = whole
    runtime_config.dynamic_shapes_kernel_specialization_strategy = at_once
    held = (runtime_config.cuda_graph_strategy, runtime_config.dynamic_shapes_kernel_specialization_strategy)
    if held != (whole, at_once):
        raise CompileError(
            f"{trt.__name__} does not take CUDA graphs: given {(whole, at_once)}, it holds {held}"
        )


def _foreign(kind: str, path: Path) -> str:
    return (
        f"{path} was not made by this library on this GPU, or is broken; remove it, or name another file in "
        f"tensorrt.{kind}_cache"
    )


def advice(options: TensorRT, messages: Sequence[str]) -> str:
    """Which option may be behind the compiler's words; empty if none."""
    short = any("OutOfMemory" in message or "workspace" in message for message in messages)
    if options.workspace_mb is None or not short:
        return ""
    return f" (tensorrt.workspace_mb is {options.workspace_mb}: allow more, or leave it out)"
