"""The application that the commands are added to."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tlexport import __version__

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
