"""Is it still the same model, how fast is it, and what says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tlexport.cli import exits, show
from tlexport.cli.app import app
from tlexport.cli.options import (
    Against,
    BaselineFile,
    Debug,
    HistoryFile,
    Identity,
    IdentityProvider,
    Json,
    JunitFile,
    MarkdownFile,
    MaxDrop,
    Overrides,
    PublicKey,
    Quiet,
    RunPath,
    SaveBaseline,
    Tolerance,
    TrackerFile,
    TrustUnsigned,
    open_run,
    trust,
)
from tlexport.errors import LatencyGateError, UndecidedError

if TYPE_CHECKING:
    from tlexport.bundle.preflight import Trust
    from tlexport.results import GateResult


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
    public_key: PublicKey = None,
    trust_unsigned: TrustUnsigned = False,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
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

        beside = partial(gate_accuracy.beside, run, against, tolerance=max_drop)
        _gate(beside, junit, markdown, tracker)
        return
    _need_a_gate(junit=junit, markdown=markdown, tracker=tracker)
    from tlexport.bundle.manifest import stands_in

    if stands_in(run):
        changed = [f"gates.max_drop={max_drop}"] if max_drop is not None else []
        _verify_bundle(
            run,
            [*(overrides or []), *changed],
            trust(public_key, trust_unsigned, identity, identity_provider),
        )
        return
    opened, recipe = open_run(run, overrides, max_drop=max_drop)
    from tlexport.results import Variant
    from tlexport.stages import package
    from tlexport.stages import verify as stage

    with opened.lock():
        result = stage.run(opened, recipe, show.progress())
    reference = Variant(
        name="torch-eager",
        backend="eager",
        target="cpu",
        precision="fp32",
        metric=result.reference,
        verdict="reference",
    )
    from tlexport.console import evidence_rows

    variants = show.variants((reference,), result.variants, recipe.metric, {})
    show.result(result, variants, "", show.pairs(evidence_rows(result)))
    failed = package.failures(result.variants, [v.target for v in result.variants])
    exits.gate(failed, exits.code(failed, result.variants))


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
            max=1e6,
            help="Open loop: requests a second that arrive whatever happens, timed from their scheduled start.",
            show_default=False,
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=1e6,
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
            max=1e6,
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
    public_key: PublicKey = None,
    trust_unsigned: TrustUnsigned = False,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
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
    trusted = trust(public_key, trust_unsigned, identity, identity_provider)
    if against or baseline or save_baseline:
        _only_measured(asked)
        from tlexport import flow

        beside = partial(
            flow.latency_gate,
            path,
            show.progress(),
            against=against,
            baseline=None if baseline in (None, "auto") else Path(str(baseline)),
            save=save_baseline,
            target=target,
            tolerance=tolerance,
            seconds=seconds,
            history=history,
            trust=trusted,
        )
        _gate(beside, junit, markdown, tracker)
        return
    _need_a_gate(tolerance=tolerance, junit=junit, markdown=markdown, tracker=tracker, history=history)
    if seconds is not None:
        asked["seconds"] = seconds
    if asked or target or ((path / "manifest.json").is_file() and not (path / "recipe.yaml").is_file()):
        _measure(path, target, overrides, asked, trusted)
        return
    opened, recipe = open_run(path, overrides)
    from tlexport.stages import bench as stage
    from tlexport.stages import package

    with opened.lock():
        result = stage.run(opened, recipe, show.progress())
    show.result(
        result,
        show.variants(result.references, result.variants, recipe.metric, {}),
        f"{result.threads} threads; raw samples: {result.raw}",
    )
    failed = package.failures(result.variants, [v.target for v in result.variants])
    exits.gate(failed, exits.code(failed, result.variants))


def _measure(
    path: Path, target: str | None, overrides: list[str] | None, asked: dict[str, Any], trusted: Trust
) -> None:
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
        measure.subject(path, target, trusted), measure.Ask(batches=tuple(sizes), **asked), show.progress()
    )
    from tlexport.console import measured_rows

    show.result(found, show.pairs(measured_rows(found)))
    codes = {"fail": LatencyGateError.exit_code, "undecided": UndecidedError.exit_code}
    if found.verdict in codes:
        exits.gate({found.variant: found.reason}, codes[found.verdict])


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
    opened, recipe = open_run(run, None)
    from tlexport.stages import report as stage

    with opened.lock():
        result = stage.run(opened, recipe, show.progress(), out=out)
    rows = {
        "report": result.path,
        "size": f"{result.bytes / 1e6:.2f} MB",
        "sections": ", ".join(result.sections),
    }
    show.result(result, show.pairs(rows))


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


def _gate(
    beside: Callable[[], GateResult], junit: Path | None, markdown: str | None, tracker: Path | None
) -> None:
    """Run a gate, show and write its result, and exit with the code of what it found."""
    from tlexport.errors import RecipeError
    from tlexport.evidence import junit as junit_xml
    from tlexport.evidence.gate import outputs
    from tlexport.stages import gate

    summary = os.environ.get("GITHUB_STEP_SUMMARY") if markdown == "summary" else None
    if markdown == "summary" and not summary:
        raise RecipeError("--markdown summary: $GITHUB_STEP_SUMMARY is not set here; name a file instead")
    place = Path(summary or markdown) if markdown else None
    with junit_xml.kept(junit, "gate") as keep:
        result = beside()
        keep(outputs.cases(result))
    gate.write(result, markdown=place, tracker=tracker, append=summary is not None)
    rows: dict[str, str] = {verdict.verdict: verdict.reason for verdict in result.verdicts}
    if result.saved:
        rows["saved"] = f"baseline of {len(result.new_ms)} sessions in {result.against}"
    show.result(result, show.pairs(rows))
    exits.fail(gate.failure(result))


def _verify_bundle(bundle: Path, overrides: list[str], trusted: Trust) -> None:
    from tlexport.errors import RecipeError
    from tlexport.stages import replay

    if overrides:
        raise RecipeError(
            f"{bundle} is a bundle: its gates are packed with it ({', '.join(overrides)} can change a run's)"
        )
    result = replay.run(bundle, show.progress(), trust=trusted)
    rows = {
        target: f"{own.variant.name}: {own.verdict}, {own.reason or show.number(own.max_abs_error, '.3g', '-') + ' from the reference'}"
        f", verified {result.metric} drop at worst {show.number(own.variant.drop_high, '.4g', '-')}"
        for target, own in result.targets.items()
    }
    show.result(
        result, f"{result.name}: every hash as packaged, {result.samples} golden samples", show.pairs(rows)
    )
    exits.fail(replay.failure(result))
