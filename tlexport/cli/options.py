"""The flags that several commands share, and what they make of a call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tlexport.bundle.preflight import Trust
    from tlexport.bundle.signing import Sign
    from tlexport.recipe import Recipe
    from tlexport.run import Run


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

# What a reader of a bundle is told about whom to trust.
PublicKey = Annotated[
    Path | None,
    typer.Option(
        "--public-key",
        metavar="FILE",
        envvar="TLEXPORT_PUBLIC_KEY",
        help="Public key in PEM that the bundle's signature must hold by.",
        show_default=False,
    ),
]

TrustUnsigned = Annotated[
    bool,
    typer.Option(
        "--trust-unsigned",
        help="Load engines and compiled libraries, which run as you, from a bundle whose signature was not verified.",
    ),
]

Identity = Annotated[
    str | None,
    typer.Option(
        "--identity", help="Who must have signed the bundle, of a keyless signature.", show_default=False
    ),
]

IdentityProvider = Annotated[
    str | None,
    typer.Option(
        "--identity-provider",
        metavar="URL",
        help="OpenID Connect issuer that vouches for --identity.",
        show_default=False,
    ),
]

# What a writer of one is told about signing it.
SignKey = Annotated[
    Path | None,
    typer.Option(
        "--sign-key",
        metavar="FILE",
        help="Sign the bundle by this private key in PEM; its password: $TLEXPORT_KEY_PASSWORD.",
        show_default=False,
    ),
]

SignKeyless = Annotated[
    bool,
    typer.Option("--sign-keyless", help="Sign the bundle by your identity, over the network (Sigstore)."),
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


def trust(
    public_key: Path | None,
    unsigned: bool = False,
    identity: str | None = None,
    provider: str | None = None,
) -> Trust:
    """Raises RecipeError for flags that exclude each other, or that lack one another."""
    from tlexport.bundle.preflight import Trust
    from tlexport.errors import RecipeError

    if public_key and identity:
        raise RecipeError("--public-key is for a key's signature, --identity for a keyless one: give one")
    if (identity is None) != (provider is None):
        raise RecipeError("--identity and --identity-provider belong together: give both")
    return Trust(public_key=public_key, unsigned=unsigned, identity=identity, provider=provider)


def sign(key: Path | None, keyless: bool) -> Sign | None:
    """What signs the bundle; a key is tried now. Raises RecipeError, NotInstalledError."""
    from tlexport.bundle import signing
    from tlexport.errors import RecipeError

    if key and keyless:
        raise RecipeError("--sign-key and --sign-keyless: choose one")
    if key:
        return signing.with_key(key)
    return signing.keyless() if keyless else None


def open_run(
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


def with_flags(overrides: list[str] | None, flags: dict[str, Any]) -> list[str]:
    return [*(overrides or []), *(f"{key}={value}" for key, value in flags.items() if value is not None)]
