"""A live server: prove that it answers as the bundle does, load it to its limit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tlexport.cli import exits, show
from tlexport.cli.app import app
from tlexport.cli.options import (
    Debug,
    Identity,
    IdentityProvider,
    Json,
    JunitFile,
    PublicKey,
    Quiet,
    TrustUnsigned,
    trust,
)

if TYPE_CHECKING:
    from tlexport.results import CheckServerResult, LoadResult
    from tlexport.serving.client import Access

Url = Annotated[
    str,
    typer.Argument(
        help="http://, https://, grpc:// or grpcs://HOST:PORT of a live server.", show_default=False
    ),
]
Served = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="The bundle that it should be serving.", show_default=False)
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="As the server calls it; default: the bundle's name, or its only one.",
        show_default=False,
    ),
]
ServedTarget = Annotated[
    str | None,
    typer.Option(
        "--target", "-t", help="Whose variant it serves; default: cpu, or the only one.", show_default=False
    ),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Holds the token that the server wants; default: $TLEXPORT_TOKEN.",
        show_default=False,
    ),
]
Authority = Annotated[
    Path | None,
    typer.Option(
        "--ca", metavar="FILE", help="Certificates to trust (PEM); default: the system's.", show_default=False
    ),
]
Patience = Annotated[float, typer.Option("--timeout", min=0.01, help="Seconds to wait for an answer.")]


@app.command(
    "check-server",
    epilog="Example: tlexport check-server http://127.0.0.1:8000 bundles/cxr\n\n"
    "Example: tlexport check-server grpcs://triton:8001 bundles/cxr --ca ca.pem --model cxr --target l4 --json\n\n"
    "Example: tlexport check-server http://127.0.0.1:8000 bundles/cxr --previous bundles/cxr-1.1 --junit server.xml",
)
def check_server(
    url: Url,
    bundle: Served,
    model: ModelName = None,
    target: ServedTarget = None,
    samples: Annotated[int, typer.Option(min=0, help="Samples of the shuffled stream; 0: none.")] = 256,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Connections of the stream.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the stream.")] = 0,
    previous: Annotated[
        list[Path] | None,
        typer.Option(
            help="An earlier bundle, to be recognised in the answers; repeatable.", show_default=False
        ),
    ] = None,
    junit: JunitFile = None,
    token_file: TokenFile = None,
    ca: Authority = None,
    timeout: Patience = 30.0,
    public_key: PublicKey = None,
    trust_unsigned: TrustUnsigned = False,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Is it the same model behind the server? The golden samples one by one, in batches and shuffled over several connections,
    held against the reference and, bit by bit, against this machine's session. Other answers are traced to a mistake.

    Exit 10 if the server answers otherwise, 14 if that cannot be told, 15 if it cannot be reached.
    """
    from tlexport.evidence import junit as junit_xml
    from tlexport.evidence.live import cases
    from tlexport.stages import check_server as stage

    ask = stage.Ask(
        model=model,
        target=target,
        samples=samples,
        concurrency=concurrency,
        seed=seed,
        previous=tuple(previous or ()),
    )
    with junit_xml.kept(junit, "check-server") as keep:
        trusted = trust(public_key, trust_unsigned, identity, identity_provider)
        result = stage.run(url, bundle, ask, _access(token_file, ca, timeout), show.progress(), trust=trusted)
        keep(cases.of_check(result))
    show.result(result, show.pairs(_checked(result)))
    exits.fail(stage.failure(result))


@app.command(
    epilog="Example: tlexport load http://127.0.0.1:8000 bundles/cxr --rate 500 --seconds 30\n\n"
    "Example: tlexport load http://127.0.0.1:8000 bundles/cxr --rate 500 --max-p99 20 --json\n\n"
    "Example: tlexport load grpc://127.0.0.1:8001 bundles/cxr --max-p99 20"
)
def load(
    url: Url,
    bundle: Served,
    rate: Annotated[
        float | None,
        typer.Option(
            min=1e-6, max=1e6, help="Requests a second that arrive whatever happens.", show_default=False
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=1e6, help="How long, or a probe at most.")] = 10.0,
    arrivals: Annotated[str, typer.Option(help="poisson or fixed.")] = "poisson",
    concurrency: Annotated[
        int, typer.Option(min=1, max=1024, help="Connections: so many requests can be under way.")
    ] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Samples a request.")] = 1,
    max_p99: Annotated[
        float | None,
        typer.Option(
            min=1e-6,
            max=1e6,
            help="Milliseconds. With --rate: exit 13 if the p99 of all requests is over it; without: find the largest rate.",
            show_default=False,
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            min=1e-3,
            max=86_400_000,
            help="Milliseconds that the server is given for a request.",
            show_default=False,
        ),
    ] = None,
    model: ModelName = None,
    target: ServedTarget = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the arrivals.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="JSON file; every request goes beside it.", show_default=False),
    ] = None,
    junit: JunitFile = None,
    token_file: TokenFile = None,
    ca: Authority = None,
    timeout: Patience = 30.0,
    public_key: PublicKey = None,
    trust_unsigned: TrustUnsigned = False,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """How much can the server take? Requests at a rate of their own, timed from their scheduled start, each answer checked.

    Exit 10 if an answer is wrong, 13 if --max-p99 is not met, 14 if that cannot be told, 15 if the server cannot be reached.
    """
    from pydantic import ValidationError

    from tlexport.errors import RecipeError
    from tlexport.evidence import junit as junit_xml
    from tlexport.evidence.live import cases
    from tlexport.stages import load as stage

    try:
        ask = stage.Ask.model_validate(
            {
                "rate": rate, "seconds": seconds, "arrivals": arrivals, "concurrency": concurrency, "batch": batch,
                "max_p99_ms": max_p99, "timeout_ms": deadline, "model": model, "target": target, "seed": seed, "out": out,
            }
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"--{first['loc'][0]}: {first['msg']}") from error
    with junit_xml.kept(junit, "load") as keep:
        trusted = trust(public_key, trust_unsigned, identity, identity_provider)
        result = stage.run(url, bundle, ask, _access(token_file, ca, timeout), show.progress(), trust=trusted)
        keep(cases.of_load(result))
    show.result(result, show.pairs(_loaded(result)))
    exits.fail(stage.failure(result))


def _access(token_file: Path | None, ca: Path | None, timeout: float) -> Access:
    from tlexport.serving import token
    from tlexport.serving.client import Access

    return Access(token=token.read(token_file), ca=ca, timeout_s=timeout)


def _checked(result: CheckServerResult) -> dict[str, str]:
    golden = result.golden
    rows = {
        "server": f"{result.url}, model {result.model}{f' version {chr(44).join(result.versions)}' if result.versions else ''}, "
        f"tensors as {result.encoding}",
        "held against": f"{result.bundle}, {result.variant}",
        "golden samples": f"{golden.samples}, from the reference at most {show.number(golden.max_abs_error, '.3g', 'not finite')} "
        f"(sample {golden.worst_sample}; limit {golden.limit:.3g})"
        + (f", {golden.flips} decided otherwise" if golden.flips is not None else ""),
        "bit by bit": ", ".join(f"{of.identical} of {of.answers} at batch {of.batch}" for of in result.bits),
    }
    if result.stream:
        rows["stream"] = (
            f"{result.requests} requests over {result.connections} connections, {result.stream.over} answers beyond the limit, "
            f"{len(result.misplaced)} to other samples"
        )
    if result.diagnosis:
        rows["looks like"] = result.diagnosis.says
    for index, suspect in enumerate(result.diagnosis.suspects if result.diagnosis else (), start=1):
        rows[f"suspect {index}"] = (
            f"{suspect.says}: explains {suspect.explained:.1%}{', fits' if suspect.fits else ''}"
        )
    rows |= {f"note {index}": note for index, note in enumerate(result.notes, start=1)}
    return {"verdict": result.verdict, **{name: text for name, text in rows.items() if text}}


def _loaded(result: LoadResult) -> dict[str, str]:
    from tlexport.evidence.latency.limits import told

    rows = {
        "server": f"{result.url}, model {result.model}, {result.connections} connections, {result.batch} samples a request, "
        f"tensors as {result.encoding}",
        "requests": ", ".join(f"{count} {kind}" for kind, count in result.counts.items()),
    }
    if result.open:
        rows["rate"] = (
            f"{result.offered_per_s:.4g}/s offered, {show.number(result.goodput_per_s, '.4g', '-')}/s answered, "
            f"{show.number(result.shed, '.1%', '-')} shed, {show.number(result.waited, '.1%', '-')} waited for a connection"
        )
    if result.served:
        rows["latency"] = "; ".join(
            told(of) for of in (result.served.p50, result.served.p90, result.served.p99)
        )
    if result.largest:
        found = show.number(result.largest.rate_per_s, ".4g", "none that was tried")
        rows["largest rate"] = f"{found}/s with a p99 within {result.largest.limit_ms:g} ms"
    rows |= {f"first {kind}": said for kind, said in result.errors.items()}
    rows |= {f"note {index}": note for index, note in enumerate(result.notes, start=1)}
    if result.verdict:
        rows["verdict"] = f"{result.verdict} {result.reason}"
    return {name: text for name, text in rows.items() if text}
