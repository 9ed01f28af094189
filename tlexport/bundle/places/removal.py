"""Versions that go: what dead deployers left half-written, and old ones that are not to be kept.

A version is removed with a claim, and its record first: what one who dies meanwhile leaves is half-written, and the next one
removes it. So nothing that looks whole ever lacks a file.
"""

from __future__ import annotations

import time

from tlexport.bundle.layouts import Layout
from tlexport.bundle.places import Store, claims
from tlexport.bundle.places.records import LARGEST_CONFIG, RECORD, Record, State, served, state
from tlexport.errors import RunError


def orphans(store: Store, name: str, at_hand: State) -> tuple[int, ...]:
    """Begun versions whose deployer is dead; a live one's stays, and so does what no deployer claimed."""
    removed = [
        version
        for version in at_hand.begun
        if version != at_hand.current and _owner_lives(store, name, version) is False
    ]
    for version in removed:
        _remove(store, name, version)
    return tuple(removed)


def prunable(
    store: Store, layout: Layout, name: str, at_hand: State, version: int, previous: int | None, keep: int
) -> tuple[int, ...]:
    """Whole versions to be removed when `version` is served: older ones, beyond `keep` of them.

    Those served before it stay in any case and count first, then the newest. What a configuration names, or a live deployer
    has claimed, stays too.
    """
    own = at_hand.whole.get(version)
    before = {previous, own.previous if own is not None else None}
    older = [number for number in sorted(at_hand.whole, reverse=True) if number < version]
    others = [number for number in older if number not in before]
    surplus = others[max(keep - (len(older) - len(others)), 0) :]
    return tuple(
        number
        for number in sorted(surplus)
        if not _is_named(store, layout, number, at_hand.whole[number])
        and not _owner_lives(store, name, number)
    )


def prune(
    store: Store, layout: Layout, name: str, version: int, previous: int | None, keep: int
) -> tuple[int, ...]:
    """Remove what is `prunable` after `version` was published, and say what was. Raises RunError, StorageError."""
    at_hand = state(store, layout, name)
    oldest = min(version, at_hand.current or version)  # whoever was faster meanwhile
    return tuple(
        number
        for number in prunable(store, layout, name, at_hand, oldest, previous, keep)
        if _removed(store, layout, name, number, at_hand.whole[number])
    )


def _removed(store: Store, layout: Layout, name: str, version: int, record: Record) -> bool:
    """Not if it is served by now. The record goes before that look, and who serves a version again looks for its record
    after that: of the two, one sees the other.
    """
    whole = f"{name}/{version}/{RECORD}"
    store.create(f"{name}/{version}/{claims.NAME}", claims.owner())  # or a dead deployer's is there
    store.remove(whole)
    if _is_named(store, layout, version, record):
        store.write(whole, record.model_dump_json(indent=2).encode())
        store.remove(f"{name}/{version}/{claims.NAME}")
        return False
    _remove(store, name, version)
    return True


def _is_named(store: Store, layout: Layout, version: int, record: Record) -> bool:
    """Whether the configuration of one of its models says so, or is somebody else's."""
    try:
        return version in [served(store, layout, own) for own in record.models]
    except RunError:
        return True


def _owner_lives(store: Store, name: str, version: int) -> bool | None:
    """None for what no deployer claimed."""
    held = store.read(f"{name}/{version}/{claims.NAME}", LARGEST_CONFIG)
    return None if held is None else not claims.is_dead(held, time.time())


def _remove(store: Store, name: str, version: int) -> None:
    """The claim last: without it nobody would know that this may be removed."""
    for own in _companions(name):
        if not {RECORD, claims.NAME} & store.files(f"{own}/{version}").keys():  # else a model of its own
            store.remove(f"{own}/{version}")
    for file in store.files(f"{name}/{version}"):
        if file != claims.NAME:
            store.remove(f"{name}/{version}/{file}")
    store.remove(f"{name}/{version}")


def _companions(name: str) -> tuple[str, ...]:
    """Models that a layout may write beside `name`, under the same numbers."""
    return (f"{name}-prepare", f"{name}-raw")
