"""pull: a bundle comes back from where it was put."""

from __future__ import annotations

import time
from pathlib import Path

from tlexport.bundle import archive, manifest, preflight
from tlexport.bundle.manifest import Manifest
from tlexport.bundle.places import address, bundles, oci, store
from tlexport.bundle.preflight import NOBODY, Trust
from tlexport.errors import PreflightError, StorageError
from tlexport.progress import Progress, byte_bar
from tlexport.results import PullResult
from tlexport.run import replacing, storage_errors


def run(source: str, out: Path, progress: Progress, *, trust: Trust = NOBODY) -> PullResult:
    """Fetch a bundle into the new directory `out`; it takes that name after it has passed preflight.

    Raises BundleError, PreflightError, StorageError, RecipeError for a source that is none.
    """
    started = time.monotonic()
    with storage_errors(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise StorageError(f"{out} exists and is left alone; name another --out")
    place = address.of_bundle(source)
    if place.kind == "tar":
        return _pulled(source, out, archive.unpack(Path(place.where), out, trust=trust), None, started)
    found = None
    with replacing(out) as partial, byte_bar(progress, "pulling", 0) as advance:
        if place.kind == "oci":
            found = oci.pull(
                place.where,
                partial,
                largest=preflight.LARGEST_BUNDLE,
                most_files=preflight.MOST_FILES,
                advance=advance,
            )
        else:
            extra = (manifest.SIGNATURE,)
            bundles.pull(
                store(place.where), partial, largest=preflight.LARGEST_BUNDLE, extra=extra, advance=advance
            )
        try:
            document = preflight.check(partial, trust=trust)
        except PreflightError as error:
            raise PreflightError(Path(source), error.refusals) from error
    return _pulled(source, out, document, found, started)


def _pulled(source: str, out: Path, document: Manifest, found: str | None, started: float) -> PullResult:
    return PullResult(
        source=source,
        bundle=str(out),
        name=document.name,
        digest=found,
        files=len(document.files),
        bytes=sum(file.bytes for file in document.files.values()),
        seconds=round(time.monotonic() - started, 2),
    )
