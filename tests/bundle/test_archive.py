"""An archive unpacks to the bundle that was packed, or to nothing: planted evil ones, and random damage."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pipeline import Built

from tlexport.bundle import archive, manifest, preflight
from tlexport.errors import BundleError, PreflightError
from tlexport.run import digest


def tar(path: Path, *entries: tuple[tarfile.TarInfo, bytes], format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as made:
        for entry, content in entries:
            entry.size = entry.size or len(content)
            made.addfile(entry, io.BytesIO(content.ljust(entry.size, b"\0")))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry


def refused(path: Path, folder: Path) -> str:
    """The kind of refusal; nothing is left where it was to be unpacked, nor beside."""
    before = set(folder.rglob("*"))
    with pytest.raises(PreflightError) as stopped:
        archive.unpack(path, folder / "out")
    assert set(folder.rglob("*")) == before
    assert stopped.value.untrusted
    assert str(stopped.value).startswith(f"{path} may not be trusted") and ".partial" not in str(
        stopped.value
    )
    return stopped.value.refusals[0].kind


def test_a_bundle_comes_back_as_it_was_packed(built: Built, tmp_path: Path) -> None:
    archive.pack(built.bundle, tmp_path / "a.tar")
    copied = Path(shutil.copytree(built.bundle, tmp_path / "copied"))  # other times, the same bundle
    archive.pack(copied, tmp_path / "b.tar")
    assert digest(tmp_path / "a.tar") == digest(tmp_path / "b.tar")
    document = archive.unpack(tmp_path / "a.tar", tmp_path / "out")
    assert document == preflight.check(built.bundle) == preflight.check(tmp_path / "out")
    with tarfile.open(tmp_path / "a.tar") as made:  # any tar reads it
        assert sorted(made.getnames()) == made.getnames() == sorted({*document.files, manifest.NAME})
    archive.unpack(tmp_path / "a.tar", tmp_path / "out")  # a bundle is replaced by a whole one


def test_an_altered_bundle_is_neither_packed_nor_unpacked(bundle_copy: Path, tmp_path: Path) -> None:
    archive.pack(bundle_copy, tmp_path / "whole.tar")
    content = (tmp_path / "whole.tar").read_bytes()
    place = content.index(b'"bundle_version"')
    (tmp_path / "changed.tar").write_bytes(content[:place] + b'"bungle_version"' + content[place + 16 :])
    assert refused(tmp_path / "changed.tar", tmp_path) == "manifest"
    (bundle_copy / "golden/inputs.npy").write_bytes(b"")
    with pytest.raises(PreflightError):
        archive.pack(bundle_copy, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


@pytest.mark.parametrize(
    ("entries", "kind"),
    [
        ([(member("../evil"), b"x")], "name"),
        ([(member("/etc/evil"), b"x")], "name"),
        ([(member("a/../../evil"), b"x")], "name"),
        ([(member("C:evil"), b"x")], "name"),
        ([(member("a\\..\\evil"), b"x")], "name"),
        ([(member("nul"), b"x")], "name"),
        ([(member("a", tarfile.SYMTYPE, "/etc"), b""), (member("a/evil"), b"x")], "link"),
        ([(member("a", tarfile.LNKTYPE, "/etc/passwd"), b"")], "link"),
        ([(member("a", tarfile.CHRTYPE), b"")], "special"),
        ([(member("a", tarfile.BLKTYPE), b"")], "special"),
        ([(member("a", tarfile.FIFOTYPE), b"")], "special"),
        ([(member("a", tarfile.DIRTYPE), b"")], "special"),
        ([(member("a", tarfile.GNUTYPE_SPARSE), b"")], "special"),
        ([(member("a", tarfile.CONTTYPE), b"x")], "special"),
        ([(member("a"), b"x"), (member("a"), b"y")], "name"),
        ([(member("a"), b"x"), (member("A"), b"y")], "name"),
        ([(member("a"), b"x"), (member("a/b"), b"y")], "name"),
        ([(member("a/b"), b"x"), (member("a"), b"y")], "name"),
        ([(member("D/b"), b"x"), (member("d/c"), b"y")], "name"),
        ([(member("a"), b"x")], "manifest"),
        ([], "manifest"),
    ],
)
def test_evil_archives_are_refused_and_leave_nothing(
    tmp_path: Path, entries: list[tuple[tarfile.TarInfo, bytes]], kind: str
) -> None:
    assert refused(tar(tmp_path / "evil.tar", *entries), tmp_path) == kind


def test_extended_headers_are_refused(tmp_path: Path) -> None:
    """A PAX header may rename a file after its name was looked at, or be as long as memory."""
    entry = member("a")
    entry.pax_headers = {"path": "../evil"}
    assert refused(tar(tmp_path / "pax.tar", (entry, b"x"), format=tarfile.PAX_FORMAT), tmp_path) == "special"
    long = tar(tmp_path / "gnu.tar", (member("a" * 150), b"x"), format=tarfile.GNU_FORMAT)
    assert refused(long, tmp_path) == "special"


def test_sizes_are_believed_only_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = member("a")
    entry.size = archive.LARGEST_MEMBER * 4
    header = entry.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "vast.tar").write_bytes(header + bytes(1024))
    assert refused(tmp_path / "vast.tar", tmp_path) == "size"
    entry.size = 1 << 30
    (tmp_path / "short.tar").write_bytes(entry.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    assert refused(tmp_path / "short.tar", tmp_path) == "missing"
    monkeypatch.setattr(archive, "MOST_FILES", 3)
    many = tar(tmp_path / "many.tar", *((member(str(n)), b"x") for n in range(5)))
    assert refused(many, tmp_path) == "size"
    monkeypatch.setattr(archive, "MOST_FILES", 100)
    monkeypatch.setattr(archive, "LARGEST_BUNDLE", 1000)
    large = tar(tmp_path / "large.tar", *((member(str(n)), b"x" * 400) for n in range(5)))
    assert refused(large, tmp_path) == "size"


def test_compressed_archives_are_not_archives(built: Built, tmp_path: Path) -> None:
    import gzip

    (tmp_path / "bomb.tar.gz").write_bytes(gzip.compress(bytes(1 << 24)))
    assert refused(tmp_path / "bomb.tar.gz", tmp_path) in ("altered", "missing")


def test_what_stands_in_the_way_and_is_no_bundle_stays(built: Built, tmp_path: Path) -> None:
    archive.pack(built.bundle, tmp_path / "a.tar")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("thesis")
    with pytest.raises(BundleError, match="is not a bundle"):
        archive.unpack(tmp_path / "a.tar", tmp_path / "out")
    assert (tmp_path / "out/thesis.txt").read_text() == "thesis"


DAMAGE: dict[str, Callable[[bytearray, np.random.Generator], None]] = {
    "byte": lambda content, random: content.__setitem__(
        int(random.integers(len(content))), int(random.integers(256))
    ),
    "header": lambda content, random: content.__setitem__(
        int(random.integers(512)), int(random.integers(256))
    ),
    "cut": lambda content, random: content.__delitem__(slice(int(random.integers(len(content))), None)),
    "insert": lambda content, random: content.__setitem__(
        slice(place := int(random.integers(len(content))), place), random.bytes(int(random.integers(1, 1024)))
    ),
    "swap": lambda content, random: content.__setitem__(
        slice(place := 512 * int(random.integers(len(content) // 512 - 1)), place + 512),
        content[512 * int(random.integers(len(content) // 512)) :][:512],
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_random_damage_never_escapes_and_never_passes_for_the_bundle(
    built: Built, tmp_path: Path, damage: str
) -> None:
    """60 damaged archives each: unpacked to the very same bundle (damage in what means nothing), or refused with no trace."""
    archive.pack(built.bundle, tmp_path / "a.tar")
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "in").mkdir()
    expected, refusals = digest(built.bundle), 0
    random = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(whole)
        DAMAGE[damage](content, random)
        (tmp_path / "damaged.tar").write_bytes(content)
        try:
            archive.unpack(tmp_path / "damaged.tar", tmp_path / "in/out")
        except PreflightError:
            refusals += 1
            assert list((tmp_path / "in").iterdir()) == []
        else:
            assert digest(tmp_path / "in/out") == expected
            shutil.rmtree(tmp_path / "in/out")
    assert refusals > 30
    assert {p.name for p in tmp_path.iterdir()} == {"a.tar", "in", "damaged.tar"}
