"""A local folder: written beside, flushed and renamed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from tlexport.bundle.places import Advance, hashed, require_size
from tlexport.errors import StorageError
from tlexport.run import flush, storage_errors

_BLOCK = 1 << 20


class Folder:
    """Nothing is followed out of it: a link below the root is refused."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.where = str(root)

    def files(self, folder: str) -> dict[str, int]:
        base = self._path(folder)
        with _reading(base):
            found = [
                path for path in base.rglob("*") if path.is_file() and not path.name.endswith(".partial")
            ]
            return {path.relative_to(base).as_posix(): path.stat().st_size for path in found}

    def read(self, name: str, most: int) -> bytes | None:
        path = self._path(name)
        with _reading(path):
            if not path.is_file():
                return None
            require_size(str(path), path.stat().st_size, most)
            return path.read_bytes()

    def digest(self, name: str, most: int, advance: Advance) -> str | None:
        path = self._path(name)
        with _reading(path):
            if not path.is_file():
                return None
            with path.open("rb") as handle:
                return hashed(handle, str(path), most, _BLOCK, advance)

    def create(self, name: str, content: bytes) -> bool:
        """Written beside and linked: the name appears with its content."""
        path = self._path(name)
        with self._beside(path) as own:
            own.write_bytes(content)
            try:
                os.link(own, path)
            except FileExistsError:
                return False
        return True

    def write(self, name: str, content: bytes) -> None:
        path = self._path(name)
        with self._beside(path) as own:
            own.write_bytes(content)
            _rename(own, path)

    def put(self, name: str, source: Path, advance: Advance) -> None:
        path = self._path(name)
        with self._beside(path) as own:
            _copy(source, own, advance)
            _rename(own, path)

    def get(self, name: str, destination: Path, most: int, advance: Advance) -> None:
        path = self._path(name)
        with _reading(path):
            if not path.is_file():
                raise StorageError(f"{self.where} has no {name}")
            require_size(str(path), path.stat().st_size, most)
        with storage_errors(destination):
            _copy(path, destination, advance)

    def remove(self, folder: str) -> None:
        path = self._path(folder)
        with storage_errors(path):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.exists():
                path.unlink(missing_ok=True)
                flush(path.parent)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Until this process lets go, or ends in whatever way."""
        with storage_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            with (self.root / ".tlexport.lock").open("a") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                yield

    @contextlib.contextmanager
    def _beside(self, path: Path) -> Iterator[Path]:
        """A name of this call's own: two deployers may write the same file at once."""
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            own = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
            try:
                yield own
            finally:
                own.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        path = self.root / name
        with _reading(path):
            for part in (path, *path.parents):
                if part == self.root:
                    break
                if part.is_symlink():
                    raise StorageError(f"{part} is a link; what is deployed stays in {self.where}")
        return path


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot read {error.filename or path}: {error.strerror}; choose a place that this user may read and write"
        ) from error


def _copy(source: Path, destination: Path, advance: Advance) -> None:
    with source.open("rb") as reader, destination.open("wb") as writer:
        while block := reader.read(_BLOCK):
            writer.write(block)
            advance(len(block))


def _rename(own: Path, path: Path) -> None:
    """On the disk before it is seen, and seen before this returns."""
    flush(own)
    own.replace(path)
    flush(path.parent)
