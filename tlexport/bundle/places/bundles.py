"""A whole bundle at a store: its manifest is written last and once, so that a bundle is whole or absent there too."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from tlexport.bundle import manifest
from tlexport.bundle.manifest import File
from tlexport.bundle.places import Advance, Store, claims
from tlexport.errors import BundleError, RunError
from tlexport.run import digest


def push(bundle: Path, files: Mapping[str, File], store: Store, advance: Advance) -> bool:
    """Write every file, the manifest last: whether the very same bundle was there already.

    `files` are all of the bundle's, its manifest's too. Raises RunError if another bundle stands there or another deployer
    is at work, BundleError if a file was altered meanwhile.
    """
    own = (bundle / manifest.NAME).read_bytes()
    held = store.read(manifest.NAME, manifest.LARGEST_MANIFEST)
    if held == own:
        return True
    if held is not None:
        raise RunError(
            f"{store.where} is another bundle; choose another place: what was deployed there stays"
        )
    _claim(store)
    for name, file in files.items():
        if name != manifest.NAME:
            store.put(name, bundle / name, advance)
            if digest(bundle / name) != file.sha256:
                raise BundleError(f"{bundle / name} was altered while it was deployed")
    if not store.create(manifest.NAME, own):
        raise RunError(f"{store.where}: another deployer was faster")
    store.remove(claims.NAME)
    return False


def pull(store: Store, folder: Path, *, largest: int, extra: tuple[str, ...], advance: Advance) -> None:
    """Fetch what the manifest lists into the new `folder`, and `extra` where there is one; sizes are bounded before a byte is read.

    Raises BundleError if there is no bundle, or it is larger than `largest` bytes in all.
    """
    content = store.read(manifest.NAME, manifest.LARGEST_MANIFEST)
    if content is None:
        raise BundleError(f"{store.where} is not a bundle (no {manifest.NAME} in it)")
    folder.mkdir(parents=True)
    (folder / manifest.NAME).write_bytes(content)
    document = manifest.read(folder)
    if (total := sum(file.bytes for file in document.files.values())) > largest:
        raise BundleError(f"{store.where} has {total} bytes, at most {largest} are fetched")
    there = store.files("")
    for name in (*document.files, *(own for own in extra if own in there)):
        destination = folder / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        most = document.files[name].bytes if name in document.files else manifest.LARGEST_MANIFEST
        store.get(name, destination, most, advance)


def _claim(store: Store) -> None:
    """Of two deployers of different bundles one stops here; a dead one's place is taken over."""
    if store.create(claims.NAME, claims.owner()):
        return
    held = store.read(claims.NAME, manifest.LARGEST_MANIFEST)
    if held is not None and not claims.is_dead(held, time.time()):
        raise RunError(f"{store.where}: another deployer is at work there")
    store.remove(claims.NAME)
    if not store.create(claims.NAME, claims.owner()):
        raise RunError(f"{store.where}: another deployer is at work there")
