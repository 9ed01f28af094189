"""From a run to a bundle, in one call or stage by stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tlexport.cli import exits, show
from tlexport.cli.app import app
from tlexport.cli.options import (
    Debug,
    Json,
    MaxDrop,
    Overrides,
    Precisions,
    Quiet,
    RunPath,
    SignKey,
    SignKeyless,
    Targets,
    open_run,
    sign,
    with_flags,
)
from tlexport.errors import CompileError


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
    sign_key: SignKey = None,
    sign_keyless: SignKeyless = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built, do nothing.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Export, quantise, compile, verify, bench and package: the whole way from a run to a bundle."""
    opened, recipe = open_run(run, overrides, target, precision, max_drop)
    if dry_run:
        show.recipe(recipe)
        return
    from tlexport import flow

    signed = sign(sign_key, sign_keyless)
    with opened.lock():
        result = flow.build(
            opened,
            recipe,
            show.progress(),
            bundle=out or Path("bundles") / opened.path.resolve().name,
            sign=signed,
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
    show.result(
        result,
        show.variants(result.references, result.variants, recipe.metric, result.chosen),
        "",
        show.pairs(rows),
    )
    exits.gate(result.failed, exits.code(result.failed, result.variants))


@app.command(epilog="Example: tlexport export runs/cxr export.opset=21")
def export(
    run: RunPath, overrides: Overrides = None, json_: Json = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Make the FP32 graph, check it against eager PyTorch on real samples, keep golden samples."""
    opened, recipe = open_run(run, overrides)
    from tlexport.stages import export as stage

    with opened.lock():
        result = stage.run(opened, recipe, show.progress())
    rows = {
        f"batch {entry.batch}": f"{entry.output}: error {entry.max_abs_error:.2e}, {entry.relative:.2e} of the scale"
        for entry in result.parity
    }
    show.result(
        result,
        show.pairs(
            {"graph": f"{result.graph}, {result.size_bytes / 1e6:.1f} MB, opset {result.opset}", **rows}
        ),
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
    opened, recipe = open_run(run, asked, target, precision, max_drop)
    from tlexport.stages import quantize as stage

    with opened.lock():
        result = stage.run(opened, recipe, show.progress())
    rows = {
        info.file: f"{info.size_bytes / 1e6:.1f} MB, {', '.join(f'{d} x {n}' for d, n in info.compute.items())}"
        for info in result.graphs
    }
    rows |= {f"REFUSED {name}": why for name, why in result.refused.items()}
    show.result(result, show.pairs(rows), *(part for found in result.searches for part in show.search(found)))
    # One precision that is refused leaves the others standing; nothing but the FP32 graph is a failure.
    exits.gate(result.refused if len(result.graphs) == 1 else {})


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
    opened, recipe = open_run(run, overrides)
    from tlexport import flow

    with opened.lock():
        result = flow.explain_drop(opened, recipe, show.progress(), name=graph, samples=samples)
    steps = {
        step.step: f"error {show.number(step.noise, '.2e', 'not finite')} of the variance, {show.number(step.db, '.1f', '-')} dB, "
        f"largest {show.number(step.max_abs_error, '.2e', '-')}, flips {show.number(step.flips, 'd', '-')}"
        for step in result.steps
    }
    finite = [layer for layer in result.layers if layer.db is not None or not layer.finite]
    worst = sorted(finite, key=lambda layer: float("-inf") if layer.db is None else layer.db)[:10]
    listed = {
        layer.layer: f"{layer.operator}, {show.number(layer.db, '.1f', 'not finite')} dB" for layer in worst
    }
    show.result(result, show.pairs(steps), "", show.pairs(listed), "", result.sentence)


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
    flags = with_flags(overrides, {"compile.timeout": timeout})
    opened, recipe = open_run(run, flags, target, precision)
    from tlexport.stages import compile as stage

    with opened.lock():
        result = stage.run(opened, recipe, show.progress())
    show.result(
        result,
        show.pairs(
            {v.name: f"{v.file or v.verdict}  {v.receipt or ''}  {v.reason}" for v in result.variants}
        ),
    )
    exits.gate({v.name: v.reason for v in result.variants if v.verdict == "fail"}, CompileError.exit_code)


@app.command(
    epilog="Example: tlexport package runs/cxr --out bundles/cxr\n\n"
    "Example: tlexport package runs/cxr --sign-key key.pem --out bundles/cxr"
)
def package(
    run: RunPath,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Bundle directory; default bundles/<name of the run>.", show_default=False
        ),
    ] = None,
    sign_key: SignKey = None,
    sign_keyless: SignKeyless = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the bundle: the chosen variant of each target with its evidence. Refused without a passing verdict."""
    opened, recipe = open_run(run, None)
    from tlexport.stages import package as stage

    signed = sign(sign_key, sign_keyless)
    with opened.lock():
        result = stage.run(
            opened,
            recipe,
            show.progress(),
            out=out or Path("bundles") / opened.path.resolve().name,
            sign=signed,
        )
    show.result(
        result,
        show.pairs(
            {
                "bundle": result.bundle,
                **{f"chosen for {t}": f"{v} ({result.reasons[t]})" for t, v in result.chosen.items()},
            }
        ),
    )
