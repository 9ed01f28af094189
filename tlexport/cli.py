"""The command line: parse, call one function, show. The only place that prints and exits."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tlexport import __version__
from tlexport.errors import CompileError, GateError, LatencyGateError, TlexportError, UndecidedError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import RenderableType

    from tlexport.console import Terminal
    from tlexport.recipe import Recipe
    from tlexport.results import GateResult, GraphSearch, Variant
    from tlexport.run import Run

app = typer.Typer(
    name="tlexport",
    help="Fine-tune a pretrained backbone, export, quantise and compile it, and prove that it is still the same model.",
    epilog="Start with: tlexport finetune digits-quickstart --out runs/digits && tlexport build runs/digits",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(
    help="List, show or copy the shipped recipes.", rich_markup_mode=None, invoke_without_command=True
)
app.add_typer(recipes_app, name="recipes")

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


class Output:
    """How this call talks: set from the flags of the command that runs."""

    as_json = False
    quiet = False
    debug = False


def _set(name: str) -> Any:
    def callback(value: bool) -> bool:
        if value:
            setattr(Output, name, True)
        return value

    return callback


Json = Annotated[
    bool,
    typer.Option(
        "--json",
        callback=_set("as_json"),
        help="One JSON object on standard output (schema: tlexport schema COMMAND).",
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", callback=_set("quiet"), help="No progress on standard error.")
]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_set("debug"), help="Show a traceback if something fails.")
]
RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="The run directory, as made by finetune.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Recipe values to override, for instance data.path=images/.",
        show_default=False,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A set of overrides that the recipe carries, for instance quick; repeatable.",
        show_default=False,
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        "-t",
        help="cpu, sm75 ... sm121, or a name such as l4 or rtx4090; repeatable.",
        show_default=False,
    ),
]
Precisions = Annotated[
    list[str] | None,
    typer.Option(
        "--precision", "-p", help="fp32, fp16, bf16, int8, fp8 or int4; repeatable.", show_default=False
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        min=0,
        max=1,
        help="Largest drop of the metric, at the interval's unfavourable end.",
        show_default=False,
    ),
]


# What `bench` and `verify` are told about a gate.
Against = Annotated[
    Path | None,
    typer.Option(
        "--against", help="Another bundle or run to be held against, side by side.", show_default=False
    ),
]
BaselineFile = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        metavar="FILE",
        help="Hold it against the baseline in this file, .json or .sqlite; auto: .tlexport/baselines.sqlite.",
        show_default=False,
    ),
]
SaveBaseline = Annotated[
    bool,
    typer.Option(
        "--save-baseline", help="Record this build as the baseline, in --baseline's file or auto's."
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=10,
        help="Share by which a build may be slower before the gate fails; default 0.05.",
        show_default=False,
    ),
]
JunitFile = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Verdicts as JUnit XML.", show_default=False)
]
MarkdownFile = Annotated[
    str | None,
    typer.Option(
        "--markdown",
        metavar="FILE",
        help="Verdicts as GitHub-flavoured markdown; summary: added to the file that $GITHUB_STEP_SUMMARY names.",
        show_default=False,
    ),
]
TrackerFile = Annotated[
    Path | None,
    typer.Option(
        "--tracker",
        metavar="FILE",
        help="The JSON that github-action-benchmark reads as customSmallerIsBetter.",
        show_default=False,
    ),
]
HistoryFile = Annotated[
    Path | None,
    typer.Option(
        "--history",
        metavar="FILE",
        help="Draw the recordings since the baseline as an SVG.",
        show_default=False,
    ),
]

RecipeName = Annotated[
    str,
    typer.Argument(
        help="A recipe file, or the name of a shipped one (tlexport recipes).", show_default=False
    ),
]
RunOut = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Run directory; default runs/<recipe name>.", show_default=False),
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Training epochs.", show_default=False)]
Seed = Annotated[
    int | None,
    typer.Option(
        min=0, help="Seed of the split, the new weights and the order of samples.", show_default=False
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the recipe, print it resolved, do nothing.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"tlexport {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: tlexport pretrain market-pretrain data.path=prices/ --out runs/market")
def pretrain(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: RunOut = None,
    sets: Sets = None,
    epochs: Epochs = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a backbone without labels, where nobody publishes one. Then: tlexport finetune ... backbone.weights=RUN"""
    from tlexport.recipe import load

    resolved = load(recipe, _with_flags(overrides, {"pretrain.epochs": epochs, "seed": seed}), sets)
    if dry_run:
        _print_recipe(resolved)
        return
    from tlexport.run import Run
    from tlexport.stages import pretrain as stage

    made = Run.create(out or Path("runs") / resolved.name, resolved)
    with made.lock():
        result = stage.run(made, resolved, _progress())
    rows = {
        "run": result.run,
        "model": f"{result.backbone}, {result.objective}, {result.epochs} epochs, best {result.best_epoch}",
        "val loss": f"{result.val_loss:.4f}   (before training {result.first_loss:.4f})",
        "time": f"{result.seconds:.0f} s, {result.samples_per_second:.0f} samples/s on {result.device}",
        "next": f"tlexport finetune RECIPE backbone.weights={result.run}",
    }
    _show(result, _pairs(rows))


@app.command(epilog="Example: tlexport finetune chest-xray data.path=pneumoniamnist.npz --out runs/cxr")
def finetune(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: RunOut = None,
    sets: Sets = None,
    strategy: Annotated[
        str | None, typer.Option(help="auto, probe, partial, full or scratch.", show_default=False)
    ] = None,
    epochs: Epochs = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a backbone by a recipe into a run directory. The same command resumes what was interrupted."""
    from tlexport.recipe import load

    flags = {"transfer.strategy": strategy, "transfer.epochs": epochs, "seed": seed}
    resolved = load(recipe, _with_flags(overrides, flags), sets)
    if dry_run:
        _print_recipe(resolved)
        return
    from tlexport.run import Run
    from tlexport.stages import tune

    made = Run.create(out or Path("runs") / resolved.name, resolved)
    with made.lock():
        result = tune(made, resolved, _progress())
    metrics = {
        f"test {name}": f"{value:.4f}   (val {result.metrics.val.get(name, float('nan')):.4f})"
        for name, value in result.metrics.test.items()
    }
    rows = {
        "run": result.run,
        "model": f"{result.backbone}, {result.strategy}, {result.epochs} epochs, best {result.best_epoch}",
        **metrics,
        **{f"baseline {b.name}": f"{b.verdict}" for b in result.baselines},
        "time": f"{result.seconds:.0f} s, {result.images_per_second:.0f} samples/s on {result.device}",
        "next": f"tlexport build {result.run}",
    }
    _show(result, result.headline, _pairs(rows)) if result.headline else _show(result, _pairs(rows))


@app.command(
    epilog="Example: tlexport build runs/cxr --target cpu --target sm89 --max-drop 0.005 --out bundles/cxr"
)
def build(
    run: RunPath,
    overrides: Overrides = None,
    target: Targets = None,
    precision: Precisions = None,
    max_drop: MaxDrop = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Bundle directory; default bundles/<name of the run>.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built, do nothing.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Export, quantise, compile, verify, bench and package: the whole way from a run to a bundle."""
    opened, recipe = _open(run, overrides, target, precision, max_drop)
    if dry_run:
        _print_recipe(recipe)
        return
    from tlexport import stages

    with opened.lock():
        result = stages.build(
            opened, recipe, _progress(), bundle=out or Path("bundles") / opened.path.resolve().name
        )
    rows = {
        f"chosen for {name}": f"{variant} ({result.reasons[name]})" for name, variant in result.chosen.items()
    }
    rows |= {f"FAILED for {name}": why for name, why in result.failed.items()}
    rows |= {f"not {name}": why for name, why in result.losers.items()}
    rows |= {
        "bundle": result.bundle or "none: a target has no passing variant",
        "report": result.report or "none",
    }
    _show(
        result, _variants(result.reference, result.variants, recipe.metric, result.chosen), "", _pairs(rows)
    )
    _gate(result.failed, _exit_code(result.failed, result.variants))


@app.command(epilog="Example: tlexport export runs/cxr export.opset=21")
def export(
    run: RunPath, overrides: Overrides = None, json_: Json = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Make the FP32 graph, check it against eager PyTorch on real samples, keep golden samples."""
    opened, recipe = _open(run, overrides)
    from tlexport.stages import export as stage

    with opened.lock():
        result = stage.run(opened, recipe, _progress())
    rows = {
        f"batch {entry.batch}": f"{entry.output}: error {entry.max_abs_error:.2e}, {entry.relative:.2e} of the scale"
        for entry in result.parity
    }
    _show(
        result,
        _pairs({"graph": f"{result.graph}, {result.size_bytes / 1e6:.1f} MB, opset {result.opset}", **rows}),
    )


@app.command(
    epilog="Example: tlexport quantize runs/cxr --precision int8 --report\n\n"
    "Example: tlexport quantize runs/cxr --max-drop 0.005 calibration.method=percentile"
)
def quantize(
    run: RunPath,
    overrides: Overrides = None,
    target: Targets = None,
    precision: Precisions = None,
    max_drop: MaxDrop = None,
    report: Annotated[
        bool, typer.Option("--report", help="Ask every layer what its low precision costs, and list them.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make the typed graphs, each the fastest found that keeps the budget on validation samples."""
    asked = [*(overrides or []), "search.report=true"] if report else overrides
    opened, recipe = _open(run, asked, target, precision, max_drop)
    from tlexport.stages import quantize as stage

    with opened.lock():
        result = stage.run(opened, recipe, _progress())
    rows = {
        info.file: f"{info.size_bytes / 1e6:.1f} MB, {', '.join(f'{d} x {n}' for d, n in info.compute.items())}"
        for info in result.graphs
    }
    rows |= {f"REFUSED {name}": why for name, why in result.refused.items()}
    _show(result, _pairs(rows), *(part for found in result.searches for part in _search(found)))
    # One precision that is refused leaves the others standing; nothing but the FP32 graph is a failure.
    _gate(result.refused if len(result.graphs) == 1 else {})


@app.command(
    "explain-drop",
    epilog="Example: tlexport explain-drop runs/cxr int8-trt\n\n"
    "Example: tlexport explain-drop runs/cxr cpu-openvino-int8 --samples 128",
)
def explain_drop(
    run: RunPath,
    graph: Annotated[
        str,
        typer.Argument(
            metavar="GRAPH", help="A typed graph (int8-trt) or a variant of it.", show_default=False
        ),
    ],
    samples: Annotated[int, typer.Option(min=2, help="Validation samples to compare on.")] = 64,
    overrides: Overrides = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Where a variant's error enters: by stage, by layer, and in one sentence."""
    opened, recipe = _open(run, overrides)
    from tlexport import stages

    with opened.lock():
        result = stages.explain_drop(opened, recipe, _progress(), name=graph, samples=samples)
    steps = {
        step.step: f"error {_or(step.noise, '.2e', 'not finite')} of the variance, {_or(step.db, '.1f', '-')} dB, "
        f"largest {_or(step.max_abs_error, '.2e', '-')}, flips {_or(step.flips, 'd', '-')}"
        for step in result.steps
    }
    finite = [layer for layer in result.layers if layer.db is not None or not layer.finite]
    worst = sorted(finite, key=lambda layer: float("-inf") if layer.db is None else layer.db)[:10]
    listed = {layer.layer: f"{layer.operator}, {_or(layer.db, '.1f', 'not finite')} dB" for layer in worst}
    _show(result, _pairs(steps), "", _pairs(listed), "", result.sentence)


@app.command(
    "compile",
    epilog="Example: tlexport compile runs/cxr --target sm89 --target sm120\n\n"
    "Example: tlexport compile runs/cxr --timeout 7200 tensorrt.workspace_mb=2048 tensorrt.tf32=true",
)
def compile_(
    run: RunPath,
    overrides: Overrides = None,
    target: Targets = None,
    precision: Precisions = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Seconds that one build may take (compile.timeout).", show_default=False
        ),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compile every (graph, backend, target) this machine can, each with a receipt of its real precisions.

    What TensorRT and TensorRT-RTX are told: tensorrt.workspace_mb, tensorrt.tf32 ... (tlexport schema recipe).
    """
    flags = _with_flags(overrides, {"compile.timeout": timeout})
    opened, recipe = _open(run, flags, target, precision)
    from tlexport.stages import compile as stage

    with opened.lock():
        result = stage.run(opened, recipe, _progress())
    _show(
        result,
        _pairs({v.name: f"{v.file or v.verdict}  {v.receipt or ''}  {v.reason}" for v in result.variants}),
    )
    _gate({v.name: v.reason for v in result.variants if v.verdict == "fail"}, CompileError.exit_code)


@app.command(
    epilog="Example: tlexport verify runs/cxr --max-drop 0.005 decision.rule=sensitivity decision.value=0.95\n\n"
    "Example: tlexport verify bundles/cxr\n\n"
    "Example: tlexport verify runs/new --against runs/old --junit gate.xml"
)
def verify(
    run: Annotated[Path, typer.Argument(metavar="PATH", help="A run, or a bundle.", show_default=False)],
    overrides: Overrides = None,
    max_drop: MaxDrop = None,
    against: Against = None,
    junit: JunitFile = None,
    markdown: MarkdownFile = None,
    tracker: TrackerFile = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Is it still the same model? Of a run: every variant on the test split, held against the reference by paired statistics.
    Of a bundle: every hash, and its golden samples on this machine.

    Exit 10 if a target has no variant that passes, 14 if too few samples decide.

    With --against RUN, what each target got is held instead against what it got in that run, on the same test split.
    """
    if against:
        from tlexport.stages import gate_accuracy

        _gate_result(gate_accuracy.beside(run, against, tolerance=max_drop), junit, markdown, tracker)
        return
    _need_a_gate(junit=junit, markdown=markdown, tracker=tracker)
    from tlexport.bundle.manifest import stands_in

    if stands_in(run):
        _verify_bundle(
            run, [*(overrides or []), *([f"gates.max_drop={max_drop}"] if max_drop is not None else [])]
        )
        return
    opened, recipe = _open(run, overrides, max_drop=max_drop)
    from tlexport.results import Variant
    from tlexport.stages import package
    from tlexport.stages import verify as stage

    with opened.lock():
        result = stage.run(opened, recipe, _progress())
    reference = Variant(
        name="torch-eager",
        backend="eager",
        target="cpu",
        precision="fp32",
        metric=result.reference,
        verdict="reference",
    )
    from tlexport.console import evidence_rows

    variants = _variants(reference, result.variants, recipe.metric, {})
    _show(result, variants, "", _pairs(evidence_rows(result)))
    failed = package.failures(result.variants, [v.target for v in result.variants])
    _gate(failed, _exit_code(failed, result.variants))


@app.command(
    epilog="Example: tlexport bench runs/cxr bench.samples=1000 bench.threads=2\n\n"
    "Example: tlexport bench bundles/vol --rate 2000 --seconds 30\n\n"
    "Example: tlexport bench bundles/vol --max-p99 5 --concurrency 2\n\n"
    "Example: tlexport bench bundles/vol --batches 1,4,16,64 --out vol-bench.json\n\n"
    "Example: tlexport bench bundles/cxr --baseline bench.json --junit gate.xml --markdown summary\n\n"
    "Example: tlexport bench bundles/new --against bundles/old --tolerance 0.02"
)
def bench(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A run, or a bundle made of one.", show_default=False)
    ],
    overrides: Overrides = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "-t", help="Whose variant to time; default: cpu, or the only one.", show_default=False
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            help="Open loop: requests a second that arrive whatever happens, timed from their scheduled start.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="How long an open loop lasts (default 10), a probe at most, or a gate measures (default 30).",
            show_default=False,
        ),
    ] = None,
    arrivals: Annotated[
        str | None, typer.Option(help="poisson (default) or fixed.", show_default=False)
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1, help="Workers, each with the model loaded for itself; default 1.", show_default=False
        ),
    ] = None,
    max_p99: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            help="Milliseconds. With --rate: exit 13 if the p99 is over it; without: find the largest rate within it.",
            show_default=False,
        ),
    ] = None,
    batches: Annotated[
        str | None,
        typer.Option(
            help="Throughput curve: batch sizes, for instance 1,8,32, each with 1, 2 ... workers.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="JSON file to write; every timed call goes beside it.", show_default=False
        ),
    ] = None,
    against: Against = None,
    baseline: BaselineFile = None,
    save_baseline: SaveBaseline = False,
    tolerance: Tolerance = None,
    junit: JunitFile = None,
    markdown: MarkdownFile = None,
    tracker: TrackerFile = None,
    history: HistoryFile = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time a run's reference and every passing variant in turns; with a bundle or a flag, the variant of one target.

    A p99 limit (--max-p99, gates.max_p99_ms) that is missed is exit 13, one that cannot be decided exit 14.
    With --baseline or --against it is a gate: what the target got is held against the baseline or the other build. Exit 13:
    slower; exit 14: undecided, also where there is no baseline yet (record one with --save-baseline).
    """
    flags = {
        "rate": rate,
        "arrivals": arrivals,
        "concurrency": concurrency,
        "max_p99_ms": max_p99,
        "batches": batches,
        "out": out,
    }
    asked = {name: value for name, value in flags.items() if value is not None}
    if against or baseline or save_baseline:
        _only_measured(asked)
        from tlexport import stages

        gated = stages.latency_gate(
            path,
            _progress(),
            against=against,
            baseline=None if baseline in (None, "auto") else Path(str(baseline)),
            save=save_baseline,
            target=target,
            tolerance=tolerance,
            seconds=seconds,
            history=history,
        )
        _gate_result(gated, junit, markdown, tracker)
        return
    _need_a_gate(tolerance=tolerance, junit=junit, markdown=markdown, tracker=tracker, history=history)
    if seconds is not None:
        asked["seconds"] = seconds
    if asked or target or ((path / "manifest.json").is_file() and not (path / "recipe.yaml").is_file()):
        _measure(path, target, overrides, asked)
        return
    opened, recipe = _open(path, overrides)
    from tlexport.stages import bench as stage
    from tlexport.stages import package

    with opened.lock():
        result = stage.run(opened, recipe, _progress())
    _show(
        result,
        _variants(result.reference, result.variants, recipe.metric, {}),
        f"{result.threads} threads; raw samples: {result.raw}",
    )
    failed = package.failures(result.variants, [v.target for v in result.variants])
    _gate(failed, _exit_code(failed, result.variants))


def _measure(path: Path, target: str | None, overrides: list[str] | None, asked: dict[str, Any]) -> None:
    """The bench of one target's variant."""
    from tlexport.errors import RecipeError
    from tlexport.stages import measure

    if overrides:
        raise RecipeError(
            f"{', '.join(overrides)}: recipe values change a run's whole bench; with a bundle or a flag use the flags "
            "(tlexport bench --help)"
        )
    try:
        sizes = [int(size) for size in asked.pop("batches", "").split(",") if size]
    except ValueError:
        raise RecipeError("--batches takes sizes and commas, for instance 1,8,32") from None
    if asked.get("arrivals") not in (None, "poisson", "fixed"):
        raise RecipeError(f"--arrivals {asked['arrivals']}: choose poisson or fixed")
    found = measure.run(
        measure.subject(path, target), measure.Ask(batches=tuple(sizes), **asked), _progress()
    )
    from tlexport.console import measured_rows

    _show(found, _pairs(measured_rows(found)))
    codes = {"fail": LatencyGateError.exit_code, "undecided": UndecidedError.exit_code}
    if found.verdict in codes:
        _gate({found.variant: found.reason}, codes[found.verdict])


@app.command(epilog="Example: tlexport package runs/cxr --out bundles/cxr")
def package(
    run: RunPath,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Bundle directory; default bundles/<name of the run>.", show_default=False
        ),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the bundle: the chosen variant of each target with its evidence. Refused without a passing verdict."""
    opened, recipe = _open(run, None)
    from tlexport.stages import package as stage

    with opened.lock():
        result = stage.run(
            opened, recipe, _progress(), out=out or Path("bundles") / opened.path.resolve().name
        )
    _show(
        result,
        _pairs(
            {
                "bundle": result.bundle,
                **{f"chosen for {t}": f"{v} ({result.reasons[t]})" for t, v in result.chosen.items()},
            }
        ),
    )


@app.command(epilog="Example: tlexport report runs/cxr --out cxr.html")
def report(
    run: RunPath,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="HTML file; default report.html in the run.", show_default=False),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what was asked, built, chosen and measured as one HTML file that needs no network and no script.

    Whether it shows test samples is the recipe's report.images; every section names the files that it was read from.
    """
    opened, recipe = _open(run, None)
    from tlexport.stages import report as stage

    with opened.lock():
        result = stage.run(opened, recipe, _progress(), out=out)
    rows = {
        "report": result.path,
        "size": f"{result.bytes / 1e6:.2f} MB",
        "sections": ", ".join(result.sections),
    }
    _show(result, _pairs(rows))


@app.command(epilog="Example: tlexport inspect bundles/cxr")
def inspect(
    path: Annotated[Path, typer.Argument(help="A bundle or a run.", show_default=False)],
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What is in a bundle or a run, and what was measured. A bundle's hashes are checked; nothing in it is loaded."""
    from tlexport.bundle.describe import describe

    result = describe(path)
    _show(
        result,
        _pairs(
            {
                key: value if isinstance(value, str) else json.dumps(value)
                for key, value in result.summary.items()
            }
        ),
    )


@app.command(
    epilog="Example: tlexport predict bundles/cxr new-scans/ --out answers.csv\n\n"
    "Example: tlexport predict bundles/credit applicants.parquet --target cpu --json"
)
def predict(
    bundle: Annotated[
        Path, typer.Argument(help="A bundle, as made by build or package.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="New raw data of the kind the model was trained on: a table, images, prices, SMILES ...",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="CSV to write: name, decision, a column a class or value.")
    ] = Path("predictions.csv"),
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="Whose variant to run; default: cpu, or the bundle's only one.",
            show_default=False,
        ),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a bundle's chosen variant on new raw data. Every hash of the bundle is checked before anything is loaded."""
    from tlexport.stages import predict as stage

    result = stage.run(bundle, data, _progress(), out=out, target=target)
    rows = {
        "ran": f"{result.variant} on {result.provider}: {result.samples} samples in {result.seconds:.1f} s",
        **{f"decided {name}": str(count) for name, count in result.decisions.items()},
        "out": result.out,
    }
    _show(result, _rows(result.first), "", _pairs(rows))


@app.command(epilog="Example: tlexport doctor --json")
def doctor(json_: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """What this machine can build and run, and what to install for the rest."""
    from tlexport.doctor import examine

    result = examine()
    backends = {
        b.name: (
            f"{b.version}  builds {', '.join(b.builds) or '-'}; runs {', '.join(b.runs) or '-'}  {b.note}"
            f"{'; options ' + ', '.join(b.options) if b.options else ''}"
            if b.installed
            else f"not installed  {b.note}"
        )
        for b in result.backends
    }
    machine = result.machine
    rows = {
        "cpu": f"{machine['cpu']}, {machine['physical_cores']} cores, {', '.join(machine['isa']) or 'no vector extensions found'}"
    }
    rows |= {"gpu": ", ".join(gpu["name"] for gpu in machine["gpus"]) or "none"}
    grouped: dict[str, str] = {}
    for state in dict.fromkeys(result.targets.values()):
        grouped[" ".join(name for name, own in result.targets.items() if own == state)] = state
    _show(result, _pairs(rows), "", _pairs(backends), "", _pairs(grouped), "", _pairs(result.versions))


@app.command(epilog="Example: tlexport schema build > build.schema.json")
def schema(
    name: Annotated[
        str | None, typer.Argument(help="A command's name, recipe, or bundle.", show_default=False)
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of what a command prints with --json, of recipes, or of a bundle's manifest."""
    from tlexport.bundle.manifest import Manifest
    from tlexport.errors import RecipeError
    from tlexport.recipe import Recipe
    from tlexport.results import SCHEMAS

    known: dict[str, type[BaseModel]] = {**SCHEMAS, "recipe": Recipe, "bundle": Manifest}
    if name is None and Output.as_json:
        _print_json({"schemas": list(known)})
    elif name is None:
        sys.stdout.write("\n".join(known) + "\n")
    elif name in known:
        sys.stdout.write(json.dumps(known[name].model_json_schema(), indent=2) + "\n")
    else:
        raise RecipeError(f"no schema {name!r} (known: {', '.join(known)})")


@recipes_app.callback()
def recipes(context: typer.Context, json_: Json = False, debug: Debug = False) -> None:
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list(json_: Json = False, debug: Debug = False) -> None:
    """The shipped recipes."""
    from tlexport.recipe import load, shipped
    from tlexport.results import RecipesResult

    result = RecipesResult(recipes={name: load(path).description for name, path in shipped().items()})
    _show(result, _pairs(result.recipes))


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Print a recipe as it is shipped, or resolved with --json."""
    from tlexport.recipe import find, load

    if Output.as_json:
        _print_recipe(load(name))
    else:
        sys.stdout.write(find(name).read_text(encoding="utf-8"))


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    to: Annotated[Path, typer.Argument(help="File or directory to write to.")] = Path(),
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Copy a shipped recipe, to change it. An existing file is left alone."""
    from tlexport.errors import StorageError
    from tlexport.recipe import find
    from tlexport.results import RecipesResult
    from tlexport.run import write_text

    source = find(name)
    destination = to / source.name if to.is_dir() else to
    if destination.exists():
        raise StorageError(f"{destination} exists and is left alone; name another file")
    write_text(destination, source.read_text(encoding="utf-8"))
    _show(RecipesResult(recipes={source.stem: str(destination)}), str(destination))


def main() -> NoReturn:
    """Run the command line; every error becomes one line and its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    arguments = sys.argv[1:] or ["--help"]
    # A mistake in the arguments is found before the flag's callback runs.
    Output.as_json = "--json" in arguments
    try:
        # Typer hands back the code of an Exit, it does not raise it.
        code = app(arguments, standalone_mode=False)
    except TlexportError as error:
        _fail(str(error), type(error).__name__, error.exit_code)
    except _Terminated:
        _fail("terminated; the same command resumes", "Terminated", TERMINATED)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:  # noqa: BLE001 (the one place where anything unforeseen ends as an exit code)
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # click's usage errors
            _fail(error.format_message(), "UsageError", error.exit_code)
        _fail(*_unforeseen(error))
    if code == INTERRUPTED:
        _fail("interrupted; the same command resumes", "Interrupted", INTERRUPTED)
    sys.exit(code or 0)


def _unforeseen(error: Exception) -> tuple[str, str, int]:
    """A full disk or a lost permission is the user's to mend, wherever it happens; the rest is ours."""
    from tlexport.run import storage_errors

    try:
        with storage_errors(Path()):
            raise error
    except TlexportError as known:
        return str(known), type(known).__name__, known.exit_code
    except Exception as unknown:  # noqa: BLE001
        return f"unexpected {type(unknown).__name__}: {unknown} (--debug shows where)", "Unexpected", 1


class _Terminated(BaseException):
    """A request to end, from SIGTERM; not an Exception, so that nothing on the way takes it for a failure."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated


def _fail(message: str, kind: str, code: int) -> NoReturn:
    if Output.debug and sys.exc_info()[0] is not None:
        traceback.print_exc()
    if Output.as_json:
        _print_json({"error": message, "kind": kind, "exit_code": code})
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    sys.exit(code)


def _need_a_gate(**flags: object) -> None:
    """Raises RecipeError if a flag that only a gate reads was given without one."""
    from tlexport.errors import RecipeError

    if given := [f"--{name}" for name, value in flags.items() if value is not None]:
        raise RecipeError(
            f"{', '.join(given)}: only a gate reads that; add --against PATH (bench: or --baseline FILE)"
        )


def _only_measured(asked: dict[str, Any]) -> None:
    """Raises RecipeError if a flag that a gate does not read was given with one."""
    from tlexport.errors import RecipeError

    if asked:
        given = ", ".join(f"--{name.removesuffix('_ms').replace('_', '-')}" for name in asked)
        raise RecipeError(
            f"{given}: a gate times a closed loop and does not read that; measure it in a call of its own"
        )


def _gate_result(result: GateResult, junit: Path | None, markdown: str | None, tracker: Path | None) -> None:
    """Show and write a gate's result, and exit with the code of what it found."""
    from tlexport.errors import RecipeError
    from tlexport.stages import gate

    summary = os.environ.get("GITHUB_STEP_SUMMARY") if markdown == "summary" else None
    if markdown == "summary" and not summary:
        raise RecipeError("--markdown summary: $GITHUB_STEP_SUMMARY is not set here; name a file instead")
    place = Path(summary or markdown) if markdown else None
    gate.write(result, junit=junit, markdown=place, tracker=tracker, append=summary is not None)
    rows: dict[str, str] = {verdict.verdict: verdict.reason for verdict in result.verdicts}
    if result.saved:
        rows["saved"] = f"baseline of {len(result.new_ms)} sessions in {result.against}"
    _show(result, _pairs(rows))
    _fail_gate(gate.failure(result))


def _fail_gate(error: TlexportError | None) -> None:
    """Exit with its code, after the result has been shown."""
    if error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(error.exit_code)


def _gate(failed: dict[str, str], code: int = GateError.exit_code) -> None:
    """Exit with `code`, after the result has been shown, if anything failed."""
    if failed:
        sys.stderr.write("error: " + "; ".join(f"{name}: {why}" for name, why in failed.items()) + "\n")
        raise typer.Exit(code)


def _exit_code(failed: dict[str, str], variants: tuple[Variant, ...]) -> int:
    """Of targets that failed, by the variant that came nearest: 13 if each has one that is only too slow, 14 if each has one
    that is that or undecided, else 10.
    """
    slow = {variant.target for variant in variants if variant.too_slow}
    undecided = {variant.target for variant in variants if variant.verdict == "undecided"}
    if failed.keys() <= slow:
        return LatencyGateError.exit_code
    return UndecidedError.exit_code if failed.keys() <= slow | undecided else GateError.exit_code


def _verify_bundle(bundle: Path, overrides: list[str]) -> None:
    from tlexport.errors import RecipeError
    from tlexport.stages import replay

    if overrides:
        raise RecipeError(
            f"{bundle} is a bundle: its gates are packed with it ({', '.join(overrides)} can change a run's)"
        )
    result = replay.run(bundle, _progress())
    rows = {
        target: f"{own.variant.name}: {own.verdict}, {own.reason or _or(own.max_abs_error, '.3g', '-') + ' from the reference'}"
        f", verified {result.metric} drop at worst {_or(own.variant.drop_high, '.4g', '-')}"
        for target, own in result.targets.items()
    }
    _show(result, f"{result.name}: every hash as packaged, {result.samples} golden samples", _pairs(rows))
    _fail_gate(replay.failure(result))


def _open(
    run: Path,
    overrides: list[str] | None,
    target: list[str] | None = None,
    precision: list[str] | None = None,
    max_drop: float | None = None,
) -> tuple[Run, Recipe]:
    """The run, and its recipe with this call's flags applied."""
    from tlexport.recipe import with_overrides
    from tlexport.run import Run

    opened = Run(run)
    flags = [f"gates.max_drop={max_drop}"] if max_drop is not None else []
    return opened, with_overrides(
        opened.recipe, [*(overrides or []), *flags], targets=target, precision=precision
    )


def _with_flags(overrides: list[str] | None, flags: dict[str, Any]) -> list[str]:
    return [*(overrides or []), *(f"{key}={value}" for key, value in flags.items() if value is not None)]


def _progress() -> Terminal:
    from tlexport.console import Terminal

    return Terminal(quiet=Output.quiet)


def _show(result: BaseModel, *parts: RenderableType) -> None:
    """The one thing on standard output: the JSON object, or its tables."""
    if Output.as_json:
        _print_json(result.model_dump(mode="json"))
        return
    from tlexport.console import results

    console = results()
    for part in parts:
        console.print(part)


def _pairs(rows: dict[str, str]) -> RenderableType:
    from tlexport.console import pairs_table

    return pairs_table(rows)


def _rows(rows: tuple[dict[str, Any], ...]) -> RenderableType:
    from tlexport.console import rows_table

    return rows_table(rows)


def _variants(
    reference: Variant, variants: tuple[Variant, ...], metric: str, chosen: dict[str, str]
) -> RenderableType:
    from tlexport.console import variants_table

    return variants_table(reference, variants, metric, chosen)


def _search(found: GraphSearch) -> list[RenderableType]:
    """How a graph was brought within the budget, and what its layers cost if they were asked."""
    rows = {
        f"{trial.step}{f', {len(trial.kept)} in FP32' if trial.kept else ''}": f"drop {_or(trial.drop, '.4g', 'not finite')}, "
        f"at worst {_or(trial.drop_high, '.4g', '-')}{'' if trial.within else ' (over)'}, {trial.low_macs:.0%} of the operations low, "
        f"cost {trial.cost_ms:.3g} ms by the model"
        for trial in found.trials
    }
    layers = {
        " ".join(
            layer.layers
        ): f"noise {_or(layer.noise, '.2e', 'not finite')}, {layer.macs:.1%} of the operations"
        f"{', left in FP32' if layer.kept else ''}"
        for layer in found.layers
    }
    title = f"{found.graph}: budget {found.budget:.4g} on {found.samples} samples, {found.evaluations:g} evaluations"
    return ["", title, _pairs(rows), *(["", _pairs(layers)] if layers else [])]


def _or(value: float | None, form: str, otherwise: str) -> str:
    return otherwise if value is None else format(value, form)


def _print_recipe(recipe: Recipe) -> None:
    if Output.as_json:
        _print_json(recipe.model_dump(mode="json"))
    else:
        sys.stdout.write(recipe.to_yaml())


def _print_json(document: dict[str, Any]) -> None:
    try:
        sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
