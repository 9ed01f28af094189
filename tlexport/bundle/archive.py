"""A bundle as one file: a plain tar that is the same for the same bundle, and unpacked only if it is what `pack` writes.

Nothing is taken from an archive but regular files: no links, devices, sparse files or extended headers, no compression (so
that it holds as many bytes as it unpacks to), and no name that leads elsewhere or that two files share. What is unpacked goes
through preflight beside its final name, and gets that name last.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from tlexport.bundle import manifest, names, preflight
from tlexport.bundle.manifest import NAME, SIGNATURE, Manifest
from tlexport.bundle.preflight import LARGEST_BUNDLE, LARGEST_FILE, MOST_FILES, NOBODY, Trust
from tlexport.errors import BundleError, PreflightError
from tlexport.results import Refusal
from tlexport.run import replacing, storage_errors

BLOCK = 512
LARGEST_MEMBER = 8 << 30  # bytes that the size field of a tar header can say (POSIX ustar)
_CHUNK = 1 << 20


def pack(bundle: Path, out: Path) -> Manifest:
    """Write `bundle` into the tar file `out`: names sorted, times and owners zero, so that equal bundles make equal archives.

    Raises PreflightError if the bundle is not as packaged, BundleError if a file of it does not fit into a tar.
    """
    document = preflight.check(bundle)
    inside = sorted({*document.files, NAME, *([SIGNATURE] if (bundle / SIGNATURE).is_file() else [])})
    with replacing(out) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name in inside:
            entry = tarfile.TarInfo(name)
            entry.size = (bundle / name).stat().st_size
            entry.mode = 0o644
            with (bundle / name).open("rb") as content:
                try:
                    archive.addfile(entry, content)
                except ValueError as error:
                    raise BundleError(f"{name} does not fit into a tar archive: {error}") from error
    return document


def unpack(archive: Path, out: Path, *, trust: Trust = NOBODY) -> Manifest:
    """Unpack the bundle in `archive` to the directory `out`, which is there whole and checked, or not at all.

    Raises PreflightError if the archive holds anything but a bundle as packaged (or one that `trust` refuses), BundleError
    if something that is no bundle stands at `out`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not manifest.stands_in(out):
        raise BundleError(f"{out} is not empty and is not a bundle; choose another place")
    if not archive.is_file():
        why = "it is a folder" if archive.exists() else "it is not there"
        raise BundleError(f"{archive} is no archive of a bundle ({why})")
    with storage_errors(archive), archive.open("rb") as content, replacing(out) as partial:
        partial.mkdir()
        written: list[str] = []
        total = 0
        for name, size in _members(archive, content):
            written.append(name)
            total += size
            if len(written) > MOST_FILES or total > LARGEST_BUNDLE:
                raise _refused(archive, "size", name, "it holds more than a bundle may")
            if clash := names.collisions(written) if _crowded(partial, name) else []:
                raise _refused(
                    archive, "name", name, f"{clash[0]!r} is there twice, upper and lower case aside"
                )
            _extract(archive, content, partial / name, size)
        if clash := names.collisions(written):
            raise _refused(
                archive, "name", clash[0], f"{clash[0]!r} is there twice, upper and lower case aside"
            )
        if NAME not in written:
            raise _refused(archive, "manifest", NAME, f"it holds no {NAME}: it is no archive of a bundle")
        try:
            return preflight.check(partial, trust=trust)
        except PreflightError as error:
            raise PreflightError(archive, error.refusals) from error


def _members(archive: Path, content: IO[bytes]) -> Iterator[tuple[str, int]]:
    """Name and size of each file; who asks for the next has read that many bytes and their padding."""
    while True:
        block = content.read(BLOCK)
        if block == bytes(BLOCK):
            if any(content.read(BLOCK * 64)):
                raise _refused(archive, "special", "", "something follows its end")
            return
        if len(block) != BLOCK:
            raise _refused(
                archive, "missing", "", "it ends before its end mark: it is cut off, or no tar archive"
            )
        try:
            entry = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.TarError, ValueError) as error:
            raise _refused(
                archive, "altered", "", f"it is no tar archive, or a header is damaged ({error})"
            ) from error
        if entry.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            raise _refused(archive, "link", entry.name, f"{entry.name!r} is a link")
        if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or entry.linkname:
            raise _refused(archive, "special", entry.name, f"{entry.name!r} is not a plain file")
        if why := names.problem(entry.name):
            raise _refused(archive, "name", entry.name, f"{entry.name!r} {why}")
        if not 0 <= entry.size <= min(LARGEST_FILE, LARGEST_MEMBER):
            raise _refused(archive, "size", entry.name, f"{entry.name!r} is larger than any file of a bundle")
        yield entry.name, entry.size


def _crowded(folder: Path, name: str) -> bool:
    """Whether something stands already where `name` is to be written, or a file where its folder is."""
    path = folder / name
    return path.exists() or any(parent.is_file() for parent in path.parents if parent != folder)


def _extract(archive: Path, content: IO[bytes], path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    left = size
    with path.open("xb") as file:
        while left:
            chunk = content.read(min(left, _CHUNK))
            if not chunk:
                raise _refused(archive, "missing", path.name, f"it ends in the middle of {path.name!r}")
            file.write(chunk)
            left -= len(chunk)
    if any(content.read(-size % BLOCK)):
        raise _refused(archive, "special", path.name, f"something follows {path.name!r} in its last block")


def _refused(
    archive: Path,
    kind: Literal["name", "link", "special", "size", "missing", "altered", "manifest"],
    name: str,
    reason: str,
) -> PreflightError:
    return PreflightError(archive, (Refusal(kind=kind, file=name, reason=reason),))
