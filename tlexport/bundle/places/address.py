"""What `--to` says: a layout and a place, a registry, or an archive."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tlexport.errors import RecipeError

LAYOUTS = ("triton", "kserve", "ort", "ovms", "ray")
FORMS = (
    "triton:PATH_OR_URL (or the bare path or URL), triton-python:..., kserve:..., ort:DIR, ovms:DIR, ray:DIR, "
    "bundle:PATH_OR_URL, FILE.tar, oci://REGISTRY/REPOSITORY:TAG"
)

BUNDLES = ("bundle:PATH_OR_URL", "FILE.tar", "oci://REGISTRY/REPOSITORY:TAG")


@dataclass(frozen=True)
class Address:
    """`kind`: one of LAYOUTS, `bundle`, `tar` or `oci`. `where`: a path or a URL."""

    kind: str
    where: str
    flavour: str = ""


def parse(to: str) -> Address:
    """Raises RecipeError for what is no place."""
    if to.startswith("oci://"):
        return Address("oci", to)
    kind, where = _split(to)
    if "://" not in where:
        where = os.path.expanduser(where)  # noqa: PTH111 (an unknown user's stays as it is)
    elif not where.partition("://")[2].strip("/"):
        raise RecipeError(f"{to!r} names no bucket or host")
    if kind in ("", "bundle") and where.endswith(".tar") and "://" not in where:
        return Address("tar", where)
    flavour, kind = ("python", "triton") if kind == "triton-python" else ("", kind or "triton")
    if kind not in (*LAYOUTS, "bundle") or not where.strip():
        raise RecipeError(f"{to!r} is no place to deploy to; there are: {FORMS}")
    return Address(kind, where.rstrip("/") or "/", flavour)


def of_bundle(source: str) -> Address:
    """Where a bundle is to be fetched from: `oci`, `tar` or `bundle`, which a bare path or URL is here.

    Raises RecipeError for a server's place, and for what is none.
    """
    kind, _ = _split(source)
    if kind in (*LAYOUTS, "triton-python"):
        raise RecipeError(
            f"{source} holds what a server reads, not a bundle; pull from {', '.join(BUNDLES)} or a bare path or URL"
        )
    return parse(source if kind or source.startswith("oci://") else f"bundle:{source}")


def _split(text: str) -> tuple[str, str]:
    """What stands before the first colon, and behind it; a bare path or URL has nothing before it."""
    kind, separator, where = text.partition(":")
    return ("", text) if not separator or where.startswith("//") else (kind, where)
