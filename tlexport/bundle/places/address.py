"""What `--to` says: a layout and a place, a registry, or an archive."""

from __future__ import annotations

from dataclasses import dataclass

from tlexport.errors import RecipeError

LAYOUTS = ("triton", "kserve", "ort", "ovms", "ray")
FORMS = (
    "triton:PATH_OR_URL (or the bare path or URL), triton-python:..., kserve:..., ort:DIR, ovms:DIR, ray:DIR, "
    "bundle:PATH_OR_URL, FILE.tar, oci://REGISTRY/REPOSITORY:TAG"
)


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
    if to.endswith(".tar") and "://" not in to:
        return Address("tar", to.removeprefix("bundle:"))
    kind, separator, where = to.partition(":")
    if not separator or where.startswith("//"):
        kind, where = "triton", to
    flavour = ""
    if kind == "triton-python":
        kind, flavour = "triton", "python"
    if kind not in (*LAYOUTS, "bundle") or not where.strip():
        raise RecipeError(f"{to!r} is no place to deploy to; there are: {FORMS}")
    return Address(kind, where.rstrip("/") or "/", flavour)
