"""What each backend can make of each precision for each target: one table, asked before any compiler is.

A cell is a reason why not, or nothing. The cells of TensorRT-RTX, and those of ONNX Runtime and OpenVINO for the CPU, are
what these libraries were seen to do with a small graph of that precision, and a test holds every one of them against the
real compiler. Those of TensorRT follow NVIDIA's support matrix, since TensorRT builds on its own GPU alone. Whatever
a cell says, the receipt has the last word on what was built.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass

from tlexport.targets import CAPABILITIES, KNOWN, compute_capability

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")


@dataclass(frozen=True)
class Rule:
    """Cells of one backend that are refused for one reason. Its `{target}` and `{precision}` are filled in.

    `unless`: what this machine's own CPU may have that makes the difference.
    """

    backend: str
    targets: tuple[str, ...]
    precisions: tuple[str, ...]
    why: str
    unless: Callable[[], bool] = lambda: False


def _older_than(major: int, minor: int) -> tuple[str, ...]:
    return tuple(name for name in CAPABILITIES if compute_capability(name) < (major, minor))


_ANY = PRECISIONS
_CPU = ("cpu",)
_AHEAD_OF_TIME = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
_NOT_AHEAD_OF_TIME = tuple(name for name in CAPABILITIES if name not in _AHEAD_OF_TIME)

_NO_BF16 = "GPUs before SM80 compute no BF16; use fp16 for {target}"
_NO_FP8 = "GPUs before SM89 compute no FP8; use int8 or fp16 for {target}"
_NO_FP8_TURING = "GPUs before SM89 compute no FP8; use fp16 for {target}"
_NO_INT4 = "{backend} has no kernels with INT4 weights before SM80; use fp16 for {target}"


def _has_fp16_kernels() -> bool:
    """ONNX Runtime's CPU provider has some for ARM."""
    return platform.machine() not in ("x86_64", "AMD64")


@functools.cache
def _openvino_has_bf16() -> bool:
    """Whether OpenVINO's code for this CPU has BF16 arithmetic: that takes AVX-512 BF16 or AMX."""
    if importlib.util.find_spec("openvino") is None:
        return False
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


# The first rule that fits is the answer.
RULES = (
    Rule(
        "tensorrt_rtx",
        _CPU,
        _ANY,
        "tensorrt_rtx builds for NVIDIA GPUs only; for the cpu use onnxruntime or openvino",
    ),
    Rule(
        "tensorrt_rtx",
        _NOT_AHEAD_OF_TIME,
        _ANY,
        f"TensorRT-RTX cannot compile ahead of time for {{target}} (it can for {', '.join(_AHEAD_OF_TIME)}); "
        "use tensorrt on a machine with that GPU",
    ),
    Rule(
        "tensorrt_rtx",
        ("sm75",),
        ("fp32",),
        "TensorRT-RTX compiles no FP32 matrix products (Gemm, MatMul) for SM75; use fp16 there",
    ),
    Rule(
        "tensorrt_rtx",
        ("sm75",),
        ("int8",),
        "TensorRT-RTX computes INT8 convolutions in floating point for SM75; use fp16 there",
    ),
    Rule("tensorrt_rtx", ("sm75",), ("bf16",), _NO_BF16),
    Rule("tensorrt_rtx", ("sm75",), ("fp8",), _NO_FP8_TURING),
    Rule("tensorrt_rtx", ("sm75",), ("int4",), _NO_INT4),
    Rule("tensorrt_rtx", _older_than(8, 9), ("fp8",), _NO_FP8),
    Rule(
        "tensorrt",
        _CPU,
        _ANY,
        "tensorrt builds for NVIDIA GPUs only; for the cpu use onnxruntime or openvino",
    ),
    Rule("tensorrt", _older_than(8, 0), ("bf16",), _NO_BF16),
    Rule("tensorrt", _older_than(8, 9), ("fp8",), _NO_FP8),
    Rule("tensorrt", _older_than(8, 0), ("int4",), _NO_INT4),
    Rule(
        "onnxruntime",
        _CPU,
        ("fp16",),
        "ONNX Runtime's CPU provider computes FP16 graphs in FP32 on x86 (it converts every tensor at load); use fp32 or int8",
        unless=_has_fp16_kernels,
    ),
    Rule("onnxruntime", _CPU, ("bf16",), "ONNX Runtime's CPU provider has no BF16 kernels; use fp32 or int8"),
    Rule(
        "onnxruntime",
        KNOWN,
        ("fp8",),
        "ONNX Runtime dequantises FP8 and computes in float; use int8 for the cpu, TensorRT for FP8 on {target}",
    ),
    Rule(
        "onnxruntime",
        CAPABILITIES,
        ("int8",),
        "ONNX Runtime's CUDA provider has no INT8 convolution: it would dequantise and compute in float; "
        "use fp16, or TensorRT for INT8",
    ),
    Rule(
        "openvino", CAPABILITIES, _ANY, "OpenVINO has no code for NVIDIA GPUs ({target}); it builds for cpu"
    ),
    Rule(
        "openvino",
        _CPU,
        ("fp16",),
        "OpenVINO computes FP16 graphs in FP32 here: full precision is asked of it; use fp32 or int8",
    ),
    Rule(
        "openvino",
        _CPU,
        ("bf16",),
        "OpenVINO computes BF16 graphs in FP32 on this CPU, which has no BF16 arithmetic; use fp32 or int8",
        unless=_openvino_has_bf16,
    ),
    Rule("openvino", _CPU, ("fp8",), "OpenVINO dequantises FP8 and computes in FP32 on CPUs; use int8"),
)

# What a compiler says of a graph that a cell would have refused (one of mixed precisions), and what that means.
_ADVICE = (
    ("FP32 GEMM is not supported", "TensorRT-RTX has no FP32 matrix products for SM75: use fp16 there"),
    ("HW-specific datatypes: b16", "BF16 takes SM80 or newer: use fp16 for older GPUs"),
    ("HW-specific datatypes: fp8", "FP8 takes SM89 or newer: use int8 or fp16 for older GPUs"),
    ("HW-specific datatypes: int4", "INT4 weights take SM80 or newer: use fp16 for older GPUs"),
)


def refusal(backend: str, target: str, precision: str) -> str:
    """Why `backend` cannot make `precision` for `target`, and what to use instead; empty if it can, or if no rule is known.

    An empty precision asks whether the backend builds for the target at all.
    """
    for rule in RULES:
        whole = rule.precisions == _ANY
        fits = rule.backend == backend and target in rule.targets and (whole or precision in rule.precisions)
        if fits and not rule.unless():
            return rule.why.format(backend=backend, target=target, precision=precision.upper())
    return ""


def advice(messages: list[str]) -> tuple[str, ...]:
    """What to do about a compiler's own messages, where it is known."""
    return tuple(words for sign, words in _ADVICE if any(sign in message for message in messages))
