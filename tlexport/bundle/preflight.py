"""What is asked of a bundle before anything of it is deserialised: may it be trusted, and can it run here?

Every reader of a bundle comes through `check`. All reasons against it are told at once, each with its kind. A graph is data:
it may be run from a bundle whose hashes hold. An engine or a compiled library is code: it is loaded only where a signature
was verified, or where the caller says outright that it is trusted unsigned. The files are those of the moment of the check:
keep a bundle where only those can write who may change what runs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tlexport.bundle import fit, manifest, names, signing
from tlexport.bundle.manifest import NAME, SIGNATURE, Manifest
from tlexport.errors import PreflightError
from tlexport.results import Refusal, TargetFit, VerifyBundleResult
from tlexport.run import digest

LARGEST_FILE = 32 << 30  # bytes
LARGEST_BUNDLE = 128 << 30
LARGEST_SIGNATURE = 4 << 20
MOST_FILES = 10_000


@dataclass(frozen=True)
class Trust:
    """What is held to be trustworthy: who holds a key or an identity, or, with `unsigned`, whoever wrote the bundle.

    `identity` and `provider` are those of a keyless signature: who signed, and which OpenID Connect issuer says so.
    """

    public_key: Path | None = None
    unsigned: bool = False
    identity: str | None = None
    provider: str | None = None

    @property
    def verifies(self) -> bool:
        """Whether there is anything to check a signature by."""
        return self.public_key is not None or self.identity is not None


NOBODY = Trust()


def check(bundle: Path, *, trust: Trust = NOBODY, target: str | None = None) -> Manifest:
    """The manifest of a bundle that is as packaged and, if a `target` is named, may and can be loaded for it here.

    Without a target nothing is said about loading: `by_target` says it of each. Raises PreflightError with every reason.
    """
    found = examine(bundle, trust)
    refused = found.refusals
    if found.document is not None and target is not None:
        if unknown := fit.unknown_target(found.document, target):
            refused += (unknown,)
        else:
            held = manifest.target(found.document, target)
            refused += _against(found.document, held, trust, found.signature, fit.here())
    if refused or found.document is None:
        raise PreflightError(bundle, tuple(sorted(refused, key=lambda refusal: not refusal.untrusted)))
    return found.document


def for_target(bundle: Path, wanted: str | None, *, trust: Trust = NOBODY) -> tuple[Manifest, str]:
    """The manifest of a bundle that may and can be loaded here for the target `wanted` (None: the one that manifest.target takes),
    and the target's name. Raises RecipeError for one that the bundle lacks, then PreflightError with every reason.
    """
    target = manifest.target(manifest.read(bundle), wanted)
    return check(bundle, trust=trust, target=target), target


def require_vouched(bundle: Path, document: Manifest, target: str, *, trust: Trust) -> None:
    """Of a bundle that passed `check` with this trust: whether what `target` runs may be handed to whoever loads it elsewhere.

    Raises PreflightError for code whose signature was not verified.
    """
    if refused := _unsigned(document, target, trusted=trust.verifies or trust.unsigned):
        raise PreflightError(bundle, refused)


def by_target(bundle: Path, *, trust: Trust = NOBODY) -> tuple[Manifest, dict[str, tuple[Refusal, ...]]]:
    """The manifest, and of each target why what it runs may not or cannot be loaded here (nothing: it can).

    Raises PreflightError if the bundle itself is not as packaged.
    """
    document, here = check(bundle, trust=trust), fit.here()
    signature: signing.State = "verified" if trust.verifies else "not checked"
    return document, {name: _against(document, name, trust, signature, here) for name in document.targets}


def _against(
    document: Manifest, target: str, trust: Trust, signature: signing.State, here: fit.Here
) -> tuple[Refusal, ...]:
    unsigned = _unsigned(document, target, trusted=trust.unsigned or signature == "verified")
    return (*unsigned, *fit.refusals(document, target, here))


def _unsigned(document: Manifest, target: str, *, trusted: bool) -> tuple[Refusal, ...]:
    """A graph is data; an engine or a compiled library is code, which nobody runs for a stranger."""
    entry = document.targets[target]
    if entry.variant.backend not in fit.CODE or trusted:
        return ()
    reason = (
        f"{entry.file} is code that would run as you, and nobody's signature of it was verified; "
        "give --public-key FILE, or --trust-unsigned if you know who made it"
    )
    return (Refusal(kind="unsigned", file=entry.file, reason=reason),)


def report(bundle: Path, trust: Trust = NOBODY, target: str | None = None) -> VerifyBundleResult:
    """All that `check` would refuse, for every target or for one; where the bundle itself is refused, no target is looked at.

    Raises RecipeError for a target that the bundle lacks.
    """
    found, here = examine(bundle, trust), fit.here()
    document = found.document
    wanted = [] if document is None else [manifest.target(document, target)] if target else document.targets
    return VerifyBundleResult(
        bundle=str(bundle),
        name=document.name if document else None,
        bundle_version=document.bundle_version if document else None,
        signature=found.signature,
        files=len(document.files) if document else 0,
        bytes=sum(file.bytes for file in document.files.values()) if document else 0,
        targets={
            name: _fit(
                document,
                name,
                None if found.refusals else _against(document, name, trust, found.signature, here),
            )
            for name in wanted
            if document
        },
        refusals=found.refusals,
    )


def _fit(document: Manifest, target: str, refused: tuple[Refusal, ...] | None) -> TargetFit:
    variant = document.targets[target].variant
    return TargetFit(
        variant=variant.name,
        backend=variant.backend,
        is_code=variant.backend in fit.CODE,
        loadable=None if refused is None else not refused,
        refusals=refused or (),
    )


@dataclass(frozen=True)
class Examined:
    """`document` is None where it cannot be read; `signature` as in VerifyBundleResult."""

    document: Manifest | None
    signature: signing.State
    refusals: tuple[Refusal, ...]


def examine(bundle: Path, trust: Trust = NOBODY) -> Examined:
    """Read the manifest, list the directory, hash every file and check the signature, whatever of it is refused."""
    refused: list[Refusal] = []
    document: Manifest | None = None
    try:
        document = manifest.read(bundle)
    except PreflightError as error:
        refused += error.refusals
    found = _Directory(bundle)
    refused += found.refusals
    if document is not None:
        wrong = list(_wrong_names(document)) + list(_wrong_sizes(document))
        refused += wrong
        refused += _wrong_files(bundle, document, found, {refusal.file for refusal in wrong})
    state: signing.State = "not checked" if SIGNATURE in found.files else "absent"
    if trust.verifies and not found.refusals:
        why = _wrong_signature(bundle, trust, found)
        state = "refused" if why else "verified"
        refused += [Refusal(kind="signature", file=SIGNATURE, reason=why)] if why else []
    return Examined(document, state, tuple(refused))


class _Directory:
    """What stands in a bundle's directory. No more is listed than a bundle may have."""

    def __init__(self, bundle: Path) -> None:
        self.files: dict[str, int] = {}  # regular file -> bytes
        self.refusals: list[Refusal] = []
        if bundle.is_dir():
            self._list(bundle)
        if found := names.collisions(self.files):
            self._refuse("name", found[0], f"{found[0]!r} is another name without upper and lower case")

    def _list(self, bundle: Path) -> None:
        folders, seen = [""], 0
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(bundle / folder) as entries:
                    for entry in entries:
                        seen += 1
                        if seen > 2 * MOST_FILES:
                            self._refuse("size", "", f"{bundle} holds more than {MOST_FILES} files")
                            return
                        self._add(f"{folder}{entry.name}", entry, folders)
            except OSError as error:
                self._refuse("special", folder, f"{bundle / folder} cannot be listed: {error.strerror}")

    def _add(self, name: str, entry: os.DirEntry[str], folders: list[str]) -> None:
        mode = entry.stat(follow_symlinks=False)
        if stat.S_ISLNK(mode.st_mode):
            self._refuse("link", name, f"{name} is a link")
        elif stat.S_ISDIR(mode.st_mode):
            folders.append(f"{name}/")
        elif stat.S_ISREG(mode.st_mode):
            self.files[name] = mode.st_size
            if mode.st_size > LARGEST_FILE:
                self._refuse("size", name, f"{name} is larger than any file of a bundle")
        else:
            self._refuse("special", name, f"{name} is neither a file nor a folder")

    def _refuse(self, kind: Literal["link", "special", "size", "name"], name: str, reason: str) -> None:
        self.refusals.append(Refusal(kind=kind, file=name, reason=reason))


def _wrong_names(document: Manifest) -> Iterator[Refusal]:
    own = {NAME.casefold(), SIGNATURE.casefold()}
    for name in document.files:
        why = names.problem(name) or ("names no file of a bundle" if name.casefold() in own else "")
        if why:
            yield Refusal(kind="name", file=name, reason=f"{name!r} {why}")
    for name in names.collisions(document.files):
        yield Refusal(kind="name", file=name, reason=f"{name!r} is another name without upper and lower case")
    for name in sorted({*manifest.ALWAYS} - document.files.keys()):
        yield Refusal(
            kind="unlisted", file=name, reason=f"{NAME} has no hash of what every bundle holds: {name}"
        )
    for target, entry in document.targets.items():
        for name in sorted({entry.file, entry.receipt} - document.files.keys()):
            yield Refusal(
                kind="unlisted", file=name, reason=f"{NAME} has no hash of what {target} runs: {name}"
            )


def _wrong_sizes(document: Manifest) -> Iterator[Refusal]:
    for name, file in document.files.items():
        if file.bytes > LARGEST_FILE:
            yield Refusal(kind="size", file=name, reason=f"{name} is larger than any file of a bundle")
    total = sum(file.bytes for file in document.files.values())
    if total > LARGEST_BUNDLE or len(document.files) > MOST_FILES:
        reason = (
            f"{len(document.files)} files of {total} bytes are more than a bundle holds "
            f"({MOST_FILES} files, {LARGEST_BUNDLE} bytes)"
        )
        yield Refusal(kind="size", reason=reason)


def _wrong_files(bundle: Path, document: Manifest, found: _Directory, skipped: set[str]) -> Iterator[Refusal]:
    """What differs from the manifest; what may not be opened (`skipped`, and all that is no regular file) is not."""
    for name, file in document.files.items():
        if name in skipped:
            continue
        if name not in found.files:
            yield Refusal(kind="missing", file=name, reason=f"{name} is missing")
        elif found.files[name] != file.bytes:
            reason = f"{name} was altered: it has {found.files[name]} bytes, and {file.bytes} are listed"
            yield Refusal(kind="size", file=name, reason=reason)
        elif why := _wrong_content(bundle / name, file.sha256):
            yield Refusal(kind="altered", file=name, reason=f"{name} {why}")
    for name in sorted(found.files.keys() - document.files.keys() - {NAME, SIGNATURE}):
        yield Refusal(kind="unlisted", file=name, reason=f"{name} is not in the manifest")


def _wrong_content(path: Path, sha256: str) -> str:
    try:
        return "" if digest(path) == sha256 else "was altered"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _wrong_signature(bundle: Path, trust: Trust, found: _Directory) -> str:
    """Why the signature does not hold for what stands in the directory; empty if it does."""
    if SIGNATURE not in found.files:
        return f"{bundle} has no signature ({SIGNATURE}), and a key or an identity was given to check one by"
    if found.files[SIGNATURE] > LARGEST_SIGNATURE or found.files.get(NAME, 0) > manifest.LARGEST_MANIFEST:
        return f"{SIGNATURE} is larger than any signature ({LARGEST_SIGNATURE >> 20} MiB)"
    if trust.public_key is not None:
        return signing.problem_with_key(bundle, trust.public_key)
    assert trust.identity is not None
    return signing.problem_with_identity(bundle, trust.identity, trust.provider)
