"""What is done with a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tlexport.cli import exits, show
from tlexport.cli.app import app
from tlexport.cli.options import (
    Debug,
    Identity,
    IdentityProvider,
    Json,
    PublicKey,
    Quiet,
    TrustUnsigned,
    trust,
)


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
    from tlexport.stages import verify_bundle as stage

    result = stage.run(
        bundle, trust=trust(public_key, trust_unsigned, identity, identity_provider), target=target
    )
    rows = {
        "bundle": f"{result.name or 'unreadable'}, {result.files} files, {result.bytes / 1e6:.1f} MB",
        "signature": result.signature,
        **{f"{refusal.kind} {refusal.file}": refusal.reason for refusal in result.refusals},
    }
    fits = {
        f"target {name}": f"{fit.variant}: "
        + ("; ".join(r.reason for r in fit.refusals) or "can be loaded here")
        for name, fit in result.targets.items()
    }
    show.result(result, show.pairs(rows), "", show.pairs(fits))
    exits.fail(stage.failure(result))


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
