"""Versions at a folder: whole before they are seen, claimed by one deployer, cleaned up after a dead one, and gone back to."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tlexport.bundle.layouts import Model, triton
from tlexport.bundle.places import Store, claims, records, store, versions
from tlexport.errors import BundleError, RecipeError, RunError, StorageError


def laid(text: str, *names: str):
    def models(version: int, previous: int | None) -> tuple[Model, ...]:
        config = f'name: "%s"\nversion_policy {{ specific {{ versions: {version} }} }}\n# {text}\n'
        return tuple(
            Model(n, {"model.onnx": text.encode()}, {"labels": b"a\n"}, (config % n).encode())
            for n in names or ("m",)
        )

    return models


def publish(place: Path, text: str, *names: str, trusted: dict[str, str] | None = None) -> versions.Published:
    known = {"bundle": "b", "target": "cpu", "variant": "v"}
    return versions.publish(
        store(str(place)),
        triton,
        "m",
        laid(text, *names),
        content=text,
        describes=known,
        trusted=trusted or {},
    )


def restored(at: Store, version: int | None = None) -> tuple[int, int | None]:
    at_hand = records.state(at, triton, "m")
    chosen = versions.to_restore(at, "m", at_hand, version)
    versions.restore(at, triton, "m", at_hand, chosen)
    return chosen, at_hand.current


def test_publish_again_and_back(tmp_path: Path) -> None:
    assert publish(tmp_path, "one").version == 1
    second = publish(tmp_path, "two")
    assert (second.version, second.previous, second.was_there) == (2, 1, False)
    again = publish(tmp_path, "two")
    assert (again.version, again.was_there) == (2, True)
    assert (tmp_path / "m/config.pbtxt").read_bytes() == (tmp_path / "m/2/config.pbtxt").read_bytes()
    at = store(str(tmp_path))
    assert restored(at) == (1, 2)
    assert triton.served((tmp_path / "m/config.pbtxt").read_bytes(), "m") == 1
    assert publish(tmp_path, "two").was_there
    assert records.state(at, triton, "m").current == 2
    assert not list(tmp_path.rglob("claim.json")) and not list(tmp_path.rglob("*.partial"))
    with pytest.raises(RunError, match="whole versions: 1, 2"):
        restored(at, 7)


def test_a_damaged_version_is_not_served_again(tmp_path: Path) -> None:
    publish(tmp_path, "one")
    publish(tmp_path, "two")
    (tmp_path / "m/1/model.onnx").write_bytes(b"cut")
    (tmp_path / "m/1/model.onnx").unlink()
    with pytest.raises(BundleError, match="missing"):
        restored(store(str(tmp_path)))
    assert triton.served((tmp_path / "m/config.pbtxt").read_bytes(), "m") == 2


@pytest.mark.parametrize("file", ["m/1/model.onnx", "m/1/config.pbtxt", "m/labels"])
def test_one_bit_of_a_version_is_enough_to_refuse_it(tmp_path: Path, file: str) -> None:
    """Of the same size, so that only the SHA-256 tells; by rollback, and by the same bundle once more."""
    publish(tmp_path, "one")
    publish(tmp_path, "two")
    path = tmp_path / file
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{file} is missing or not what was deployed, so that m/1 is not"):
        restored(store(str(tmp_path)))
    with pytest.raises(BundleError, match="not what was deployed"):
        publish(tmp_path, "one")
    assert triton.served((tmp_path / "m/config.pbtxt").read_bytes(), "m") == 2


def test_back_is_what_was_served_before_and_not_the_next_number(tmp_path: Path) -> None:
    """1, 2, 3; 3 was bad, and 1 served again; so 4 goes back to 1, and where that is gone to the next older one."""
    for text in ("one", "two", "three"):
        publish(tmp_path, text)
    at = store(str(tmp_path))
    assert restored(at, 1) == (1, 3)
    assert publish(tmp_path, "four").previous == 1
    assert restored(at) == (1, 4)
    restored(at, 4)
    at.remove("m/1")
    assert restored(at) == (3, 4)


def test_no_more_is_read_than_was_written(tmp_path: Path) -> None:
    (tmp_path / "grows").write_bytes(b"0123456789")
    at, moved = store(str(tmp_path)), []
    assert at.digest("grows", 10, moved.append) == hashlib.sha256(b"0123456789").hexdigest() and moved == [10]
    with pytest.raises(StorageError, match="larger than it can be"):
        at.digest("grows", 9, moved.append)
    assert at.digest("gone", 10, moved.append) is None


def test_two_at_once_get_two_numbers_and_one_is_served(tmp_path: Path) -> None:
    found, barrier = [], threading.Barrier(4)

    def deploy(text: str) -> None:
        barrier.wait()
        try:
            found.append(publish(tmp_path, text).version)
        except RunError as error:
            found.append(str(error))

    threads = [threading.Thread(target=deploy, args=(f"text {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = records.state(store(str(tmp_path)), triton, "m")
    assert sorted(state.whole) == [1, 2, 3, 4] and state.current in state.whole
    for number, record in state.whole.items():
        assert (tmp_path / f"m/{number}/model.onnx").read_text() == record.content
    assert all(isinstance(one, int) or "another deployer" in one for one in found)


def test_a_live_deployers_version_is_left_alone_and_a_dead_ones_removed(tmp_path: Path) -> None:
    publish(tmp_path, "one")
    for number, document in (
        (2, json.loads(claims.owner())),
        (3, json.loads(claims.owner()) | {"process": ended_process()}),
    ):
        (tmp_path / f"m/{number}").mkdir()
        (tmp_path / f"m/{number}/claim.json").write_text(json.dumps(document))
        (tmp_path / f"m/{number}/model.onnx").write_text("half")
    (tmp_path / "m/4").mkdir()
    (tmp_path / "m/4/model.onnx").write_text("somebody's own")
    published = publish(tmp_path, "two")
    assert published.version == 5 and published.removed == (3,)
    assert (tmp_path / "m/2/model.onnx").exists() and not (tmp_path / "m/3").exists()
    assert (tmp_path / "m/4/model.onnx").exists()


def ended_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_claim_from_elsewhere_has_a_day() -> None:
    document = json.loads(claims.owner()) | {"machine": "elsewhere"}
    now = document["time"]
    assert not claims.is_dead(json.dumps(document).encode(), now + 3600)
    assert claims.is_dead(json.dumps(document).encode(), now + claims.STALE_S + 1)
    assert not claims.is_dead(claims.owner(), now) and claims.is_dead(b"{", now)
    restarted = json.loads(claims.owner()) | {"started": 1.0}
    assert claims.is_dead(json.dumps(restarted).encode(), now)


def test_a_slower_deployer_does_not_take_the_place_back(tmp_path: Path) -> None:
    at = store(str(tmp_path))

    def overtaken(version: int, previous: int | None) -> tuple[Model, ...]:
        publish(tmp_path, "faster")
        return laid("slower")(version, previous)

    known = {"bundle": "b", "target": "cpu", "variant": "v"}
    with pytest.raises(RunError, match="another deployer's version 2"):
        versions.publish(at, triton, "m", overtaken, content="slower", describes=known, trusted={})
    assert records.state(at, triton, "m").current == 2


def test_a_file_altered_while_it_is_copied_is_never_served(tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(b"altered")
    known = {"bundle": "b", "target": "cpu", "variant": "v"}

    def models(version: int, previous: int | None) -> tuple[Model, ...]:
        return (Model("m", {"model.onnx": source}, {}, b"version_policy { specific { versions: 1 } }"),)

    with pytest.raises(BundleError, match="altered"):
        versions.publish(
            store(str(tmp_path / "place")),
            triton,
            "m",
            models,
            content="x",
            describes=known,
            trusted={str(source): "0" * 64},
        )
    assert not (tmp_path / "place/m/config.pbtxt").exists()


def test_somebody_elses_configuration_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.pbtxt").write_text('name: "m"\nbackend: "python"\n')
    with pytest.raises(RunError, match="not from tlexport"):
        publish(tmp_path, "one")
    assert (tmp_path / "m/config.pbtxt").read_text() == 'name: "m"\nbackend: "python"\n'


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "place").mkdir()
    (tmp_path / "place/m").symlink_to(outside)
    with pytest.raises(StorageError, match="link"):
        publish(tmp_path / "place", "one")
    assert not list(outside.iterdir())


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(RecipeError) as stop:
        store("s3://key:secret@bucket/models")
    assert "secret" not in str(stop.value)
