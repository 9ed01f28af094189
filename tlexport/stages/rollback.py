"""rollback: the version before is served again."""

from __future__ import annotations

from tlexport.bundle.layouts.registry import LAYOUTS
from tlexport.bundle.places import Store, address, records, store, versions
from tlexport.errors import RecipeError
from tlexport.progress import Progress, byte_bar
from tlexport.results import RollbackResult


def run(place: str, name: str | None, progress: Progress, *, version: int | None = None) -> RollbackResult:
    """Serve `version`, or the one that was served before the one that is. Every SHA-256 of it is checked first.

    Raises RecipeError, RunError, BundleError for a version that is not what was deployed, StorageError.
    """
    where = address.parse(place)
    if where.kind not in LAYOUTS:
        raise RecipeError(
            f"{place} holds bundles, not versions that a server sees: deploy the older bundle instead"
        )
    at, layout = store(where.where), LAYOUTS[where.kind]
    chosen = name or _only(at)
    at_hand = records.state(at, layout, chosen)
    number = versions.to_restore(at, chosen, at_hand, version)
    record = at_hand.whole[number]
    with byte_bar(progress, f"checking {chosen} {number}", record.bytes) as advance:
        versions.restore(at, layout, chosen, at_hand, number, advance=advance)
    return RollbackResult(
        place=at.where,
        name=chosen,
        version=number,
        before=at_hand.current,
        models=record.models,
        variant=record.variant,
        deployed=record.made,
    )


def _only(at: Store) -> str:
    held = records.names(at)
    if len(held) == 1:
        return held[0]
    raise RecipeError(
        f"{at.where} holds {', '.join(held)}: say which one"
        if held
        else f"{at.where} holds no deployed model"
    )
