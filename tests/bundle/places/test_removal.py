"""Old versions go and what is served stays: which ones, whatever dies or is served meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_published_versions import ended_process, publish, restored

from tlexport.bundle.layouts import triton
from tlexport.bundle.places import claims, records, removal, store
from tlexport.errors import RunError, StorageError


def whole(place: Path) -> list[int]:
    return sorted(records.state(store(str(place)), triton, "m").whole)


def prune(place: Path, published: Any, keep: int, at: Any = None) -> tuple[int, ...]:
    return removal.prune(at or store(str(place)), triton, "m", published.version, published.previous, keep)


class Planted:
    """A store that does something before each removal, or after each write."""

    def __init__(
        self,
        place: Path,
        *,
        before_removal: Callable[[str], None] = lambda name: None,
        after_write: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.inner, self.before_removal, self.after_write = store(str(place)), before_removal, after_write

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def remove(self, folder: str) -> None:
        self.before_removal(folder)
        self.inner.remove(folder)

    def write(self, name: str, content: bytes) -> None:
        self.inner.write(name, content)
        self.after_write(name)


@pytest.mark.parametrize(
    ("keep", "goes"), [(1, (1, 2, 3)), (2, (1, 2)), (3, (1,)), (4, ()), (100, ())], ids=str
)
def test_as_many_stay_beside_the_served_one(tmp_path: Path, keep: int, goes: tuple[int, ...]) -> None:
    for number in range(5):
        published = publish(tmp_path, f"text {number}")
    at_hand = records.state(store(str(tmp_path)), triton, "m")
    assert removal.prunable(store(str(tmp_path)), triton, "m", at_hand, 5, 4, keep) == goes
    assert prune(tmp_path, published, keep) == goes
    assert whole(tmp_path) == [number for number in range(1, 6) if number not in goes]
    assert not any((tmp_path / f"m/{number}").exists() for number in goes)
    assert (tmp_path / "m/labels").exists() and not list(tmp_path.rglob("claim.json"))


def test_what_was_served_before_stays_and_counts_first(tmp_path: Path) -> None:
    """1, 2, 3 and back to 1: 4 keeps 1 alone, and goes back to it in one command; and so when it is deployed once more."""
    for text in ("one", "two", "three"):
        publish(tmp_path, text)
    restored(store(str(tmp_path)), 1)
    published = publish(tmp_path, "four")
    again = publish(tmp_path, "four")
    assert again.was_there and again.previous == 4
    assert prune(tmp_path, again, 1) == (2, 3) and whole(tmp_path) == [1, 4]
    assert prune(tmp_path, published, 1) == ()
    assert restored(store(str(tmp_path))) == (1, 4)


def test_what_was_served_until_now_stays_too(tmp_path: Path) -> None:
    """4 was written when 3 was served, and is served again in place of 2."""
    for text in ("one", "two", "three", "four"):
        publish(tmp_path, text)
    restored(store(str(tmp_path)), 2)
    published = publish(tmp_path, "four")
    assert (published.version, published.previous) == (4, 2)
    assert prune(tmp_path, published, 1) == (1,) and whole(tmp_path) == [2, 3, 4]


def test_newer_ones_stay(tmp_path: Path) -> None:
    """The bundle of an older version once more; and a version that was gone back from since it was published."""
    for text in ("one", "two", "three", "four", "five"):
        newest = publish(tmp_path, text)
    assert prune(tmp_path, publish(tmp_path, "three"), 1) == (1,)
    assert whole(tmp_path) == [2, 3, 4, 5]
    assert prune(tmp_path, newest, 1) == ()


def test_anothers_version_stays(tmp_path: Path) -> None:
    """One that is being written, one that is whole and not served yet, and what nobody claimed; a dead one's may go."""
    for text in ("one", "two", "three", "four", "five"):
        published = publish(tmp_path, text)
    live, dead = json.loads(claims.owner()), json.loads(claims.owner()) | {"process": ended_process()}
    (tmp_path / "m/1/claim.json").write_text(json.dumps(live))
    (tmp_path / "m/2/claim.json").write_text(json.dumps(dead))
    (tmp_path / "m/6").mkdir()
    (tmp_path / "m/6/claim.json").write_text(json.dumps(live))
    (tmp_path / "m/3/deployed.json").unlink()
    assert prune(tmp_path, published, 1) == (2,)
    assert whole(tmp_path) == [1, 4, 5] and (tmp_path / "m/3/model.onnx").exists()
    assert (tmp_path / "m/6/claim.json").exists()


def test_companions_go_with_it_unless_one_is_served_or_a_model_of_its_own(tmp_path: Path) -> None:
    for number in range(3):
        published = publish(tmp_path, f"text {number}", "m-prepare", "m", "m-raw")
    assert prune(tmp_path, published, 1) == (1,)
    assert [(tmp_path / f"{own}/1").exists() for own in ("m", "m-prepare", "m-raw")] == [False] * 3
    for number in range(3, 6):
        published = publish(tmp_path, f"text {number}")  # m-raw still names 3, and 3 is what it runs
    (tmp_path / "m-raw/2/deployed.json").write_text("of a model that somebody named so")
    at = store(str(tmp_path))
    told = removal.prunable(at, triton, "m", records.state(at, triton, "m"), 6, 5, 1)
    assert told == (2, 4)  # of a dry run, which removes nothing that it could look at again
    assert prune(tmp_path, published, 1) == (2, 4)
    assert whole(tmp_path) == [3, 5, 6]
    assert (tmp_path / "m-raw/2").exists() and not (tmp_path / "m-prepare/2").exists()
    (tmp_path / "m-raw/config.pbtxt").write_text("name: 'of somebody else'")
    assert prune(tmp_path, published, 1) == () and (tmp_path / "m/3/deployed.json").exists()


def test_dead_midway_nothing_looks_whole_that_is_not(tmp_path: Path) -> None:
    """Ended before each removal in turn: every record's files are there, and the next deploy removes the rest."""
    step, stopped = 0, True
    while stopped:
        step += 1
        place, left = tmp_path / str(step), step

        def end(name: str) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise StorageError("planted")

        for number in range(4):
            published = publish(place, f"text {number}", "m", "m-raw")
        try:
            prune(place, published, 1, Planted(place, before_removal=end))
            stopped = False
        except StorageError:
            at_hand = records.state(store(str(place)), triton, "m")
            for record in at_hand.whole.values():
                for path, own in record.files.items():
                    assert store(str(place)).digest(path, own.bytes, lambda moved: None) == own.sha256
            assert at_hand.current == 4 and {3, 4} <= at_hand.whole.keys()
            _as_if_dead(place)
            again = publish(place, "text 3", "m", "m-raw")
            assert again.was_there and again.removed == at_hand.begun
            prune(place, again, 1)
        assert whole(place) == [3, 4]
        assert not list(place.rglob("claim.json")) and not list(place.glob("*/[12]"))
    assert step > 8


def _as_if_dead(place: Path) -> None:
    for claim in place.rglob("claim.json"):
        claim.write_text(json.dumps(json.loads(claims.owner()) | {"process": ended_process()}))


def test_served_while_it_is_removed_it_stays(tmp_path: Path) -> None:
    """Rolled back to between the look and the removal: the record comes back."""
    for text in ("one", "two", "three"):
        published = publish(tmp_path, text)
    older = (tmp_path / "m/1/config.pbtxt").read_bytes()

    def rolled_back(name: str) -> None:
        if name == "m/1/deployed.json":
            (tmp_path / "m/config.pbtxt").write_bytes(older)

    assert prune(tmp_path, published, 1, Planted(tmp_path, before_removal=rolled_back)) == ()
    assert whole(tmp_path) == [1, 2, 3] and (tmp_path / "m/1/model.onnx").exists()
    assert not list(tmp_path.rglob("claim.json"))


def test_removed_while_it_is_served_again_the_other_serves_on(tmp_path: Path) -> None:
    for text in ("one", "two"):
        publish(tmp_path, text)

    def removed(name: str) -> None:
        (tmp_path / "m/1/deployed.json").unlink(missing_ok=True)

    with pytest.raises(RunError, match="removed version 1 of m meanwhile"):
        restored(Planted(tmp_path, after_write=removed))
    assert triton.served((tmp_path / "m/config.pbtxt").read_bytes(), "m") == 2
