"""What stands at a place: which versions of a model are whole, which were begun, and which one is served.

NAME/N/claim.json       whoever made it first owns number N, of all models that are written together, until it is served
NAME/N/...              the version's files, and its configuration
NAME/N/deployed.json    written last: with it the version is whole; it says what it is, and the size and SHA-256 of each file
CONFIG                  where the server looks (NAME/config.pbtxt ...): replaced at once, and only by a whole version's

A deployer that dies before the last step leaves a version that nobody names; the next one removes it. Two at once have
two numbers, and the configuration names one of them. A version is removed with a claim, and its record first, so that what
one who dies meanwhile leaves is such a version too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError

from tlexport.bundle.layouts import Layout
from tlexport.bundle.places import Store
from tlexport.errors import RunError

RECORD = "deployed.json"
LARGEST_RECORD = 4 << 20
LARGEST_CONFIG = 4 << 20


class Written(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    bytes: int


class Record(BaseModel):
    """What a whole version is. `content`: digest of the bundle's manifest and of all that was chosen for it. `previous`: the
    version that was served when it was written.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    record_version: int = 1
    content: str
    bundle: str
    target: str
    variant: str
    models: tuple[str, ...]
    made: str
    previous: int | None = None
    files: dict[str, Written]

    @property
    def bytes(self) -> int:
        return sum(own.bytes for own in self.files.values())


@dataclass(frozen=True)
class State:
    """`whole`: version -> record. `begun`: numbers that something stands under without a record."""

    whole: dict[int, Record]
    begun: tuple[int, ...]
    current: int | None


def state(store: Store, layout: Layout, name: str) -> State:
    """Raises RunError for a configuration that was changed into what names no version."""
    files = store.files(name)
    numbers = {int(part) for file in files if (part := file.partition("/")[0]).isdigit() and "/" in file}
    whole = {
        number: record
        for number in sorted(numbers)
        if f"{number}/{RECORD}" in files and (record := _record(store, f"{name}/{number}/{RECORD}"))
    }
    return State(whole, tuple(sorted(numbers - whole.keys())), served(store, layout, name))


def served(store: Store, layout: Layout, name: str) -> int | None:
    """The version that a model's configuration names. Raises RunError for one that was changed into what names none."""
    path = layout.config_path(name)
    configured = store.read(path, LARGEST_CONFIG)
    try:
        return layout.served(configured, name) if configured is not None else None
    except ValueError as error:
        raise RunError(
            f"{store.where}/{path} does not say which version is served ({error}); it is not from tlexport: "
            "move it away, or choose another --name"
        ) from error


def names(store: Store) -> tuple[str, ...]:
    """Every model that was deployed here; of those written together the one that owns their numbers."""
    found = (re.fullmatch(rf"([^/]+)/\d+/{re.escape(RECORD)}", file) for file in store.files(""))
    return tuple(sorted({match[1] for match in found if match}))


def _record(store: Store, path: str) -> Record | None:
    content = store.read(path, LARGEST_RECORD)
    try:
        return Record.model_validate_json(content) if content is not None else None
    except ValidationError as error:
        raise RunError(
            f"{store.where}/{path} is no record that this tlexport can read: {error.error_count()} mistakes"
        ) from error
