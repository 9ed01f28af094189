"""Any store that fsspec reaches (s3://, gs://, abfs:// ...): an object is seen whole or not at all.

Credentials and endpoints come from where each library looks for them (for S3: the AWS variables and files, AWS_ENDPOINT_URL).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tlexport.bundle.places import Advance, hashed, require_size
from tlexport.errors import NotInstalledError, RecipeError, StorageError

_TRIES = 5
_BLOCK = 8 << 20  # of one request; the library reads one ahead


class Remote:
    """Raises NotInstalledError without fsspec or the scheme's library, RecipeError for a URL that is none or holds a password."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if "@" in parts.netloc or "::" in url or parts.query:
            raise RecipeError(
                f"{parts.scheme}:// takes a plain URL: credentials come from the environment or the library's own files"
            )
        if not parts.netloc:
            raise RecipeError(f"{url} names no bucket or host")
        self.where = url.rstrip("/")
        self.system, self.root = _opened(self.where, parts.scheme)

    def files(self, folder: str) -> dict[str, int]:
        base = self._path(folder)
        with self._refusals():
            found = self.system.find(base, detail=True)
        return {
            name[len(base) :].lstrip("/"): int(info["size"])
            for name, info in found.items()
            if info["type"] == "file" and name != base
        }

    def read(self, name: str, most: int) -> bytes | None:
        with self._refusals():
            try:
                with self.system.open(self._path(name), "rb") as handle:
                    content: bytes = handle.read(most + 1)
            except FileNotFoundError:
                return None
        require_size(f"{self.where}/{name}", len(content), most)
        return content

    def digest(self, name: str, most: int, advance: Advance) -> str | None:
        with self._refusals():
            try:
                with self.system.open(self._path(name), "rb", block_size=_BLOCK) as handle:
                    return hashed(handle, f"{self.where}/{name}", most, _BLOCK, advance)
            except FileNotFoundError:
                return None

    def create(self, name: str, content: bytes) -> bool:
        """By the store's own condition (S3: If-None-Match), where it has one."""
        with self._refusals():
            try:
                self.system.pipe_file(self._path(name), content, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if "PreconditionFailed" in repr(error) or "ConditionalRequestConflict" in repr(error):
                    return False
                raise
        return True

    def write(self, name: str, content: bytes) -> None:
        with self._refusals():
            self.system.pipe_file(self._path(name), content)

    def put(self, name: str, source: Path, advance: Advance) -> None:
        with self._refusals():
            self.system.put_file(str(source), self._path(name), callback=_callback(advance))

    def get(self, name: str, destination: Path, most: int, advance: Advance) -> None:
        path = self._path(name)
        with self._refusals():
            try:
                size = int(self.system.info(path)["size"])
            except FileNotFoundError as error:
                raise StorageError(f"{self.where} has no {name}") from error
            require_size(f"{self.where}/{name}", size, most)
            self.system.get_file(path, str(destination), callback=_callback(advance))

    def remove(self, folder: str) -> None:
        with self._refusals(), contextlib.suppress(FileNotFoundError):
            self.system.rm(self._path(folder), recursive=True)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Nobody is kept out: here each model has a configuration of its own, replaced at once."""
        return contextlib.nullcontext()

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}".rstrip("/") if name else self.root

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """The library's own exceptions, in one line of ours; what it was told to send is not in it."""
        try:
            yield
        except StorageError:
            raise
        except Exception as error:  # fsspec's systems share no narrower base
            raise _refusal(self.where, error) from error


def _opened(url: str, scheme: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise NotInstalledError(f"fsspec, which reaches {scheme}://,", "deploy") from error
    options = (
        {"config_kwargs": {"retries": {"max_attempts": _TRIES, "mode": "standard"}}} if scheme == "s3" else {}
    )
    try:
        system, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except ImportError as error:
        raise NotInstalledError(f"the library for {scheme}:// ({error})", "deploy") from error
    except ValueError as error:
        raise RecipeError(f"{scheme}:// is no store that fsspec knows ({error})") from error
    except Exception as error:  # some connect at once, and share no narrower base
        raise _refusal(url, error) from error
    return system, root.rstrip("/")


def _refusal(where: str, error: Exception) -> StorageError:
    told = " ".join(str(error).split())[:200] or type(error).__name__
    return StorageError(f"{where} cannot be used: {told}")


def _callback(advance: Advance) -> Any:
    import fsspec

    class Moved(fsspec.callbacks.Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            advance(inc)

    return Moved()
