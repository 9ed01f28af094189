"""The embedded server."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tlexport.cli import show
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

if TYPE_CHECKING:
    from tlexport.results import ServeResult


@app.command(
    epilog="Example: tlexport serve bundles/cxr\n\n"
    "Example: tlexport serve bundles/cxr --port 0 --grpc-port 0 --ports-file ports.json\n\n"
    "Example: tlexport serve bundles/cxr --host 0.0.0.0 --token-file token --tls-cert cert.pem --tls-key key.pem"
)
def serve(
    bundle: Annotated[
        Path, typer.Argument(help="A bundle, as made by build or package.", show_default=False)
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need a token and TLS.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="For HTTP; 0: any that is free.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="For gRPC; 0: any that is free.")] = 8001,
    no_grpc: Annotated[bool, typer.Option("--no-grpc", help="HTTP alone.")] = False,
    ports_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON file to write the bound addresses to.", show_default=False),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="Whose variant to serve; default: cpu, or the bundle's only one.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Of each worker; default: the cores, shared out.", show_default=False),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Batches run at a time, each with the model loaded for itself.")
    ] = 1,
    max_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples a worker takes at once, as many as the bundle allows at most; default: the knee that bench found.",
            show_default=False,
        ),
    ] = None,
    max_delay: Annotated[
        float, typer.Option(min=0, max=10_000, help="Milliseconds a request may wait for others to join it.")
    ] = 0.0,
    queue: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples that may wait; more are refused (429). Default: 0.1 s of work.",
            show_default=False,
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, max=3600, help="Seconds a request may take; it may ask for less.")
    ] = 30.0,
    connections: Annotated[int, typer.Option(min=1, max=65536, help="Open at a time.")] = 1024,
    drain_seconds: Annotated[
        float, typer.Option(min=0, max=3600, help="For what is under way when the server is stopped.")
    ] = 30.0,
    no_watch: Annotated[
        bool, typer.Option("--no-watch", help="Look for a new version on SIGHUP alone.")
    ] = False,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Holds the token that callers must show; else the variable TLEXPORT_TOKEN.",
            show_default=False,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Certificate chain in PEM.", show_default=False)
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its private key in PEM.", show_default=False)
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback without a token or TLS.")
    ] = False,
    access_log: Annotated[bool, typer.Option("--access-log", help="A log line for each request.")] = False,
    public_key: PublicKey = None,
    trust_unsigned: TrustUnsigned = False,
    identity: Identity = None,
    identity_provider: IdentityProvider = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Serve a bundle by the Open Inference Protocol v2, over HTTP and gRPC, on this machine.

    It listens once the bundle passed its preflight and its golden samples came out right. A new version in the bundle's place
    is taken up the same way, without a failed request; a bad one is refused and the old one stays. SIGTERM or Ctrl-C: what is
    under way is answered, then it leaves. The log is JSON on standard error.
    """
    from tlexport.serving import token
    from tlexport.serving.place import Place
    from tlexport.stages import serve as stage

    how = stage.Serving(
        target=target,
        threads=threads,
        workers=workers,
        max_batch=max_batch,
        max_delay=max_delay / 1e3,
        queue=queue,
        timeout=timeout,
        access_log=access_log,
        token=token.read(token_file, shortest=token.SHORTEST),
        insecure=insecure,
        trust=trust(public_key, trust_unsigned, identity, identity_provider),
    )
    place = Place(
        host=host,
        port=port,
        grpc_port=None if no_grpc else grpc_port,
        certificate=tls_cert,
        key=tls_key,
        connections=connections,
        drain_seconds=drain_seconds,
        watch=not no_watch,
        ports_file=ports_file,
    )
    if not stage.run(bundle, place, how, _ready):
        sys.stdout.flush()
        os._exit(0)


def _ready(bound: ServeResult) -> None:
    show.result(
        bound,
        show.pairs(
            {
                "model": f"{bound.model}, version {bound.version}",
                "http": bound.http,
                "grpc": bound.grpc or "off",
            }
        ),
    )
