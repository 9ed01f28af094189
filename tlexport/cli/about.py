"""This machine, the schemas and the recipes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tlexport.cli import show
from tlexport.cli.app import app, recipes_app
from tlexport.cli.options import Debug, Json, Output, Quiet

if TYPE_CHECKING:
    from pydantic import BaseModel


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
    show.result(
        result,
        show.pairs(rows),
        "",
        show.pairs(backends),
        "",
        show.pairs(grouped),
        "",
        show.pairs(result.versions),
    )


@app.command(epilog="Example: tlexport schema build > build.schema.json")
def schema(
    name: Annotated[
        str | None, typer.Argument(help="A command's name, recipe, or bundle.", show_default=False)
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of what a command prints with --json, of recipes, or of a bundle's manifest."""
    from tlexport.bundle import manifest
    from tlexport.errors import RecipeError
    from tlexport.recipe import Recipe
    from tlexport.results import SCHEMAS

    models: dict[str, type[BaseModel]] = {**SCHEMAS, "recipe": Recipe}
    known = {**{key: model.model_json_schema for key, model in models.items()}, "bundle": manifest.schema}
    if name is None and Output.as_json:
        show.document({"schemas": list(known)})
    elif name is None:
        sys.stdout.write("\n".join(known) + "\n")
    elif name in known:
        sys.stdout.write(json.dumps(known[name](), indent=2) + "\n")
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
    show.result(result, show.pairs(result.recipes))


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Print a recipe as it is shipped, or resolved with --json."""
    from tlexport.recipe import find, load

    if Output.as_json:
        show.recipe(load(name))
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
    show.result(RecipesResult(recipes={source.stem: str(destination)}), str(destination))
