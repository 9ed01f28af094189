"""Latency of one image on the CPU: the variant that a build would choose, beside torch eager, channels_last and compile.

Five networks of torchvision and timm at 224 px, 10 classes, random weights: batch statistics and the head are fitted to
random smooth images, so that activations are of a normal size and outputs differ. Accuracy gates say nothing about
such weights, so they are not applied; the goal is therefore reported with all variants and with the FP32 ones alone. An
INT8 variant whose receipt disagrees is no candidate. Each network has a process of its own. In it torch is timed alone
(`torch_beside_others`, the judging times over these, should be near 1: nobody slows torch down), then a first timing
chooses as a build does (fastest median; candidates take turns), and a second, independent one judges the choice.
Needs a C++ compiler (torch.compile). At most 15 minutes a network, usually four.

Result: `models` {name: {chosen, chosen_fp32, variants {name: {receipt, max_abs_error, decisions_kept}}, refused, threads,
dropped, percentiles_ms, best, torch_best, torch_beside_others, torch_alone_ms, first_ms, second_ms {candidate: [every
counted call]}, and, from the second timing, `chosen_over_best` (of all candidates), `chosen_over_best_variant` (of ours),
`torch_best_over_chosen`, `torch_best_over_chosen_fp32` {ratio, low, high}}}, `geometric_mean` {all, fp32_only} of the
last two, `failed` {name: why}.
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
    smooth_images,
    stamp,
    table,
)

from tlexport.evidence import latency, machine

MODELS = {
    "resnet18": "torchvision/resnet18",
    "resnet50": "torchvision/resnet50",
    "mobilenet_v3_large": "torchvision/mobilenet_v3_large",
    "efficientnet_lite0": "timm/tf_efficientnet_lite0",
    "vit_tiny": "timm/vit_tiny_patch16_224",
}
QUICK_MODELS = {"test_resnet": "timm/test_resnet"}
TORCH = ("torch-eager", "torch-channels-last", "torch-compile")
BACKENDS = ("onnxruntime", "openvino")
CLASSES = 10
TIMEOUT = 900.0  # of one network, all included
TOLERANCE = 1e-3  # of FP32 candidates' probabilities against eager
BLOCK = latency.TURNS.counted


def main() -> None:
    parser = arguments("latency", __doc__ or "")
    parser.add_argument("--only", nargs="+", choices=list(MODELS), help="some of the networks")
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
    models, failed = {}, {}
    for seed, name in enumerate(QUICK_MODELS if options.quick else options.only or MODELS):
        try:
            models[name] = judged(in_child(name, options), seed)
        except ChildFailed as error:
            failed[name] = str(error)
            say(f"{name}: {error}")
    means = {
        kind: geometric_mean([models[name]["draws"][kind] for name in models])
        for kind in ("all", "fp32_only")
        if models
    }
    for of in models.values():
        del of["draws"]
    document |= {"models": models, "geometric_mean": means, "failed": failed}
    show(models, means)
    finish(document, goals_of(models, means), destination("latency", options), started)
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

    from tlexport.backends import eager, registry

    threads = 1 if quick else machine.usable_cores()
    torch.set_num_threads(threads)
    size = 64 if quick else 224
    turns = latency.Schedule(warmup_s=0.2, budget_s=5) if quick else latency.Schedule(budget_s=100)
    serving = sane_model((QUICK_MODELS if quick else MODELS)[name], size)
    fresh = smooth_images(16, size, seed=3)
    with tempfile.TemporaryDirectory(prefix="tlexport-variants-") as folder, ExitStack() as stack:
        runners: dict[str, Any] = {
            "torch-eager": stack.enter_context(eager.runner_for(serving, threads)),
            "torch-channels-last": stack.enter_context(
                eager.runner_for(serving, threads, channels_last=True)
            ),
            "torch-compile": stack.enter_context(eager.runner_for(torch.compile(serving), threads)),
        }
        say("  torch alone, before other libraries have threads here")
        calls = {who: partial(runner.run, {"images": fresh[:1]}) for who, runner in runners.items()}
        alone = latency.interleave(calls, samples=min(samples, 80), seed=2, schedule=turns)
        artifacts, receipts, refused = built(Path(folder), serving, size, quick)
        say(f"  {len(artifacts)} variants built; loading")
        for variant, path in artifacts.items():
            backend = registry.BACKENDS[variant.split("-")[0]]
            runners[variant] = stack.enter_context(backend.runner(path, threads=threads))
        agreement = agreements(runners, fresh)
        calls = {who: partial(runner.run, {"images": fresh[:1]}) for who, runner in runners.items()}
        say("  first timing, to choose")
        candidates = {who: call for who, call in calls.items() if who in artifacts or who == TORCH[0]}
        first = latency.interleave(candidates, samples=samples, protected=[TORCH[0]], seed=0, schedule=turns)
        chosen = {
            "chosen": choice(first, artifacts),
            "chosen_fp32": choice(
                first, {who: path for who, path in artifacts.items() if who.endswith("fp32")}
            ),
        }
        say(f"  chosen: {chosen['chosen']}, of FP32 {chosen['chosen_fp32']}; second timing, to judge")
        second = latency.interleave(
            calls, samples=samples, protected=[*TORCH, *chosen.values()], seed=1, schedule=turns
        )
    return {
        "image_size": size,
        "threads": threads,
        **chosen,
        "variants": {who: {"receipt": receipts[who], **agreement[who]} for who in artifacts},
        "refused": refused,
        "torch_alone_ms": milliseconds(alone),
        "first_ms": milliseconds(first),
        "second_ms": milliseconds(second),
        "dropped": second.dropped,
        "unsettled": list(second.unsettled),
    }


def sane_model(backbone: str, size: int) -> Any:
    """A ServingModel whose activations have a normal size and whose outputs differ from image to image."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

    from tlexport.models.image import ServingModel, create, describe

    torch.manual_seed(0)
    model = create(describe(backbone, classes=CLASSES, task="multiclass", image_size=size))
    batches = torch.from_numpy(smooth_images(64, size, seed=1)).split(16)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = None  # a plain average over the batches
        norm.reset_running_stats()
    with torch.no_grad():
        model.train()
        for batch in batches:
            model(batch)
        model.eval()
        logits = torch.cat([model(batch) for batch in batches])
        spread = logits.std(dim=0).mean()
        if not spread > 1e-12:
            raise SystemExit(
                f"{backbone} with random weights answers every image alike; there is nothing to compare"
            )
        head = model.head[-1]
        head.bias.sub_(logits.mean(dim=0)).mul_(2 / spread)
        head.weight.mul_(2 / spread)
    return ServingModel(model).eval()


def built(
    folder: Path, serving: Any, size: int, quick: bool
) -> tuple[dict[str, Path], dict[str, str], dict[str, str]]:
    """Artifacts and receipts of the variants by name, and why others are none."""
    import torch

    from tlexport.backends import registry
    from tlexport.errors import CompileError, NotInstalledError
    from tlexport.graph import calibration, inspect, quantize, trace
    from tlexport.tensors import Profile

    samples = smooth_images(16 if quick else 64, size, seed=2)
    about = {"class_names": json.dumps(list(range(CLASSES))), "preprocessing": "{}", "task": "multiclass"}
    fp32 = trace.trace(serving, torch.from_numpy(samples[:2]), opset=20, metadata=about)
    tensors = quantize.tensors_to_calibrate(fp32, "cpu")
    batches = (samples[start : start + 16] for start in range(0, len(samples), 16))
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


def agreements(runners: Mapping[str, Any], images: np.ndarray) -> dict[str, dict[str, float]]:
    """Each candidate against eager on images it has not seen. Ends the program if one of FP32 computes something else."""
    answers = {
        who: np.concatenate([runner.run({"images": image[None]})["probabilities"] for image in images])
        for who, runner in runners.items()
    }
    expected = answers["torch-eager"]
    found = {
        who: {
            "max_abs_error": float(np.abs(answer - expected).max()),
            "decisions_kept": float((answer.argmax(1) == expected.argmax(1)).mean()),
        }
        for who, answer in answers.items()
    }
    for who, of in found.items():
        if not who.endswith("int8") and of["max_abs_error"] > TOLERANCE:
            raise SystemExit(
                f"{who} differs from eager by {of['max_abs_error']:.2g}: it computes something else"
            )
    return found


def choice(first: latency.Timed, artifacts: Mapping[str, Path]) -> str:
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
            p50_ms=latency.percentile(first[who], 0.5).value_ms,
            speedup=latency.speedup(first[TORCH[0]], first[who]).ratio,
            verdict="pass",
        )
        for who, path in artifacts.items()
    )
    return choose("cpu", variants).variant.name


def milliseconds(times: latency.Timed) -> dict[str, list[float]]:
    return {who: (seconds * 1e3).round(4).tolist() for who, seconds in times.items()}


def judged(model: dict[str, Any], seed: int) -> dict[str, Any]:
    """The second timing's ratios. A dropped candidate is more than twice as slow as the best, so it is none."""
    times = {who: of for who, of in model["second_ms"].items() if who not in model["dropped"]}
    torch_times = [times[who] for who in TORCH]
    variants = [of for who, of in times.items() if who not in TORCH]
    own, fp32 = times[model["chosen"]], times[model["chosen_fp32"]]
    against = {
        "all": best_ratio_draws(torch_times, own, block=BLOCK, seed=seed),
        "fp32_only": best_ratio_draws(torch_times, fp32, block=BLOCK, seed=seed),
        "best": best_ratio_draws(list(times.values()), own, block=BLOCK, seed=seed),
        "best_variant": best_ratio_draws(variants, own, block=BLOCK, seed=seed),
    }
    percentiles = {
        who: {f"p{q}": latency.percentile(np.array(of) / 1e3, q / 100).value_ms for q in (50, 90, 99)}
        | {"count": len(of)}
        for who, of in model["second_ms"].items()
    }
    return model | {
        "percentiles_ms": percentiles,
        "torch_beside_others": {
            who: float(np.median(of) / np.median(model["torch_alone_ms"][who]))
            for who, of in zip(TORCH, torch_times, strict=True)
        },
        "best": min(times, key=lambda who: float(np.median(times[who]))),
        "torch_best": min(TORCH, key=lambda who: float(np.median(times[who]))),
        "chosen_over_best": inverted(*against["best"]),
        "chosen_over_best_variant": inverted(*against["best_variant"]),
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


def goals_of(models: dict[str, Any], means: dict[str, Any]) -> list[dict[str, Any]]:
    found = [
        goal(f"{name}: chosen over the best single candidate", of["chosen_over_best"], 1.05, at_least=False)
        for name, of in models.items()
    ]
    for kind, mean in means.items():
        what = f"geometric mean of torch's best over the chosen ({kind.replace('_', ' ')})"
        found.append(goal(what, mean, 1.7, at_least=True))
    return found


def show(models: dict[str, Any], means: dict[str, Any]) -> None:
    rows = [
        [
            name,
            of["chosen"],
            f"{of['percentiles_ms'][of['chosen']]['p50']:.2f}",
            *(f"{of['percentiles_ms'][who]['p50']:.2f}" for who in TORCH),
            shown(of["torch_best_over_chosen"]),
            shown(of["torch_best_over_chosen_fp32"]),
            shown(of["chosen_over_best"]),
        ]
        for name, of in models.items()
    ]
    header = [
        "network",
        "chosen",
        "p50 ms",
        "eager",
        "ch. last",
        "compile",
        "torch best/chosen",
        "FP32 only",
        "chosen/best",
    ]
    table(header, rows)
    for kind, mean in means.items():
        say(f"geometric mean, {kind}: {shown(mean)}")


if __name__ == "__main__":
    main()
