"""Latency of one sample on the CPU: the variant that a build would choose, beside torch eager, channels_last, compile and
AOTInductor (weights frozen, a package loaded without Python code: faster than compile).

Five networks of torchvision and timm at 224 px, and the networks of the tabular recipes, all with random
weights (latency_cases.py). Accuracy gates say nothing about such weights, so they are not applied; the image goal is
therefore reported with all variants and with the FP32 ones alone. An INT8 variant whose receipt disagrees is no candidate.
Sessions are timed, not wrappers: inputs and outputs are bound, torch's are ready tensors. Each candidate gets one thread or
all, whichever is faster at batch 1; torch's candidates share the number that is best for eager. Each network has a process
of its own. In it torch is timed alone (`torch_beside_others`, the judging times over these, should be near 1: nobody slows
torch down), then a first timing chooses as a build does (fastest median; candidates take turns), and a second, independent
one judges the choice. With --only networks of one kind, images or not, the file's results of the other
kind stay. Needs a C++ compiler (torch.compile, AOTInductor). At most 15 minutes a network, usually four.

Result: `models` and `small_models` {name: {chosen, chosen_fp32, variants {name: {receipt, max_abs_error, decisions_kept}},
refused, threads, dropped, percentiles_ms, best, torch_best, torch_beside_others, torch_alone_ms, first_ms, second_ms
{candidate: [every counted sample]}, calls_per_sample (a sample is the mean of so many), clock_ns, and, from the second timing,
`chosen_over_best` (of all candidates), `chosen_over_best_variant` (of ours), `torch_eager_over_chosen`,
`torch_best_over_chosen`, `torch_best_over_chosen_fp32` {ratio, low, high}}}, `geometric_mean` {all, fp32_only} of the last
two over `models`, `failed` {name: why}.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    arguments,
    best_ratio_draws,
    destination,
    finish,
    goal,
    interval,
    say,
    shown,
    stamp,
    table,
)
from latency_cases import IMAGES, QUICK_IMAGES, QUICK_SMALL, SMALL, Case, case_of

from tlexport import cores
from tlexport.evidence import machine
from tlexport.evidence.latency import closed_loop

TORCH = ("torch-eager", "torch-channels-last", "torch-compile", "torch-aotinductor")
BACKENDS = ("onnxruntime", "openvino")
TIMES_EAGER = 10.0  # goal of the tabular networks
TIMEOUT = 900.0  # of one network, all included
TOLERANCE = 1e-3  # of FP32 candidates' probabilities against eager
BLOCK = closed_loop.TURNS.counted
KINDS = ("models", "small_models")
WHERE = (
    "date",
    "git",
    "machine",
    "versions",
    "quick",
)  # stands with each network: they may come from several calls


def main() -> None:
    parser = arguments("latency", __doc__ or "")
    parser.add_argument("--only", nargs="+", choices=[*IMAGES, *SMALL], help="some of the networks")
    parser.add_argument(
        "--samples", type=int, default=300, help="timed calls of each candidate in each timing"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.samples = 16 if options.quick else options.samples
    if options.child:
        Path(options.out).write_text(json.dumps(measured(options.child, options.samples, options.quick)))
        return
    started, document = time.monotonic(), stamp("latency", parser, options)
    models: dict[str, Any] = {}
    failed: dict[str, str] = {}
    names = [*QUICK_IMAGES, *QUICK_SMALL] if options.quick else options.only or [*IMAGES, *SMALL]
    for seed, name in enumerate(names):
        try:
            models[name] = judged(in_child(name, options), seed)
        except ChildFailed as error:
            failed[name] = str(error)
            say(f"{name}: {error}")
    draws = {name: of.pop("draws") for name, of in models.items()}
    models = {name: of | {key: document[key] for key in WHERE} for name, of in models.items()}
    small = {name: of for name, of in models.items() if name in SMALL}
    images = {name: of for name, of in models.items() if name not in SMALL}
    means = {
        kind: geometric_mean([draws[name][kind] for name in images])
        for kind in ("all", "fp32_only")
        if images
    }
    show(models, means)
    out = destination("latency", options)
    if options.only and out.is_file():
        held = json.loads(out.read_text())
        where = {key: held[key] for key in WHERE}
        kept = {kind: {name: where | of for name, of in held.get(kind, {}).items()} for kind in KINDS}
        small = small or kept["small_models"]
        images, means = (images, means) if images else (kept["models"], held["geometric_mean"])
    document |= {"models": images, "small_models": small, "geometric_mean": means, "failed": failed}
    finish(document, goals_of(images, small, means), out, started)
    if failed:
        raise SystemExit(f"not measured: {', '.join(failed)}")


class ChildFailed(Exception):
    """A network's process died, refused or took too long."""


def in_child(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one network in a process of its own, so that memory and threads do not pile up."""
    say(f"{name}:")
    with tempfile.TemporaryDirectory(prefix="tlexport-latency-") as folder:
        out = Path(folder) / "child.json"
        line = [
            sys.executable,
            __file__,
            "--child",
            name,
            "--samples",
            str(options.samples),
            "--out",
            str(out),
        ]
        try:
            done = subprocess.run([*line, *["--quick"] * options.quick], timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            raise ChildFailed(f"not done within {TIMEOUT:g} s") from None
        if done.returncode:
            raise ChildFailed(
                f"its process ended with exit code {done.returncode} (what it said stands above)"
            )
        document: dict[str, Any] = json.loads(out.read_text())
        return document


def measured(name: str, samples: int, quick: bool) -> dict[str, Any]:
    """In the child: make the model and its variants, choose, time again."""
    import torch

    from tlexport.backends import eager, inductor, registry
    from tlexport.stages.bench import fastest_threads

    most = 1 if quick else cores.usable()
    turns = closed_loop.Schedule(warmup_s=0.2, budget_s=5) if quick else closed_loop.Schedule(budget_s=100)
    case = case_of(name, quick)
    serving, ends = case.serving, {"inputs": case.names, "output": case.serving.output}
    one = {key: array[:1] for key, array in case.fresh.items()}
    at_once = fastest_threads(lambda threads: eager.runner_for(serving, threads=threads, **ends), one, most)
    with tempfile.TemporaryDirectory(prefix="tlexport-variants-") as folder, ExitStack() as stack:
        ends["threads"] = at_once
        runners: dict[str, Any] = {
            "torch-eager": stack.enter_context(eager.runner_for(serving, **ends)),
            "torch-compile": stack.enter_context(eager.runner_for(torch.compile(serving), **ends)),
        }
        fp32, package = traced(case), Path(folder) / "package.pt2"
        packaged(case, fp32, package)
        runners["torch-aotinductor"] = stack.enter_context(inductor.runner(package, threads=at_once))
        if any(array.ndim == 4 for array in one.values()):
            alike = eager.runner_for(serving, channels_last=True, **ends)
            runners["torch-channels-last"] = stack.enter_context(alike)
        say("  torch alone, before other libraries have threads here")
        calls = {who: runner.bind(one).call for who, runner in runners.items()}
        alone = closed_loop.interleave(calls, samples=min(samples, 80), seed=2, schedule=turns)
        threads = dict.fromkeys(runners, at_once)
        artifacts, receipts, refused = built(Path(folder), case, fp32)
        say(f"  {len(artifacts)} variants built; loading")
        for variant, path in artifacts.items():
            load = partial(_loaded, registry.BACKENDS[variant.split("-")[0]], path)
            threads[variant] = fastest_threads(load, one, most)
            runners[variant] = stack.enter_context(load(threads[variant]))
        agreement = agreements(runners, case.fresh, serving.output)
        calls = {who: runner.bind(one).call for who, runner in runners.items()}
        say("  first timing, to choose")
        candidates = {who: call for who, call in calls.items() if who in artifacts or who == TORCH[0]}
        first = closed_loop.interleave(
            candidates, samples=samples, protected=[TORCH[0]], seed=0, schedule=turns
        )
        chosen = {
            "chosen": choice(first, artifacts),
            "chosen_fp32": choice(
                first, {who: path for who, path in artifacts.items() if who.endswith("fp32")}
            ),
        }
        say(f"  chosen: {chosen['chosen']}, of FP32 {chosen['chosen_fp32']}; second timing, to judge")
        protected = [who for who in runners if who in (*TORCH, *chosen.values())]
        second = closed_loop.interleave(calls, samples=samples, protected=protected, seed=1, schedule=turns)
    return {
        "inputs": {key: [*array.shape[1:], str(array.dtype)] for key, array in one.items()},
        "threads": threads,
        **chosen,
        "variants": {who: {"receipt": receipts[who], **agreement[who]} for who in artifacts},
        "refused": refused,
        "torch_alone_ms": milliseconds(alone),
        "first_ms": milliseconds(first),
        "second_ms": milliseconds(second),
        "calls_per_sample": second.calls_per_sample,
        "clock_ns": second.clock_ns,
        "dropped": second.dropped,
        "unsettled": list(second.unsettled),
    }


def _loaded(backend: Any, path: Path, threads: int) -> Any:
    return backend.runner(path, threads=threads)


def example_of(case: Case) -> tuple[Any, ...]:
    import torch

    return tuple(torch.from_numpy(array[:2]) for array in case.seen.values())


def traced(case: Case) -> Any:
    """The FP32 graph."""
    from tlexport.graph import trace

    return trace.trace(
        case.serving,
        example_of(case),
        opset=20,
        input_names=case.names,
        output_name=case.serving.output,
        metadata=case.about,
    )


def packaged(case: Case, fp32: Any, out: Path) -> None:
    """The network compiled by AOTInductor. Ends the program if it does not compute in FP32 throughout."""
    from tlexport.backends import Network, Options, inductor
    from tlexport.graph import inspect, trace
    from tlexport.tensors import Profile

    graph = out.with_suffix(".onnx")
    trace.save(fp32, graph)
    network = Network(case.serving, case.names, case.serving.output, example_of(case))
    made = inductor.build(
        graph, out, "cpu", Profile(), inspect.compute_dtypes(fp32), Options(network=lambda: network)
    )
    if not made.receipt.agrees:
        raise SystemExit(f"AOTInductor's receipt disagrees: {'; '.join(made.receipt.disagreements[:3])}")


def built(folder: Path, case: Case, fp32: Any) -> tuple[dict[str, Path], dict[str, str], dict[str, str]]:
    """Artifacts and receipts of the variants by name, and why others are none."""
    from tlexport.backends import registry
    from tlexport.errors import CompileError, NotInstalledError
    from tlexport.graph import calibration, inspect, quantize, trace
    from tlexport.tensors import Profile

    tensors = quantize.tensors_to_calibrate(fp32, "cpu")
    count = len(next(iter(case.seen.values())))
    batches = [
        {name: array[start : start + 16] for name, array in case.seen.items()}
        for start in range(0, count, 16)
    ]
    ranges = calibration.calibrate(fp32, batches, tensors)
    int8 = quantize.quantize(fp32, ranges, "cpu", reduce_range=not machine.has_vnni())
    artifacts, receipts, refused = {}, {}, {}
    for precision, graph in {"fp32": fp32, "int8": int8}.items():
        source = folder / f"{precision}.onnx"
        trace.save(graph, source)
        for backend in BACKENDS:
            name = f"{backend}-{precision}"
            out = folder / name / "model.onnx"
            try:
                made = registry.build(backend, source, out, "cpu", Profile(), inspect.compute_dtypes(graph))
            except (CompileError, NotInstalledError) as error:
                refused[name] = " ".join(str(error).split())
                continue
            receipts[name] = made.receipt.summary()
            if made.receipt.agrees:
                artifacts[name] = out
            else:
                refused[name] = f"receipt disagrees: {'; '.join(made.receipt.disagreements[:3])}"
    return artifacts, receipts, refused


def agreements(
    runners: Mapping[str, Any], fresh: Mapping[str, np.ndarray], output: str
) -> dict[str, dict[str, float]]:
    """Each candidate against eager on samples it has not seen. Ends the program if one of FP32 computes something else."""
    count = len(next(iter(fresh.values())))
    singles = [{name: array[row : row + 1] for name, array in fresh.items()} for row in range(count)]
    answers = {
        who: np.concatenate([runner.run(single)[output] for single in singles])
        for who, runner in runners.items()
    }
    expected = answers[TORCH[0]]
    found = {
        who: {
            "max_abs_error": float(np.abs(answer - expected).max()),
            "decisions_kept": float((answer.argmax(1) == expected.argmax(1)).mean()),
        }
        for who, answer in answers.items()
    }
    for who, of in found.items():
        if not who.endswith("int8") and of["max_abs_error"] > TOLERANCE * max(
            1.0, float(np.abs(expected).max())
        ):
            raise SystemExit(
                f"{who} differs from eager by {of['max_abs_error']:.2g}: it computes something else"
            )
    return found


def choice(first: closed_loop.Timed, artifacts: Mapping[str, Path]) -> str:
    """What a build would pick from these times."""
    from tlexport.bundle.choice import choose
    from tlexport.results import Variant

    variants = tuple(
        Variant(
            name=who,
            backend=who.split("-")[0],
            target="cpu",
            precision=who.split("-")[1],
            file=who,
            size_bytes=path.stat().st_size,
            p50_ms=closed_loop.percentile(first[who], 0.5).value_ms,
            speedup=closed_loop.speedup(first[TORCH[0]], first[who]).ratio,
            verdict="pass",
        )
        for who, path in artifacts.items()
    )
    return choose("cpu", variants).variant.name


def in_units(ms: float | None) -> str:
    from tlexport.bundle.choice import shown as with_unit

    return with_unit(ms)


def milliseconds(times: closed_loop.Timed) -> dict[str, list[float]]:
    return {who: (seconds * 1e3).round(6).tolist() for who, seconds in times.items()}


def judged(model: dict[str, Any], seed: int) -> dict[str, Any]:
    """The second timing's ratios. A dropped candidate is more than twice as slow as the best, so it is none."""
    times = {who: of for who, of in model["second_ms"].items() if who not in model["dropped"]}
    torch = [who for who in TORCH if who in times]
    torch_times = [times[who] for who in torch]
    variants = [of for who, of in times.items() if who not in TORCH]
    own, fp32 = times[model["chosen"]], times[model["chosen_fp32"]]
    against = {
        "all": best_ratio_draws(torch_times, own, block=BLOCK, seed=seed),
        "fp32_only": best_ratio_draws(torch_times, fp32, block=BLOCK, seed=seed),
        "eager": best_ratio_draws([times[TORCH[0]]], own, block=BLOCK, seed=seed),
        "best": best_ratio_draws(list(times.values()), own, block=BLOCK, seed=seed),
        "best_variant": best_ratio_draws(variants, own, block=BLOCK, seed=seed),
    }
    percentiles = {
        who: {f"p{q}": closed_loop.percentile(np.array(of) / 1e3, q / 100).value_ms for q in (50, 90, 99)}
        | {"count": len(of)}
        for who, of in model["second_ms"].items()
    }
    return model | {
        "percentiles_ms": percentiles,
        "torch_beside_others": {
            who: float(np.median(of) / np.median(model["torch_alone_ms"][who]))
            for who, of in zip(torch, torch_times, strict=True)
        },
        "best": min(times, key=lambda who: float(np.median(times[who]))),
        "torch_best": min(torch, key=lambda who: float(np.median(times[who]))),
        "chosen_over_best": inverted(*against["best"]),
        "chosen_over_best_variant": inverted(*against["best_variant"]),
        "torch_eager_over_chosen": interval(*against["eager"]),
        "torch_best_over_chosen": interval(*against["all"]),
        "torch_best_over_chosen_fp32": interval(*against["fp32_only"]),
        "draws": {kind: against[kind] for kind in ("all", "fp32_only")},
    }


def inverted(value: float, draws: np.ndarray) -> dict[str, float | None]:
    return interval(1 / value, 1 / draws)


def geometric_mean(ratios: list[tuple[float, np.ndarray]]) -> dict[str, float | None]:
    """Over networks, each resampled on its own."""
    values, draws = zip(*ratios, strict=True)
    whole = all(len(drawn) for drawn in draws)
    resampled = np.exp(np.mean([np.log(drawn) for drawn in draws], axis=0)) if whole else np.empty(0)
    return interval(float(np.exp(np.mean(np.log(values)))), resampled)


def goals_of(images: dict[str, Any], small: dict[str, Any], means: dict[str, Any]) -> list[dict[str, Any]]:
    found = [
        goal(f"{name}: chosen over the best single candidate", of["chosen_over_best"], 1.05, at_least=False)
        for name, of in (images | small).items()
    ]
    for name, of in small.items():
        what = f"{name}: torch eager over the chosen, one sample"
        found.append(goal(what, of["torch_eager_over_chosen"], TIMES_EAGER, at_least=True))
    for kind, mean in means.items():
        what = f"geometric mean of torch's best over the chosen ({kind.replace('_', ' ')})"
        found.append(goal(what, mean, 1.7, at_least=True))
    return found


def show(models: dict[str, Any], means: dict[str, Any]) -> None:
    header = [
        "network",
        "chosen",
        "p50",
        *TORCH,
        "eager/chosen",
        "torch best/chosen",
        "FP32 only",
        "chosen/best",
    ]
    rows = []
    for name, of in models.items():
        p50 = {who: in_units(times["p50"]) for who, times in of["percentiles_ms"].items()}
        ratios = (
            "torch_eager_over_chosen",
            "torch_best_over_chosen",
            "torch_best_over_chosen_fp32",
            "chosen_over_best",
        )
        rows.append(
            [
                name,
                of["chosen"],
                p50[of["chosen"]],
                *(p50.get(who, "-") for who in TORCH),
                *(shown(of[key]) for key in ratios),
            ]
        )
    table(header, rows)
    for kind, mean in means.items():
        say(f"geometric mean, {kind}: {shown(mean)}")


if __name__ == "__main__":
    main()
