"""Where a deployed model goes: a folder, any store that fsspec reaches, a registry; and versions on top of the first two."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol

from tlexport.errors import StorageError

Advance = Callable[[int], None]
"""Called with the number of bytes just moved."""


class Store(Protocol):
    """Files by relative name, `/` between folders. Each write is seen whole or not at all.

    Raises StorageError where the store refuses, naming it by `where`, which holds no credentials.
    """

    where: str

    def files(self, folder: str) -> dict[str, int]:
        """Every file below `folder`, by its name below it -> bytes; empty if there is none."""

    def read(self, name: str, most: int) -> bytes | None:
        """None if it is not there. Raises StorageError beyond `most` bytes."""

    def create(self, name: str, content: bytes) -> bool:
        """False if it is there already; of several callers at once one gets True."""

    def write(self, name: str, content: bytes) -> None:
        """Replace it at once."""

    def digest(self, name: str, most: int, advance: Advance) -> str | None:
        """SHA-256, read a block at a time; None if it is not there. Raises StorageError beyond `most` bytes."""

    def put(self, name: str, source: Path, advance: Advance) -> None: ...

    def get(self, name: str, destination: Path, most: int, advance: Advance) -> None:
        """Raises StorageError if there is none, or beyond `most` bytes."""

    def remove(self, folder: str) -> None:
        """A folder or file with all below it; nothing happens if it is not there."""

    def alone(self) -> AbstractContextManager[None]:
        """Among deployers who share a configuration, where the place can keep them apart."""


def require_size(what: str, size: int, most: int) -> None:
    """Raises StorageError for a file of `size` bytes, or of that many so far, beyond `most`."""
    if size > most:
        raise StorageError(f"{what} is larger than it can be ({most} bytes)")


def hashed(handle: IO[bytes], what: str, most: int, block: int, advance: Advance) -> str:
    """SHA-256 of what is read `block` bytes at a time. Raises StorageError beyond `most` bytes."""
    whole, size = hashlib.sha256(), 0
    while content := handle.read(block):
        size += len(content)
        require_size(what, size, most)
        whole.update(content)
        advance(len(content))
    return whole.hexdigest()


def store(place: str) -> Store:
    """The store at a folder's path or a URL. Raises RecipeError for a URL that is none, or holds credentials."""
    if "://" in place and not place.startswith("file://"):
        from tlexport.bundle.places import remote

        return remote.Remote(place)
    from tlexport.bundle.places import folder

    return folder.Folder(Path(place.removeprefix("file://")).expanduser())
