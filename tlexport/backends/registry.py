"""The backends by name, and their work done in child processes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from tlexport import cores, tensors
from tlexport.backends import (
    DEFAULTS,
    Artifact,
    Backend,
    Options,
    Runner,
    Tensors,
    footprint,
    inductor,
    isolation,
    ort,
    ov,
    trt,
    unheard,
)
from tlexport.errors import CompileError, NoCompilerError, NotInstalledError
from tlexport.recipe import AUTO
from tlexport.run import replacing
from tlexport.tensors import Profile
from tlexport.timings import Memory

BACKENDS: dict[str, Backend] = {
    ort.NAME: ort,
    ov.NAME: ov,
    trt.RTX.NAME: trt.RTX,
    trt.TENSORRT.NAME: trt.TENSORRT,
    inductor.NAME: inductor,
}
SLOW = (inductor.NAME,)  # to compile: half a minute for a ResNet-18, where the others take a second


def chosen(names: Sequence[str]) -> dict[str, Backend]:
    """The backends of `compile.backends`, in their order here; `auto` stands for all that compile in seconds.

    Raises CompileError for an unknown name, and for one that is asked for by name and can build nothing here; where it is
    a package or a compiler that is missing, NotInstalledError.
    """
    for name in names:
        if name != AUTO:
            _require_usable(name)
    quick = [name for name in BACKENDS if name not in SLOW] if AUTO in names else []
    return {name: backend for name, backend in BACKENDS.items() if name in {*names, *quick}}


def _require_usable(name: str) -> None:
    found = get(name).availability()
    if not found.installed:
        raise NotInstalledError(f"backend {name!r}", get(name).EXTRA, found.note)
    if not found.builds:
        missing = NoCompilerError(f"backend {name!r}") if name == inductor.NAME else None
        raise missing or CompileError(f"backend {name!r} can build nothing here ({found.note})")


def get(name: str) -> Backend:
    """The backend of that name. Raises CompileError that lists the names."""
    if name not in BACKENDS:
        raise CompileError(f"no backend {name!r} (backends: {', '.join(BACKENDS)})")
    return BACKENDS[name]


def device(name: str, target: str) -> str:
    """`cpu` or `cuda`: where backend `name` runs an artifact for `target` on this machine.

    Raises NotInstalledError or CompileError if it cannot.
    """
    module = get(name)
    here = module.availability()
    if not here.installed:
        raise NotInstalledError(name, module.EXTRA, f"the variant for {target} runs in it")
    if target not in here.runs:
        raise CompileError(
            f"{name} cannot run {target} on this machine (it runs: {', '.join(here.runs) or 'nothing'}"
            f"{f'; {here.note}' if here.note else ''}); choose another --target, or a machine that has one"
        )
    return "cpu" if target == "cpu" else "cuda"


def loader(
    name: str, artifact: Path, target: str, options: Options
) -> Callable[[int], AbstractContextManager[Runner]]:
    """Threads -> the artifact, loaded by backend `name` where it runs `target` here. Raises what `device` raises.

    It can be pickled for another process.
    """
    return functools.partial(_loaded, name, artifact, device(name, target), options)


def _loaded(
    name: str, artifact: Path, device: str, options: Options, threads: int
) -> AbstractContextManager[Runner]:
    return get(name).runner(artifact, threads=threads, device=device, options=options)


def memory(
    name: str,
    artifact: Path,
    inputs: Tensors,
    *,
    target: str,
    threads: int,
    options: Options,
    timeout: float = 600.0,
) -> Memory:
    """What loading the artifact in a process of its own and asking it `inputs` takes; `timeout` in seconds."""
    return isolation.call(
        footprint.measured,
        *(name, artifact, dict(inputs), threads, device(name, target), options),
        timeout=timeout,
        what=f"{name}: the memory of {artifact.name}",
    )


def build(
    name: str,
    graph: Path,
    out: Path,
    target: str,
    profile: Profile,
    expected: Mapping[str, str],
    timeout: float = 1800.0,
    *,
    options: Options = DEFAULTS,
) -> Artifact:
    """Backend.build in a child process, `timeout` in seconds. Raises what it raises, and BackendCrash.

    `options.report` is called in this process; `options.network` in the child, so it must be of module level there: a
    function, or a partial of one.
    """
    silent = dataclasses.replace(options, report=unheard)
    return isolation.call(
        _build,
        *(name, graph, out, target, profile, dict(expected), silent),
        timeout=timeout,
        limit="compile.timeout",
        what=f"{name}: compiling {graph.name} for {target}",
        progress=options.report,
    )


def predict(
    name: str,
    artifact: Path,
    inputs: Path,
    output: Path,
    *,
    input_names: tuple[str, ...],
    batch_size: int,
    threads: int | None = None,
    device: str = "cpu",
    judge: bool = False,
    options: Options = DEFAULTS,
    timeout: float = 3600.0,
) -> str:
    """Run an artifact over a whole array in a child process and return where it ran (Runner.provider).

    `inputs` is a .npy file [n x ...], read from the disk batch by batch: a plain array if the artifact has one input,
    else a structured one with a field for each of `input_names` (others are left alone: a baseline may read fewer
    than the network). `output` becomes a .npy file, float32 [n x k], of the artifact's only output. `threads` is by
    default every core this process may use, `timeout` is in seconds.
    """
    threads = threads or cores.usable()
    what = f"{name}: running {artifact.name} over {inputs.name}"
    return isolation.call(
        _predict,
        *(name, artifact, inputs, output, input_names, batch_size),
        {"threads": threads, "device": device, "judge": judge, "options": options},
        timeout=timeout,
        what=what,
    )


def _build(
    name: str,
    graph: Path,
    out: Path,
    target: str,
    profile: Profile,
    expected: Mapping[str, str],
    options: Options,
    report: isolation.Report,
) -> Artifact:
    heard = dataclasses.replace(options, report=report)
    return get(name).build(graph, out, target, profile, expected, heard)


def _predict(
    name: str,
    artifact: Path,
    inputs: Path,
    output: Path,
    input_names: tuple[str, ...],
    batch_size: int,
    settings: dict[str, Any],
) -> str:
    """`settings` are the runner's."""
    samples = np.load(inputs, mmap_mode="r", allow_pickle=False)
    with get(name).runner(artifact, **settings) as runner:
        results: list[np.ndarray] = []
        for start in range(0, len(samples), batch_size):
            outputs = runner.run(tensors.named(samples[start : start + batch_size], input_names))
            if len(outputs) != 1:
                raise CompileError(
                    f"{artifact} has {len(outputs)} outputs ({', '.join(outputs)}); one is expected"
                )
            results.extend(outputs.values())
        provider = runner.provider
    if not results:
        raise CompileError(f"{inputs} holds no samples")
    with replacing(output) as partial, partial.open("wb") as file:
        np.save(file, np.concatenate(results).astype(np.float32, copy=False), allow_pickle=False)
    return provider
