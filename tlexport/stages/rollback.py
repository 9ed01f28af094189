"""rollback: the version before is served again."""

from __future__ import annotations

from tlexport.bundle.layouts.registry import LAYOUTS
from tlexport.bundle.places import address, store, versions
from tlexport.errors import RecipeError
from tlexport.results import RollbackResult


def run(place: str, name: str | None, *, version: int | None = None) -> RollbackResult:
    """Serve the version before the one that is served, or `version`. Raises RecipeError, RunError, BundleError, StorageError."""
    where = address.parse(place)
    if where.kind not in LAYOUTS:
        raise RecipeError(
            f"{place} holds bundles, not versions that a server sees: deploy the older bundle instead"
        )
    at, layout = store(where.where), LAYOUTS[where.kind]
    held = versions.names(at)
    if name is None and len(held) != 1:
        raise RecipeError(
            f"{at.where} holds {', '.join(held)}: say which one"
            if held
            else f"{at.where} holds no deployed model"
        )
    chosen = name or held[0]
    now, before, record = versions.restore(at, layout, chosen, version)
    return RollbackResult(
        place=at.where,
        name=chosen,
        version=now,
        before=before,
        models=record.models,
        variant=record.variant,
        deployed=record.made,
    )
