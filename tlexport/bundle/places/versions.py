"""Versions of a model at a place, whole before they are seen: publish one, go back to one.

NAME/N/claim.json       whoever made it first owns number N, of all models that are written together
NAME/N/...              the version's files, and its configuration
NAME/N/deployed.json    written last: with it the version is whole; it says what it is, and the size and SHA-256 of each file
CONFIG                  where the server looks (NAME/config.pbtxt ...): replaced at once, and only by a whole version's

A deployer that dies before the last step leaves a version that nobody names; the next one removes it. Two at once have
two numbers, and the configuration names one of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from tlexport.bundle.layouts import Content, Layout, Model
from tlexport.bundle.places import Advance, Store, claims
from tlexport.errors import BundleError, RunError
from tlexport.run import digest

RECORD = "deployed.json"
LARGEST_RECORD = 4 << 20
LARGEST_CONFIG = 4 << 20
_TRIES = 20


class Written(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    bytes: int


class Record(BaseModel):
    """What a whole version is. `content`: digest of the bundle's manifest and of all that was chosen for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    record_version: int = 1
    content: str
    bundle: str
    target: str
    variant: str
    models: tuple[str, ...]
    made: str
    files: dict[str, Written]


@dataclass(frozen=True)
class Published:
    version: int
    previous: int | None
    models: tuple[str, ...]
    files: int
    bytes: int
    was_there: bool
    removed: tuple[int, ...] = ()


Laid = Callable[[int, int | None], tuple[Model, ...]]
"""Version and the one served until now -> the models to write."""


def publish(
    store: Store,
    layout: Layout,
    name: str,
    laid: Laid,
    *,
    content: str,
    describes: Mapping[str, str],
    trusted: Mapping[str, str],
    advance: Advance = lambda moved: None,
) -> Published:
    """Write the next version of `name` and let the server see it.

    `laid` is called with the number that was won. `content` identifies what is deployed: where a whole version with it
    exists, that one is served and nothing is written. `trusted`: path of a file on this machine -> the SHA-256 it must
    have after it was copied. Raises BundleError if one differs, RunError if another deployer was served meanwhile,
    StorageError.
    """
    at_hand = state(store, layout, name)
    for version, record in at_hand.whole.items():
        if record.content == content:
            _check(store, record)
            _serve(
                store, layout, record, version
            )  # one that died while it did so left some of its models behind
            size = sum(own.bytes for own in record.files.values())
            return Published(version, at_hand.current, record.models, len(record.files), size, True)
    removed = _remove_orphans(store, name, at_hand)
    version = _claimed(store, name, at_hand)
    models = laid(version, at_hand.current)
    written = _write(store, layout, models, version, trusted, advance)
    record = Record(
        content=content,
        models=tuple(model.name for model in models),
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        files=written,
        **describes,
    )
    store.write(f"{name}/{version}/{RECORD}", record.model_dump_json(indent=2).encode())
    store.remove(f"{name}/{version}/{claims.NAME}")
    _serve(store, layout, record, version, newest=True)
    size = sum(own.bytes for own in written.values())
    return Published(version, at_hand.current, record.models, len(written), size, False, removed)


def restore(store: Store, layout: Layout, name: str, wanted: int | None) -> tuple[int, int | None, Record]:
    """Serve an older whole version again, `wanted` or the one before what is served: (version, before, its record).

    Raises RunError if there is none, BundleError if one of its files is not what was written.
    """
    at_hand = state(store, layout, name)
    older = [number for number in at_hand.whole if at_hand.current is None or number < at_hand.current]
    version = wanted if wanted is not None else max(older, default=None)
    if version is None or version not in at_hand.whole:
        held = ", ".join(map(str, sorted(at_hand.whole))) or "none"
        raise RunError(
            f"{store.where} has no {'version ' + str(wanted) if wanted is not None else 'older version'} of {name} to go back to "
            f"(whole versions: {held}; served: {at_hand.current or 'none'})"
        )
    record = at_hand.whole[version]
    _check(store, record)
    _serve(store, layout, record, version, backwards=True)
    return version, at_hand.current, record


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
    path = layout.config_path(name)
    configured = store.read(path, LARGEST_CONFIG)
    try:
        current = layout.served(configured, name) if configured is not None else None
    except ValueError as error:
        raise RunError(
            f"{store.where}/{path} does not say which version is served ({error}); it is not from tlexport: "
            "move it away, or choose another --name"
        ) from error
    return State(whole, tuple(sorted(numbers - whole.keys())), current)


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


def _remove_orphans(store: Store, name: str, at_hand: State) -> tuple[int, ...]:
    """Begun versions whose deployer is dead; a live one's stays, and so does what no deployer claimed."""
    removed = []
    for version in at_hand.begun:
        claim = store.read(f"{name}/{version}/{claims.NAME}", LARGEST_CONFIG)
        if claim is None or version == at_hand.current or not claims.is_dead(claim, time.time()):
            continue
        for own in _companions(name):
            store.remove(f"{own}/{version}")
        for file in store.files(f"{name}/{version}"):
            if file != claims.NAME:
                store.remove(f"{name}/{version}/{file}")
        store.remove(
            f"{name}/{version}"
        )  # the claim last: without it nobody would know that this may be removed
        removed.append(version)
    return tuple(removed)


def _companions(name: str) -> tuple[str, ...]:
    """Models that a layout may write beside `name`, under the same numbers."""
    return (f"{name}-prepare", f"{name}-raw")


def _claimed(store: Store, name: str, at_hand: State) -> int:
    """A number that nobody had: the one who creates its claim owns it."""
    first = 1 + max([*at_hand.whole, *at_hand.begun, at_hand.current or 0], default=0)
    for version in range(first, first + _TRIES):
        if store.create(f"{name}/{version}/{claims.NAME}", claims.owner()):
            return version
    raise RunError(f"{store.where}: {_TRIES} other deployers were faster with a version of {name}; try again")


def _write(
    store: Store,
    layout: Layout,
    models: tuple[Model, ...],
    version: int,
    trusted: Mapping[str, str],
    advance: Advance,
) -> dict[str, Written]:
    written = {}
    for model in models:
        files = {
            **{f"{model.name}/{path}": content for path, content in model.shared.items()},
            **{f"{model.name}/{version}/{path}": content for path, content in model.version.items()},
            f"{model.name}/{version}/{layout.CONFIG}": model.config,
        }
        for path, content in files.items():
            written[path] = _written(store, path, content, trusted, advance)
    return written


def _written(
    store: Store, path: str, content: Content, trusted: Mapping[str, str], advance: Advance
) -> Written:
    if isinstance(content, bytes):
        store.write(path, content)
        advance(len(content))
        return Written(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    store.put(path, content, advance)
    own = Written(sha256=digest(content), bytes=content.stat().st_size)
    if trusted.get(str(content), own.sha256) != own.sha256:
        raise BundleError(f"{content} was altered while it was deployed; nothing of it is served")
    return own


def _check(store: Store, record: Record) -> None:
    """By size: a place's objects are read by the server, not by us."""
    for folder in {path.partition("/")[0] for path in record.files}:
        there = store.files(folder)
        for path, own in record.files.items():
            if path.startswith(f"{folder}/") and there.get(path[len(folder) + 1 :]) != own.bytes:
                raise BundleError(
                    f"{store.where}/{path} is missing or not what was deployed; it is not served again"
                )


def _serve(
    store: Store,
    layout: Layout,
    record: Record,
    version: int,
    *,
    newest: bool = False,
    backwards: bool = False,
) -> None:
    """One replacement a model. Forwards what others need comes first, backwards last. The `newest` gives way to a newer one."""
    for name in reversed(record.models) if backwards else record.models:
        own = store.read(f"{name}/{version}/{layout.CONFIG}", LARGEST_CONFIG)
        if own is None:
            raise BundleError(f"{store.where}/{name}/{version} has no {layout.CONFIG}; it cannot be served")
        path = layout.config_path(name)
        with store.alone():
            current = store.read(path, LARGEST_CONFIG)
            now = layout.served(current, name) if current is not None else None
            if newest and now is not None and now > version:
                raise RunError(
                    f"{store.where}: another deployer's version {now} of {name} is served meanwhile; version {version} is whole "
                    f"and kept, and would be served by: tlexport rollback {store.where} {name} --to-version {version}"
                )
            if current != (new := layout.merged(current, own, name)):
                store.write(path, new)


def identity(manifest: bytes, chosen: Mapping[str, Any]) -> str:
    """SHA-256 of what is deployed: the bundle's manifest, which holds every file's hash, and how it is laid out."""
    return hashlib.sha256(manifest + json.dumps(dict(chosen), sort_keys=True).encode()).hexdigest()
