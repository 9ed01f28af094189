"""One group of bench/gpu.py, in a process of its own: a network at a batch size, every candidate timed in turns.

Called with a job (JSON, see `Job`); writes its record after each step, so that what is known is kept if a library takes the
process down, and `doing` names the cell that did.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import gpu_state
import numpy as np
from common import say
from gpu_cases import EAGER, GRAPHED, TORCH, batches, case_of, compiled, refusal, torch_module
from latency_cases import Case

from tlexport.evidence import machine
from tlexport.evidence.latency import closed_loop
from tlexport.run import write_text

REFERENCE = f"{EAGER}-fp32"
TOLERANCE = 1e-3  # of FP32 candidates against eager
PARTS = 50  # calls timed in their parts
Open = Callable[[], AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Job:
    """`cells`: (backend, precision). `known`: cells that took an earlier process down, and what is said of them."""

    model: str
    batch: int
    device: str
    target: str
    cells: list[tuple[str, str]]
    known: dict[str, str]
    seconds: float  # for timing a cell
    samples: int
    quick: bool
    work: str  # a folder for this network's graphs
    out: str


class Record:
    """Cells by name, each measured or refused, and what was seen around them."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.doing = ""
        self.cells: dict[str, dict[str, Any]] = {}
        self.around: dict[str, Any] = {}
        for cell, reason in job.known.items():
            self.refuse(cell, reason)

    def refuse(self, cell: str, reason: str) -> None:
        self.cells[cell] = {"state": "refused", "reason": " ".join(reason.split())[:600]}
        self.save()

    def refuse_rest(self, cells: Sequence[str], reason: str) -> None:
        for cell in cells:
            if cell not in self.cells:
                self.refuse(cell, reason)

    @contextlib.contextmanager
    def trying(self, cell: str, what: str) -> Iterator[None]:
        """Whatever goes wrong inside is why `cell` is refused. Ends the process where the GPU is of no more use to it."""
        self.doing = cell
        self.save()
        say(f"  {cell}: {what}")
        try:
            yield
        except (Exception, SystemExit) as error:  # noqa: BLE001  every library raises its own; the reason is kept
            self.refuse(cell, f"{what}: {type(error).__name__}: {error}")
            if not usable(self.job.device):
                sys.exit(f"{cell} left the GPU unusable for this process")
        self.doing = ""

    def save(self) -> None:
        document = {"doing": self.doing, "cells": self.cells, "around": self.around}
        write_text(Path(self.job.out), json.dumps(document))


def main() -> None:
    job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    job = dataclasses.replace(job, cells=[(backend, precision) for backend, precision in job.cells])
    record = Record(job)
    names = [f"{backend}-{precision}" for backend, precision in job.cells]
    for (backend, precision), name in zip(job.cells, names, strict=True):
        if name not in record.cells and (reason := refusal(backend, precision, job.target)):
            record.refuse(name, reason)
    case = None
    with record.trying(REFERENCE, "making the network"):
        case = case_of(job.model, job.quick, Path(job.work))
    if case is not None:
        with ExitStack() as stack:
            runners = loaded(job, record, case, stack)
            if REFERENCE in runners:
                timed(job, record, runners)
    reason = record.cells[REFERENCE].get("reason", "")
    record.refuse_rest(names, f"there is no reference to hold it against: {reason}")


def loaded(job: Job, record: Record, case: Case, stack: ExitStack) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Every candidate whose answers are eager's, bound to a batch, and what is known of it; nothing if eager fails."""
    full_precision(job.device)
    inputs, output = batches(case.fresh, job.batch), case.serving.output
    expected = np.empty(0)
    runners: dict[str, tuple[Any, dict[str, Any]]] = {}
    for backend, precision in job.cells:
        cell = f"{backend}-{precision}"
        if cell in record.cells:
            continue
        with record.trying(cell, "building and loading"):
            opened, facts = candidate(job, case, backend, precision)
            runner = stack.enter_context(opened())
            answers = np.concatenate([runner.run(batch)[output] for batch in inputs])
            expected = answers if cell == REFERENCE else expected
            bound = runner.bind(inputs[0])
            bound.call()
            again = bound.outputs()[output]  # by way of a CUDA graph, maybe
            errors = [held_against(expected, answers, precision)]
            errors.append(held_against(expected[: len(again)], again, precision))
            facts |= {"max_abs_error": max(errors), "provider": runner.provider}
            facts["note"] = graph_note() if backend == GRAPHED else bound.note
            runners[cell] = (bound, facts)
        if REFERENCE not in runners:
            break
    return runners


def usable(device: str) -> bool:
    """Some errors of CUDA stay for the whole process."""
    import torch

    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def timed(job: Job, record: Record, runners: Mapping[str, tuple[Any, dict[str, Any]]]) -> None:
    record.around |= {"gpu_before": gpu_state.read(), "steal_before_s": machine.steal_seconds()}
    record.doing = f"timing {', '.join(runners)}"
    record.save()
    schedule = closed_loop.Schedule(
        warmup_s=min(3.0, job.seconds), drop_ratio=None, budget_s=job.seconds * len(runners)
    )
    calls = {cell: bound.call for cell, (bound, _) in runners.items()}
    times = closed_loop.interleave(
        calls, samples=job.samples, seed=job.batch, protected=[REFERENCE], schedule=schedule
    )
    record.around |= {
        "gpu_after": gpu_state.read(),
        "steal_after_s": machine.steal_seconds(),
        "unsettled": list(times.unsettled),
        "clock_ns": times.clock_ns,
    }
    for cell, (bound, facts) in runners.items():
        record.cells[cell] = {
            "state": "measured",
            **facts,
            **latency(times[cell], job.batch),
            "calls_per_sample": times.calls_per_sample[cell],
            "speedup": closed_loop.speedup(times[REFERENCE], times[cell]).model_dump(),
            "parts": parts(bound),
            "samples_ms": (1e3 * times[cell]).round(6).tolist(),
        }
    record.doing = ""
    record.save()


def full_precision(device: str) -> None:
    """FP32 is FP32: torch's convolutions on a GPU are TF32 by default. cuDNN may choose its kernels by trying them."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = device == "cuda"


def candidate(job: Job, case: Case, backend: str, precision: str) -> tuple[Open, dict[str, Any]]:
    """How to load it, and what its receipt says. Raises ValueError if that is not what was asked."""
    from tlexport import cores
    from tlexport.backends import Options, eager, registry
    from tlexport.graph import inspect, trace
    from tlexport.tensors import Profile

    threads = 1 if job.quick else cores.usable()
    if backend in TORCH:
        module = compiled(torch_module(case.serving, precision, job.device), backend)
        ends = {"inputs": case.names, "output": case.serving.output, "threads": threads}
        return partial(eager.runner_for, module, **ends), {"receipt": None}
    graph = typed_graph(job, case, precision)
    out = Path(job.work) / f"{backend}-{precision}-{job.batch}{registry.get(backend).SUFFIX}"
    profile = Profile(min=job.batch, opt=job.batch, max=job.batch)
    made = registry.build(backend, graph, out, job.target, profile, inspect.compute_dtypes(trace.load(graph)))
    if not made.receipt.agrees:
        raise ValueError(f"its receipt disagrees: {'; '.join(made.receipt.disagreements[:3])}")
    facts = {"receipt": made.receipt.summary(), "size_bytes": out.stat().st_size}
    options = Options(cuda_graphs=True)
    opened = registry.get(backend).runner
    return partial(opened, out, threads=threads, device=job.device, options=options), facts


def typed_graph(job: Job, case: Case, precision: str) -> Path:
    """The graph of that precision, which another batch size's process may have made already."""
    from tlexport.graph import trace

    path = Path(job.work) / f"{precision}.onnx"
    if not path.is_file():
        trace.save(made_graph(job, case, precision), path)
    return path


def made_graph(job: Job, case: Case, precision: str) -> Any:
    import torch

    from tlexport.graph import calibration, cast, quantize, trace

    if precision == "fp32":
        example = tuple(torch.from_numpy(array[:2].copy()) for array in case.seen.values())
        ends = {"input_names": case.names, "output_name": case.serving.output, "metadata": case.about}
        return trace.trace(case.serving, example, opset=20, **ends)
    fp32 = trace.load(typed_graph(job, case, "fp32"))
    if precision in ("fp16", "bf16"):
        return cast.to_half(fp32, precision)
    flavour = "cpu" if job.target == "cpu" else "trt"
    tensors = quantize.tensors_to_calibrate(fp32, flavour)
    ranges = calibration.calibrate(fp32, batches(case.seen, 16), tensors, flavour=flavour)
    narrow = flavour == "cpu" and not machine.has_vnni()
    return quantize.quantize(fp32, ranges, flavour, reduce_range=narrow)


def held_against(expected: np.ndarray, answers: np.ndarray, precision: str) -> float:
    """The largest difference. Raises ValueError if an answer is no number, or one of FP32 is another one."""
    error = float(np.abs(answers - expected).max())
    if not np.isfinite(error):
        raise ValueError("it answers with NaN or infinity")
    if precision == "fp32" and error > TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ValueError(f"it differs from eager FP32 by {error:.2g}: it computes something else")
    return error


def graph_note() -> str:
    """What inductor did with CUDA graphs: it leaves them out on its own and counts that."""
    from torch._dynamo.utils import counters

    skipped = counters["inductor"]["cudagraph_skips"]
    return f"no CUDA graph: inductor left out {skipped} (its log says why)" if skipped else "CUDA graph"


def latency(seconds: np.ndarray, batch: int) -> dict[str, Any]:
    found = closed_loop.summary(seconds, batch=batch).model_dump()
    return {"count": found.pop("count"), "items_per_s": found.pop("throughput_per_s"), "latency": found}


def parts(bound: Any) -> dict[str, Any] | None:
    """The median of each part of a call with its interval; None where the backend cannot tell."""
    if bound.timed_parts is None:
        return None
    calls = [bound.timed_parts() for _ in range(PARTS)]
    of = {part: np.array([call[part] for call in calls]) / 1e3 for part in calls[0]}
    return {part: closed_loop.percentile(seconds, 0.5).model_dump() for part, seconds in of.items()}


if __name__ == "__main__":
    began = time.monotonic()
    main()
    say(f"  done in {time.monotonic() - began:.0f} s")
