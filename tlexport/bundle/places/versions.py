"""Versions of a model at a place, whole before they are seen: publish one, go back to one. What stands there: records."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tlexport.bundle.layouts import Content, Layout, Model
from tlexport.bundle.places import Advance, Store, claims, removal
from tlexport.bundle.places.records import (
    LARGEST_CONFIG,
    LARGEST_RECORD,
    RECORD,
    Record,
    State,
    Written,
    served,
    state,
)
from tlexport.errors import BundleError, RunError
from tlexport.run import digest

_TRIES = 20


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
    removed = removal.orphans(store, name, at_hand)
    first, was_there = planned(at_hand, content)
    if was_there:  # served or not: one that died while it did so left some of its models behind
        restore(store, layout, name, at_hand, first, advance=advance, backwards=False)
        store.remove(f"{name}/{first}/{claims.NAME}")
        return _published(first, at_hand.current, at_hand.whole[first], removed, was_there=True)
    version = _claimed(store, name, first)
    models = laid(version, at_hand.current)
    written = _write(store, layout, models, version, trusted, advance)
    record = Record(
        content=content,
        models=tuple(model.name for model in models),
        made=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        previous=at_hand.current,
        files=written,
        **describes,
    )
    store.write(f"{name}/{version}/{RECORD}", record.model_dump_json(indent=2).encode())
    _serve(store, layout, record, version, newest=True)
    store.remove(f"{name}/{version}/{claims.NAME}")
    return _published(version, at_hand.current, record, removed, was_there=False)


def _published(
    version: int, previous: int | None, record: Record, removed: tuple[int, ...], *, was_there: bool
) -> Published:
    return Published(version, previous, record.models, len(record.files), record.bytes, was_there, removed)


def planned(at_hand: State, content: str) -> tuple[int, bool]:
    """The version that `publish` would serve, and whether it is there already."""
    for version, record in at_hand.whole.items():
        if record.content == content:
            return version, True
    return 1 + max([*at_hand.whole, *at_hand.begun, at_hand.current or 0], default=0), False


def to_restore(store: Store, name: str, at_hand: State, wanted: int | None) -> int:
    """The whole version `wanted`, or the one served before the one that is; where that is unknown or gone, the next older one.

    Raises RunError if there is none.
    """
    version = wanted if wanted is not None else _before(at_hand)
    if version is None or version not in at_hand.whole:
        held = ", ".join(map(str, sorted(at_hand.whole))) or "none"
        raise RunError(
            f"{store.where} has no {'version ' + str(wanted) if wanted is not None else 'older version'} of {name} to go back to "
            f"(whole versions: {held}; served: {at_hand.current or 'none'})"
        )
    return version


def _before(at_hand: State) -> int | None:
    current = at_hand.whole.get(at_hand.current) if at_hand.current is not None else None
    if current is not None and current.previous in at_hand.whole:
        return current.previous
    older = (number for number in at_hand.whole if at_hand.current is None or number < at_hand.current)
    return max(older, default=None)


def restore(
    store: Store,
    layout: Layout,
    name: str,
    at_hand: State,
    version: int,
    *,
    advance: Advance = lambda moved: None,
    backwards: bool = True,
) -> None:
    """Serve a whole version again, after every byte of it was checked.

    Raises BundleError if one is not what was written, RunError if the version was removed meanwhile, StorageError.
    """
    record, before = at_hand.whole[version], at_hand.current
    _check(store, record, f"{name}/{version}", advance)
    _serve(store, layout, record, version, backwards=backwards)
    if store.read(f"{name}/{version}/{RECORD}", LARGEST_RECORD) is None:
        if before in at_hand.whole and before != version:
            _serve(store, layout, at_hand.whole[before], before, backwards=not backwards)
        raise RunError(
            f"{store.where}: another deployer removed version {version} of {name} meanwhile; choose another version"
        )


def _claimed(store: Store, name: str, first: int) -> int:
    """A number that nobody had: the one who creates its claim owns it."""
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


def _check(store: Store, record: Record, version: str, advance: Advance) -> None:
    """Sizes first, which are known before anything is read; they bound what is."""
    folders = {path.partition("/")[0] for path in record.files}
    there = {f"{folder}/{file}": size for folder in folders for file, size in store.files(folder).items()}
    sizes = (path for path, own in record.files.items() if there.get(path) != own.bytes)
    contents = (
        path for path, own in record.files.items() if store.digest(path, own.bytes, advance) != own.sha256
    )
    wrong = next(itertools.chain(sizes, contents), None)
    if wrong is not None:
        raise BundleError(
            f"{store.where}/{wrong} is missing or not what was deployed, so that {version} is not served again; "
            f"choose another version, or remove {version} and deploy its bundle anew"
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
            now = served(store, layout, name)
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
