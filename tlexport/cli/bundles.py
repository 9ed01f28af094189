"""What is done with a bundle."""

from __future__ import annotations

import json
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
    from tlexport.results import TargetFit


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
    show.result(
        result,
        show.pairs(
            {
                key: value if isinstance(value, str) else json.dumps(value)
                for key, value in result.summary.items()
            }
        ),
    )


@app.command(
    "verify-bundle",
    epilog="Example: tlexport verify-bundle bundles/cxr --public-key key.pub\n\n"
    "Example: tlexport verify-bundle bundles/cxr --public-key key.pub --target l4 --json",
)
def verify_bundle(
    bundle: Annotated[
        Path, typer.Argument(help="A bundle, as made by build or package.", show_default=False)
    ],
    target: Annotated[
        str | None,
        typer.Option(
            "--target", "-t", help="Exit 11 unless it may and can be loaded here.", show_default=False
        ),
    ] = None,
    junit: JunitFile = None,
    public_key: PublicKey = None,
    trust_unsigned: TrustUnsigned = False,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """May a bundle be trusted, and can it run here? Signature, names, sizes, every hash, and what each target needs.

    Nothing of it is loaded. Exit 11 if the bundle is refused, or what --target runs (without: what every target runs).
    """
    from tlexport.evidence import junit as junit_xml
    from tlexport.stages import verify_bundle as stage

    with junit_xml.kept(junit, "verify-bundle") as keep:
        trusted = trust(public_key, trust_unsigned, identity, identity_provider)
        result = stage.run(bundle, trust=trusted, target=target)
        keep(stage.cases(result))
    rows = {
        "bundle": f"{result.name or 'unreadable'}, {result.files} files, {result.bytes / 1e6:.1f} MB",
        "signature": result.signature,
        **{f"{refusal.kind} {refusal.file}": refusal.reason for refusal in result.refusals},
    }
    fits = {f"target {name}": f"{fit.variant}: {_loadable(fit)}" for name, fit in result.targets.items()}
    show.result(result, show.pairs(rows), "", show.pairs(fits))
    exits.fail(stage.failure(result))


def _loadable(fit: TargetFit) -> str:
    if fit.loadable is None:
        return "not looked at: the bundle is refused"
    return "; ".join(refusal.reason for refusal in fit.refusals) or "can be loaded here"


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
    public_key: PublicKey = None,
    trust_unsigned: TrustUnsigned = False,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run a bundle's chosen variant on new raw data. Every hash of the bundle is checked before anything is loaded.

    Engines and compiled libraries are code: they are loaded with --public-key alone, or with --trust-unsigned.
    """
    from tlexport.stages import predict as stage

    trusted = trust(public_key, trust_unsigned, identity, identity_provider)
    result = stage.run(bundle, data, show.progress(), out=out, target=target, trust=trusted)
    rows = {
        "ran": f"{result.variant} on {result.provider}: {result.samples} samples in {result.seconds:.1f} s",
        **{f"decided {name}": str(count) for name, count in result.decisions.items()},
        "out": result.out,
    }
    show.result(result, show.rows(result.first), "", show.pairs(rows))


@app.command(
    epilog="Example: tlexport deploy bundles/cxr --to triton:models/ --raw\n\n"
    "Example: tlexport deploy bundles/cxr --to s3://bucket/models --public-key key.pub\n\n"
    "Example: tlexport deploy bundles/cxr --to oci://registry.example/team/cxr:1.2"
)
def deploy(
    bundle: Annotated[
        Path, typer.Argument(help="A bundle, as made by build or package.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="PLACE",
            help="triton:PATH_OR_URL (also bare), triton-python:, kserve:, ort:, ovms:, ray:, bundle: with a path or URL; oci://REGISTRY/REPO:TAG.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="Whose variant to serve; default: cpu, or the bundle's only one.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the served model; default: the bundle's.", show_default=False)
    ] = None,
    flavour: Annotated[
        str,
        typer.Option(
            help="python: Triton's python backend runs the graph, on any Triton.", show_default=False
        ),
    ] = "",
    raw: Annotated[
        bool,
        typer.Option(
            "--raw", help="Also an ensemble NAME-raw (Triton) that takes encoded images, or SMILES."
        ),
    ] = False,
    storage_uri: Annotated[
        str | None,
        typer.Option(
            help="Where a cluster finds PLACE (KServe): pvc://CLAIM/PATH, s3://...", show_default=False
        ),
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Result of bench BUNDLE --json: batches and instances from its knees.",
            show_default=False,
        ),
    ] = None,
    instances: Annotated[
        int | None,
        typer.Option(
            min=1, help="Instances of the model; default: the measured knee, or 1.", show_default=False
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Older versions to keep beside the served one, the one served before it among them; others are removed. Default: all.",
            show_default=False,
        ),
    ] = None,
    public_key: PublicKey = None,
    trust_unsigned: TrustUnsigned = False,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put a bundle where a server finds it: a new version, whole before the server sees it."""
    from tlexport.stages import deploy as stage

    options = stage.Options(
        target=target,
        name=name,
        flavour=flavour,
        raw=raw,
        storage=storage_uri,
        measured=measured,
        instances=instances,
        keep=keep,
        dry_run=dry_run,
    )
    trusted = trust(public_key, trust_unsigned, identity, identity_provider)
    result = stage.run(bundle, to, show.progress(), trust=trusted, options=options)
    done = "is there already" if result.was_there else "would be deployed" if dry_run else "deployed"
    before = f", before it {result.previous}" if result.previous else ""
    rows = {
        result.name: f"{done} at {result.place}",
        **({"version": f"{result.version}{before}"} if result.version else {}),
        **({"models": ", ".join(result.models)} if result.models else {}),
        **({"variant": f"{result.variant} for {result.target}"} if result.variant else {}),
        **({"digest": result.digest} if result.digest else {}),
        "files": f"{result.files}, {result.bytes / 1e6:.1f} MB",
        **(
            {"removed": f"half-written versions {', '.join(map(str, result.removed))}"}
            if result.removed
            else {}
        ),
        **(
            {
                "would be pruned"
                if dry_run
                else "pruned": f"older versions {', '.join(map(str, result.pruned))}"
            }
            if result.pruned
            else {}
        ),
        **{f"note {number}": note for number, note in enumerate(result.notes, start=1)},
    }
    show.result(result, show.pairs(rows))


@app.command(
    epilog="Example: tlexport rollback triton:models/ cxr\n\n"
    "Example: tlexport rollback s3://bucket/models cxr --to-version 3"
)
def rollback(
    place: Annotated[
        str, typer.Argument(metavar="PLACE", help="As given to deploy --to.", show_default=False)
    ],
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="The model; default: the only one.", show_default=False),
    ] = None,
    to_version: Annotated[
        int | None, typer.Option(min=1, help="Default: the one before what is served.", show_default=False)
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve an older version again: every SHA-256 of it is checked, then the configuration replaced; no file is moved."""
    from tlexport.stages import rollback as stage

    result = stage.run(place, name, show.progress(), version=to_version)
    rows = {
        result.name: f"version {result.version} is served at {result.place}, before it {result.before or 'none'}",
        "variant": f"{result.variant}, deployed {result.deployed}",
    }
    show.result(result, show.pairs(rows))


@app.command(
    epilog="Example: tlexport pull oci://registry.example/team/cxr:1.2 --out bundles/cxr --public-key key.pub"
)
def pull(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="oci://..., s3://..., FILE.tar or a folder.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="New directory for the bundle.", show_default=False)
    ],
    public_key: PublicKey = None,
    trust_unsigned: TrustUnsigned = False,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fetch a bundle; it is checked byte for byte before it takes its name."""
    from tlexport.stages import pull as stage

    trusted = trust(public_key, trust_unsigned, identity, identity_provider)
    result = stage.run(source, out, show.progress(), trust=trusted)
    rows = {
        result.name: f"in {result.bundle}",
        **({"digest": result.digest} if result.digest else {}),
        "files": f"{result.files}, {result.bytes / 1e6:.1f} MB, every SHA-256 as recorded",
    }
    show.result(result, show.pairs(rows))
