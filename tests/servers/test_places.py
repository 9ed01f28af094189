"""Stores and registries as they are: S3 (moto), an OCI registry (Debian's docker-registry)."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from changed_bundles import another, for_onnxruntime, rewritten
from pipeline import Ended

from tlexport.bundle.layouts import kserve, triton
from tlexport.bundle.places import claims, oci, records, remote, store
from tlexport.errors import BundleError, RecipeError, RunError, StorageError
from tlexport.run import digest

pytestmark = pytest.mark.server
DYING = Path(__file__).parents[1] / "bundle" / "places" / "dying.py"
Tlx = Callable[..., Ended]


def test_s3_publish_and_back(s3: str, bundle_copy: Path, tlx: Tlx) -> None:
    bundle, place = for_onnxruntime(bundle_copy), f"{s3}/models"
    assert tlx("deploy", bundle, "--to", place, "--name", "digits", "--json").json["version"] == 1
    assert tlx("deploy", bundle, "--to", place, "--name", "digits", "--json").json["was_there"]
    second = tlx("deploy", another(bundle), "--to", place, "--name", "digits", "--json").json
    assert (second["version"], second["previous"]) == (2, 1)
    assert tlx("rollback", place, "--json").json["version"] == 1
    state = records.state(store(place), triton, "digits")
    assert state.current == 1 and sorted(state.whole) == [1, 2] and state.begun == ()
    kserve = tlx("deploy", bundle, "--to", f"kserve:{s3}/served", "--name", "digits", "--json").json
    assert kserve["version"] == 1
    service = store(f"{s3}/served").read("digits.yaml", 1 << 20)
    assert service is not None and f"storageUri: {s3}/served/digits/1/repository".encode() in service


def test_s3_killed_at_every_step_the_old_version_stays(s3: str, bundle_copy: Path, tlx: Tlx) -> None:
    place = f"{s3}/models"
    first = for_onnxruntime(bundle_copy)
    assert tlx("deploy", first, "--to", place, "--name", "digits").code == 0
    second, at, died, step = another(first), store(place), 0, 0
    while True:
        step += 1
        done = subprocess.run(
            [sys.executable, DYING, second, place, str(step)], capture_output=True, text=True
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        died += 1
        state = records.state(at, triton, "digits")
        assert state.current in state.whole
        for path, own in state.whole[state.current].files.items():
            assert at.digest(path, own.bytes, lambda moved: None) == own.sha256
    state = records.state(at, triton, "digits")
    assert died >= 6 and state.begun == () and state.current == max(state.whole)


def test_s3_a_changed_bit_is_not_served_again(s3: str, bundle_copy: Path, tlx: Tlx) -> None:
    bundle, place, at = for_onnxruntime(bundle_copy), f"{s3}/models", store(f"{s3}/models")
    tlx("deploy", bundle, "--to", place, "--name", "digits")
    tlx("deploy", another(bundle), "--to", place, "--name", "digits")
    own = records.state(at, triton, "digits").whole[1].files["digits/1/model.onnx"]
    whole = at.read("digits/1/model.onnx", own.bytes)
    assert whole is not None and at.digest("digits/1/model.onnx", own.bytes, lambda moved: None) == own.sha256
    content = bytearray(whole)
    content[len(content) // 2] ^= 1
    at.write("digits/1/model.onnx", bytes(content))
    ended = tlx("rollback", place, "digits")
    assert ended.code == BundleError.exit_code and "digits/1/model.onnx" in ended.err
    assert records.state(at, triton, "digits").current == 2
    at.write("digits/1/model.onnx", whole)
    assert tlx("rollback", place, "digits", "--json").json["version"] == 1


def test_s3_is_read_in_blocks_and_no_further(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_BLOCK", 64 << 10)
    at, content, moved = store(f"{s3}/models"), bytes(range(256)) * 1000, []
    at.write("x", content)
    assert at.digest("x", len(content), moved.append) == hashlib.sha256(content).hexdigest()
    assert sum(moved) == len(content) and max(moved) <= 64 << 10
    with pytest.raises(StorageError, match="larger than it can be"):
        at.digest("x", len(content) - 1, moved.append)
    assert at.digest("gone", 1, moved.append) is None


def test_s3_old_versions_go_and_what_dies_midway_is_removed_next_time(
    s3: str, bundle_copy: Path, tlx: Tlx, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, at = for_onnxruntime(bundle_copy), store(f"{s3}/served")

    def deployed(*more: object) -> Ended:
        return tlx("deploy", bundle, "--to", f"kserve:{s3}/served", "--name", "digits", "--json", *more)

    for number in range(1, 4):
        assert deployed().json["version"] == number
        rewritten(bundle, backbone=f"build {number}")
    at.write("digits/11/claim.json", claims.owner())  # another deployer's, and no file of version 1
    real = remote.Remote.remove

    def refused(self: remote.Remote, folder: str) -> None:
        if folder.endswith("model.onnx"):
            raise StorageError("planted")
        real(self, folder)

    with monkeypatch.context() as planted:
        planted.setattr(remote.Remote, "remove", refused)
        assert deployed("--keep", 1).code == StorageError.exit_code
    held = records.state(at, kserve, "digits")
    assert (sorted(held.whole), held.begun, held.current) == ([2, 3, 12], (1, 11), 12)
    at.write("digits/1/claim.json", b"{}")  # as if that deployer were dead
    done = deployed("--keep", 1).json
    assert (done["was_there"], done["removed"], done["pruned"]) == (True, [1], [2])
    held = records.state(at, kserve, "digits")
    assert (sorted(held.whole), held.begun, held.current) == ([3, 12], (11,), 12)
    assert not at.files("digits/1") and not at.files("digits/2") and at.files("digits/11")


def test_s3_one_claim_for_one_deployer(s3: str) -> None:
    at, won, barrier = store(f"{s3}/models"), [], threading.Barrier(6)

    def claim() -> None:
        barrier.wait()
        won.append(at.create("m/1/claim.json", b"{}"))

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 5 + [True]


def test_s3_bundle_there_and_back(s3: str, bundle_copy: Path, tmp_path: Path, tlx: Tlx) -> None:
    place = f"{s3}/bundles/digits"
    assert tlx("deploy", bundle_copy, "--to", f"bundle:{place}").code == 0
    assert tlx("pull", place, "--out", tmp_path / "pulled").code == 0
    assert digest(tmp_path / "pulled") == digest(bundle_copy)
    store(place).remove("golden/outputs.npy")
    assert tlx("pull", place, "--out", tmp_path / "again").code == StorageError.exit_code
    assert not (tmp_path / "again").exists()


def test_s3_wrong_bucket_says_so_and_no_secret(s3: str, bundle_copy: Path, tlx: Tlx) -> None:
    ended = tlx("deploy", bundle_copy, "--to", "bundle:s3://no-such-bucket/x", "--debug")
    assert ended.code == StorageError.exit_code and "no-such-bucket" in ended.err
    assert "planted-secret" not in ended.out + ended.err


def test_registry_there_and_back(registry: str, bundle_copy: Path, tmp_path: Path, tlx: Tlx) -> None:
    tag = f"oci://{registry}/team/digits:1.0"
    first = tlx("deploy", bundle_copy, "--to", tag, "--json").json
    again = tlx("deploy", bundle_copy, "--to", tag, "--json").json
    assert not first["was_there"] and again["was_there"] and first["digest"] == again["digest"]
    pulled = tlx("pull", tag, "--out", tmp_path / "pulled", "--json").json
    assert pulled["digest"] == first["digest"] and digest(tmp_path / "pulled") == digest(bundle_copy)
    by_digest = f"oci://{registry}/team/digits@{first['digest']}"
    assert tlx("pull", by_digest, "--out", tmp_path / "exact").code == 0
    moved = tlx("deploy", another(bundle_copy), "--to", tag)
    assert moved.code == RunError.exit_code and "another tag" in moved.err
    for _ in range(2):
        assert tlx("deploy", bundle_copy, "--to", f"oci://{registry}/team/digits", "--json").code == 0
    absent = tlx("pull", f"oci://{registry}/team/digits:9", "--out", tmp_path / "none")
    assert absent.code == StorageError.exit_code and "not there" in absent.err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"annotations": {oci.TITLE: "../outside"}}, "names no file"),
        ({"annotations": {oci.TITLE: "a\\b"}}, "names no file"),
        ({"annotations": {oci.TITLE: "golden/inputs.npy"}}, "names no file"),  # twice
        ({"size": 1 << 50}, "at most"),
        ({"size": -1}, "no size"),
        ({"size": 5}, "longer than"),
        ({"digest": "sha256:" + "0" * 64}, "404"),
        ({"digest": "md5:0"}, "no SHA-256"),
        ({"annotations": {}}, "cannot be read"),
    ],
)
def test_a_registry_that_lies_writes_nothing(
    registry: str, bundle_copy: Path, tmp_path: Path, tlx: Tlx, change: dict, told: str
) -> None:
    import requests

    tlx("deploy", bundle_copy, "--to", f"oci://{registry}/x:1")
    url = f"http://{registry}/v2/x/manifests/"
    document = requests.get(url + "1", headers={"Accept": oci.MANIFEST}).json()
    first = next(own for own in document["layers"] if own["annotations"][oci.TITLE] != "golden/inputs.npy")
    first.update(change)
    sent = requests.put(url + "evil", data=json.dumps(document), headers={"Content-Type": oci.MANIFEST})
    if sent.status_code != 201:  # the registry itself refuses what names no blob of its own
        assert "digest" in change or "size" in change
        return
    pulled = tlx("pull", f"oci://{registry}/x:evil", "--out", tmp_path / "pulled")
    assert pulled.code in (BundleError.exit_code, StorageError.exit_code) and told in pulled.err, pulled.err
    assert not (tmp_path / "pulled").exists() and not list(tmp_path.glob("outside*"))


def test_a_registry_that_is_not_there_is_told_soon(bundle_copy: Path, tlx: Tlx) -> None:
    ended = tlx("deploy", bundle_copy, "--to", "oci://127.0.0.1:9/x:1")
    assert ended.code == StorageError.exit_code and "cannot be used" in ended.err
    assert (
        tlx("deploy", bundle_copy, "--to", "oci://127.0.0.1:9/x@sha256:" + "0" * 64).code
        == RecipeError.exit_code
    )


def test_what_is_no_bundle_is_not_pulled(registry: str, bundle_copy: Path, tmp_path: Path, tlx: Tlx) -> None:
    import requests

    tlx("deploy", bundle_copy, "--to", f"oci://{registry}/x:1")
    url = f"http://{registry}/v2/x/manifests/"
    document = requests.get(url + "1", headers={"Accept": oci.MANIFEST}).json() | {
        "artifactType": "application/other"
    }
    requests.put(
        url + "2", data=json.dumps(document), headers={"Content-Type": oci.MANIFEST}
    ).raise_for_status()
    pulled = tlx("pull", f"oci://{registry}/x:2", "--out", tmp_path / "pulled")
    assert pulled.code == BundleError.exit_code and "no bundle" in pulled.err
