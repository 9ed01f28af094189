"""Whether what a target runs can be loaded on this machine: told from the manifest, with nothing loaded."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tlexport import hardware, targets
from tlexport.bundle.manifest import Entry, Manifest, Needs
from tlexport.results import Refusal

# What executes on loading, not what a runtime interprets: an engine holds machine code, a .pt2 a shared library.
CODE = ("tensorrt", "tensorrt_rtx", "inductor")
# Each backend's packages, by preference; any one of them brings it.
PACKAGES = {
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt-rtx",),
    "inductor": ("torch",),
}
_EXTRAS = {
    "tensorrt": "tlexport[tensorrt]",
    "tensorrt_rtx": "tlexport[rtx]",
    "openvino": "tlexport[openvino]",
    "onnxruntime": "onnxruntime",
    "inductor": "torch",
}
# Every ONNX Runtime that this package may be installed with reads these. A newer one reads what an older one did
# (its documentation, Compatibility), so beyond them what built the graph reads it, and nothing older is known to.
READ_BY_ALL_OPSET, READ_BY_ALL_IR = 23, 11


@dataclass(frozen=True)
class Here:
    """This machine, as far as it decides what can be loaded."""

    system: str
    machine: str
    isa: tuple[str, ...]
    gpu: str  # target name of the first GPU, empty without one
    cuda: tuple[int, int] | None  # the newest that the driver runs
    installed: dict[str, str]  # package -> version, of those of PACKAGES
    cuda_wheels: dict[
        str, int
    ]  # package -> major version of the CUDA that its libraries are made for, where it says so


def here() -> Here:
    """What is found now."""
    names = {name for packages in PACKAGES.values() for name in packages}
    return Here(
        system=platform.system(),
        machine=platform.machine(),
        isa=hardware.instruction_sets(),
        gpu=hardware.capability(),
        cuda=hardware.driver_cuda(),
        installed={name: version for name in names if (version := _version(name))},
        cuda_wheels={name: major for name in names if (major := _cuda_wheel(name))},
    )


def needs(entry: Entry, document: Manifest) -> Needs:
    """The entry's own, or for a manifest of version 1 what its provenance says."""
    if entry.needs is not None:
        return entry.needs
    compiled = document.provenance.get("stages", {}).get("compile", {})
    names = PACKAGES.get(entry.variant.backend, ())
    found = next((name for name in names if name in compiled), names[0] if names else entry.variant.backend)
    return Needs(package=found, version=compiled.get(found))


def refusals(document: Manifest, target: str, machine: Here) -> tuple[Refusal, ...]:
    """Every reason why what `target` runs cannot be loaded on `machine`."""
    entry = document.targets[target]
    return tuple(
        Refusal(kind=refusal.kind, file=entry.file, reason=refusal.reason)
        for refusal in (
            *_hardware(target, entry, machine),
            *_library(entry, needs(entry, document), machine),
            *_code(document, entry, machine),
        )
    )


def _hardware(target: str, entry: Entry, machine: Here) -> Iterator[Refusal]:
    if target == "cpu":
        return
    what = f"{entry.variant.backend} cannot run {target} on this machine"
    if machine.cuda is None:
        yield Refusal(kind="driver", reason=f"{what}: it has no NVIDIA driver (no libcuda.so.1)")
        return
    if not machine.gpu:
        yield Refusal(kind="driver", reason=f"{what}: its NVIDIA driver finds no usable GPU")
    elif machine.gpu != target:
        yield Refusal(kind="target", reason=f"{what}: its GPU is {machine.gpu}")
    for package in PACKAGES.get(entry.variant.backend, ()):
        major = machine.cuda_wheels.get(package)
        if major and machine.cuda[0] < major:
            yield Refusal(
                kind="driver",
                reason=f"{what}: {package} is made for CUDA {major}, and the driver runs CUDA "
                f"{machine.cuda[0]}.{machine.cuda[1]} at most; update the driver, or install the package for CUDA {machine.cuda[0]}",
            )


def _library(entry: Entry, needed: Needs, machine: Here) -> Iterator[Refusal]:
    backend = entry.variant.backend
    if backend not in PACKAGES:
        yield Refusal(
            kind="library",
            reason=f"backend {backend!r} is not one of this tlexport (it has: {', '.join(PACKAGES)})",
        )
        return
    found = next((name for name in PACKAGES[backend] if name in machine.installed), None)
    if found is None:
        yield Refusal(kind="library", reason=f"{backend} is not installed; pip install '{_EXTRAS[backend]}'")
        return
    if why := _too_old(entry, needed, machine.installed[found]):
        yield Refusal(kind="library", reason=f"{found} {machine.installed[found]} is here: {why}")


def _too_old(entry: Entry, needed: Needs, version: str) -> str:
    """Why `version` of the backend's library does not read the artifact; empty if it does, or if nothing is known of it."""
    backend, built, now = entry.variant.backend, needed.version, _numbers(version)
    if built is None or backend == "openvino":
        return ""
    made = _numbers(built)
    if backend == "onnxruntime":
        beyond = (needed.opset or 0) > READ_BY_ALL_OPSET or (needed.ir or 0) > READ_BY_ALL_IR
        graph = f"the graph has opset {needed.opset} and IR version {needed.ir}"
        return (
            f"{graph}, was built with {built}, and no older one is known to read it"
            if beyond and now < made
            else ""
        )
    if backend == "inductor":
        # AOTInductor keeps its C interface for what older versions compiled, not the other way round.
        return (
            f"the library was compiled by {built}, and an older torch does not load it" if now < made else ""
        )
    if entry.variant.options.get("version_compatible"):
        return f"the engine was built by {built}, and an older one does not load it" if now < made else ""
    # "engines are not compatible between different releases" (Engine Compatibility, TensorRT 11.1 and TensorRT-RTX)
    return f"the engine was built by {built}, and no other version loads it" if now != made else ""


def _code(document: Manifest, entry: Entry, machine: Here) -> Iterator[Refusal]:
    """What compiled code was made for; an engine is made for its GPU and for no CPU."""
    made = document.platform
    if entry.variant.backend not in CODE or made is None:
        return
    if entry.variant.backend == "inductor":
        if (made.system, made.machine) != (machine.system, machine.machine):
            yield Refusal(
                kind="system",
                reason=f"{entry.file} is compiled for {made.system} on {made.machine}, and this is {machine.system} on "
                f"{machine.machine}",
            )
        elif missing := [name for name in made.isa if name not in machine.isa]:
            yield Refusal(
                kind="code",
                reason=f"{entry.file} is compiled for a CPU with {', '.join(missing)}, which this one has not",
            )
    elif entry.variant.backend == "tensorrt" and made.system != machine.system:
        yield Refusal(
            kind="system", reason=f"{entry.file} is built on {made.system}, and this is {machine.system}"
        )


def unknown_target(document: Manifest, wanted: str | None) -> Refusal | None:
    """Why there is no such target in the bundle, whatever this machine is."""
    if wanted is None or wanted in document.targets:
        return None
    try:
        name = targets.resolve(wanted)
    except ValueError as error:
        return Refusal(kind="target", reason=str(error))
    if name in document.targets:
        return None
    held = ", ".join(document.targets)
    return Refusal(kind="target", reason=f"the bundle holds nothing for {name} (it is for: {held})")


def _numbers(version: str) -> tuple[int, ...]:
    """`10.13.3.9.post1` -> (10, 13, 3, 9), `2.9.0+cu130` -> (2, 9, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-zA-Z]|\.post", version)[0]))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda_wheel(package: str) -> int | None:
    """12 of a package that requires `tensorrt_cu12` or `nvidia-cuda-runtime-cu12`; None where it names no CUDA."""
    try:
        required = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    majors = [int(found[1]) for text in required if (found := re.match(r"[\w.-]+[-_]cu(\d+)\b", text))]
    return max(majors, default=None)
