"""deploy, rollback and pull on real bundles at local places; what other stores and servers do is in tests/servers."""

from __future__ import annotations

import errno
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from changed_bundles import another, for_onnxruntime, rewritten
from pipeline import Built, Ended

from tlexport import recipe
from tlexport.bundle import manifest, preflight
from tlexport.bundle.layouts import triton
from tlexport.bundle.layouts.registry import LAYOUTS
from tlexport.bundle.places.folder import Folder
from tlexport.errors import BundleError, PreflightError, RecipeError, RunError, StorageError
from tlexport.progress import Silent
from tlexport.run import digest
from tlexport.stages import deploy, pull

DYING = Path(__file__).parents[1] / "bundle" / "places" / "dying.py"
Tlx = Callable[..., Ended]


def served(place: Path, name: str = "digits") -> int | None:
    return triton.served((place / name / "config.pbtxt").read_bytes(), name)


def test_deploy_twice_another_and_back(bundle_copy: Path, tmp_path: Path, tlx: Tlx) -> None:
    bundle, place = for_onnxruntime(bundle_copy), tmp_path / "models"
    first = tlx("deploy", bundle, "--to", f"triton:{place}", "--name", "digits", "--json").json
    assert (first["version"], first["previous"], first["was_there"]) == (1, None, False)
    again = tlx("deploy", bundle, "--to", place, "--name", "digits", "--json").json
    assert (again["version"], again["was_there"]) == (1, True)
    second = tlx("deploy", another(bundle), "--to", place, "--name", "digits", "--json").json
    assert (second["version"], second["previous"]) == (2, 1) and served(place) == 2
    back = tlx("rollback", place, "--json").json
    assert (back["version"], back["before"]) == (1, 2) and served(place) == 1
    assert (
        tlx("rollback", place, "digits", "--to-version", 2, "--json").json["version"] == 2
        and served(place) == 2
    )
    gone = tlx("rollback", place, "nobody")
    assert gone.code == RunError.exit_code and "no older version" in gone.err
    model = manifest.read(bundle).targets["cpu"].file
    assert digest(place / "digits/2/model.onnx") == digest(bundle / model)


def test_a_dry_run_writes_nothing_and_says_what_it_would(bundle_copy: Path, tmp_path: Path, tlx: Tlx) -> None:
    bundle = for_onnxruntime(bundle_copy)
    done = tlx("deploy", bundle, "--to", tmp_path / "models", "--dry-run", "--raw", "--json").json
    assert done["dry_run"] and done["version"] == 1 and len(done["models"]) == 3
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("change", ["dims", "dtype", "name"])
def test_a_manifest_that_is_not_the_graphs_is_refused(bundle_copy: Path, tmp_path: Path, change: str) -> None:
    bundle = for_onnxruntime(bundle_copy)
    inputs = json.loads((bundle / manifest.NAME).read_text())["inputs"]
    wrong = {"dims": {"shape": ["batch", 3, 16, 16]}, "dtype": {"dtype": "int8"}, "name": {"name": "pixels"}}[
        change
    ]
    held = np.load(bundle / "golden" / "inputs.npy")  # they are made to agree with the manifest
    held = {"dims": held[..., :16, :16], "dtype": held.astype(np.int8), "name": held}[change]
    np.save(bundle / "golden" / "inputs.npy", held)
    rewritten(bundle, inputs=[inputs[0] | wrong])
    options = deploy.Options(name="digits")
    if change == "name":  # the golden samples are one plain array, named by the manifest
        options = deploy.Options(name="digits", raw=True)
    with pytest.raises(BundleError, match="not what the graph has"):
        deploy.run(bundle, str(tmp_path / "models"), Silent(), options=options)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("kind", ["triton", "triton-python", "ort", "ovms", "ray", "bundle"])
def test_an_altered_bundle_goes_nowhere(bundle_copy: Path, tmp_path: Path, kind: str) -> None:
    bundle = for_onnxruntime(bundle_copy)
    graph = bundle / manifest.read(bundle).targets["cpu"].file
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(PreflightError, match="altered"):
        deploy.run(bundle, f"{kind}:{tmp_path / 'place'}", Silent())
    assert not (tmp_path / "place").exists()


def test_an_engine_needs_trust(bundle_copy: Path, tmp_path: Path) -> None:
    """A planted engine: what it holds is never read here, only copied."""
    document = json.loads((bundle_copy / manifest.NAME).read_text())
    entry = document["targets"]["cpu"]
    entry["variant"]["backend"] = "tensorrt"
    rewritten(bundle_copy, targets={"sm89": entry})
    with pytest.raises(PreflightError, match="--trust-unsigned"):
        deploy.run(bundle_copy, str(tmp_path / "models"), Silent(), options=deploy.Options(name="digits"))
    trust = deploy.Trust(unsigned=True)
    done = deploy.run(
        bundle_copy, str(tmp_path / "models"), Silent(), trust=trust, options=deploy.Options(name="digits")
    )
    assert done.target == "sm89" and (tmp_path / "models/digits/1/model.plan").is_file()


def test_killed_at_every_step_the_old_version_stays(built: Built, bundle_copy: Path, tmp_path: Path) -> None:
    """kill -9 before each change at the place, and halfway through the upload of the graph."""
    first = for_onnxruntime(bundle_copy)
    place = tmp_path / "models"
    deploy.run(first, str(place), Silent(), options=deploy.Options(name="digits"))
    original = (place / "digits/1/model.onnx").read_bytes()
    second = another(first)
    died, step = 0, 0
    while True:
        step += 1
        done = subprocess.run(
            [sys.executable, DYING, second, str(place), str(step)], capture_output=True, text=True
        )
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        died += 1
        # Killed after the switch, at the end, the new version is whole and served; before it, the old one.
        version = served(place)
        assert version is not None and (place / f"digits/{version}/deployed.json").is_file()
        assert (place / "digits/1/model.onnx").read_bytes() == original
        assert (
            place / f"digits/{version}/model.onnx"
        ).read_bytes() == original  # the same graph in both bundles
    assert died >= 6
    held = [path.name for path in (place / "digits").iterdir() if path.name.isdigit()]
    whole = [name for name in held if (place / f"digits/{name}/deployed.json").is_file()]
    assert served(place) == max(map(int, whole)) and sorted(held) == sorted(whole)


@pytest.mark.parametrize("kind", ["triton", "kserve", "ort", "ovms", "ray"])
def test_old_versions_go_beyond_those_to_keep(bundle_copy: Path, tmp_path: Path, tlx: Tlx, kind: str) -> None:
    bundle, place = for_onnxruntime(bundle_copy), tmp_path / "place"
    raw = ("--raw",) if kind == "triton" else ()
    storage = ("--storage-uri", "pvc://claim/x") if kind == "kserve" else ()

    def deployed(*more: object) -> dict:
        to = f"{kind}:{place}"
        return tlx("deploy", bundle, "--to", to, "--name", "digits", "--json", *raw, *storage, *more).json

    for number in range(1, 5):
        assert deployed()["version"] == number
        rewritten(bundle, backbone=f"build {number}")
    told = deployed("--keep", 1, "--dry-run")
    assert (told["version"], told["pruned"]) == (5, [1, 2, 3]) and (place / "digits/1").is_dir()
    done = deployed("--keep", 1)
    assert (done["version"], done["pruned"], done["removed"]) == (5, [1, 2, 3], [])
    held = {path.parent.name + "/" + path.name for path in place.glob("*/*") if path.name.isdigit()}
    models = ("digits", "digits-prepare", "digits-raw") if raw else ("digits",)
    assert held == {f"{model}/{number}" for model in models for number in (4, 5)}
    assert tlx("rollback", f"{kind}:{place}", "--json").json["version"] == 4
    told = deployed("--keep", 1, "--dry-run")
    assert told["was_there"] and told["version"] == 5 and told["pruned"] == []


def test_versions_that_cannot_be_removed_are_told_and_the_new_one_is_served(
    bundle_copy: Path, tmp_path: Path, tlx: Tlx, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, place = for_onnxruntime(bundle_copy), tmp_path / "models"
    for number in range(2):
        tlx("deploy", bundle, "--to", place, "--name", "digits")
        rewritten(bundle, backbone=f"build {number}")
    real = Folder.remove

    def refused(self: Folder, folder: str) -> None:
        if folder.endswith("1/model.onnx"):
            raise StorageError("planted")
        real(self, folder)

    with monkeypatch.context() as planted:
        planted.setattr(Folder, "remove", refused)
        ended = tlx("deploy", bundle, "--to", place, "--name", "digits", "--keep", 1)
    assert ended.code == StorageError.exit_code and "version 3 of digits is served" in ended.err
    assert served(place) == 3
    gone = tlx("rollback", place, "digits", "--to-version", 1)
    assert gone.code == RunError.exit_code and "whole versions: 2, 3" in gone.err
    shown = tlx("deploy", bundle, "--to", place, "--name", "digits", "--keep", 1)
    assert shown.code == 0 and "is there already" in shown.out


def test_what_is_removed_is_shown_for_what_it_is(bundle_copy: Path, tmp_path: Path, tlx: Tlx) -> None:
    bundle, place = for_onnxruntime(bundle_copy), tmp_path / "models"
    for number in range(2):
        tlx("deploy", bundle, "--to", place, "--name", "digits")
        rewritten(bundle, backbone=f"build {number}")
    (place / "digits/3").mkdir()
    (place / "digits/3/claim.json").write_text("{")  # no live deployer's
    told = tlx("deploy", bundle, "--to", place, "--name", "digits", "--keep", 1, "--dry-run")
    assert "would be pruned" in told.out and "older versions 1" in told.out
    done = tlx("deploy", bundle, "--to", place, "--name", "digits", "--keep", 1)
    assert "half-written versions 3" in done.out and "older versions 1" in done.out


def test_a_changed_bit_is_not_served_again(bundle_copy: Path, tmp_path: Path, tlx: Tlx) -> None:
    bundle, place = for_onnxruntime(bundle_copy), tmp_path / "models"
    tlx("deploy", bundle, "--to", place, "--name", "digits")
    tlx("deploy", another(bundle), "--to", place, "--name", "digits")
    graph = place / "digits/1/model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    ended = tlx("rollback", place, "digits")
    assert ended.code == BundleError.exit_code and "digits/1/model.onnx" in ended.err
    assert served(place) == 2


@pytest.mark.parametrize("kind", ["triton:", "ovms:", "bundle:", ""])
@pytest.mark.parametrize("where", ["file/below", "/proc/nowhere"])
def test_a_place_that_cannot_be_made(
    bundle_copy: Path, tmp_path: Path, tlx: Tlx, kind: str, where: str
) -> None:
    """A file in the way, and a file system that makes none; the last kind is an archive."""
    (tmp_path / "file").write_text("in the way")
    place = f"{kind}{tmp_path / where}{'' if kind else '.tar'}"
    ended = tlx("deploy", for_onnxruntime(bundle_copy), "--to", place)
    assert ended.code == StorageError.exit_code and "choose another directory" in ended.err
    pulled = tlx("pull", bundle_copy, "--out", tmp_path / where)
    assert pulled.code == StorageError.exit_code and "choose another directory" in pulled.err


@pytest.mark.parametrize("refused", ["is_file", "mkdir", "open", "is_symlink"])
def test_a_place_that_refuses(
    bundle_copy: Path, tmp_path: Path, tlx: Tlx, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """As a user who may not: planted, since root may always."""
    bundle, place = for_onnxruntime(bundle_copy), tmp_path / "models"
    tlx("deploy", bundle, "--to", place, "--name", "digits")
    tlx("deploy", another(bundle), "--to", place, "--name", "digits")
    real = getattr(Path, refused)

    def planted(self: Path, *arguments: object, **named: object) -> object:
        if self == place or place in self.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, refused, planted)
        rolled = tlx("rollback", place, "digits")
        deployed = tlx("deploy", bundle, "--to", place, "--name", "digits")
    for ended in (rolled, deployed):
        assert ended.code == StorageError.exit_code, ended.err
        assert "ermission denied" in ended.err and "choose a" in ended.err
    assert served(place) == 2


@pytest.mark.parametrize("kind", ["ort", "ovms", "ray"])
def test_every_layout_is_published_and_rolled_back(
    bundle_copy: Path, tmp_path: Path, tlx: Tlx, kind: str
) -> None:
    bundle, place = for_onnxruntime(bundle_copy), f"{kind}:{tmp_path / 'place'}"
    layout = LAYOUTS[kind]
    assert tlx("deploy", bundle, "--to", place, "--name", "digits", "--json").json["version"] == 1
    assert tlx("deploy", another(bundle), "--to", place, "--name", "digits", "--json").json["version"] == 2
    config = tmp_path / "place" / layout.config_path("digits")
    assert layout.served(config.read_bytes(), "digits") == 2
    assert tlx("rollback", place, "--json").json["version"] == 1
    assert layout.served(config.read_bytes(), "digits") == 1


def test_kserve_needs_to_know_where_the_cluster_looks(bundle_copy: Path, tmp_path: Path, tlx: Tlx) -> None:
    bundle, place = for_onnxruntime(bundle_copy), f"kserve:{tmp_path / 'served'}"
    refused = tlx("deploy", bundle, "--to", place)
    assert refused.code == RecipeError.exit_code and "--storage-uri" in refused.err
    done = tlx("deploy", bundle, "--to", place, "--storage-uri", "pvc://models/served", "--json")
    assert done.json["version"] == 1
    name = done.json["name"]
    assert "storageUri: pvc://models/served" in (tmp_path / f"served/{name}.yaml").read_text()
    assert (tmp_path / f"served/{name}/1/repository/{name}/1/model.onnx").is_file()


def test_a_bundle_goes_and_comes_back_whole(bundle_copy: Path, tmp_path: Path, tlx: Tlx) -> None:
    place, out = f"bundle:{tmp_path / 'store'}", tmp_path / "pulled"
    assert not tlx("deploy", bundle_copy, "--to", place, "--json").json["was_there"]
    assert tlx("deploy", bundle_copy, "--to", place, "--json").json["was_there"]
    assert tlx("pull", place, "--out", out, "--json").code == 0
    assert digest(out) == digest(bundle_copy)
    assert tlx("pull", place, "--out", out).code == StorageError.exit_code
    other = tlx("deploy", another(bundle_copy), "--to", place)
    assert other.code == RunError.exit_code and "another bundle" in other.err


def test_an_archive_there_and_back(bundle_copy: Path, tmp_path: Path, tlx: Tlx) -> None:
    file, out = tmp_path / "digits.tar", tmp_path / "pulled"
    assert not tlx("deploy", bundle_copy, "--to", file, "--json").json["was_there"]
    assert tlx("deploy", bundle_copy, "--to", file, "--json").json["was_there"]
    assert tlx("pull", file, "--out", out, "--json").code == 0 and digest(out) == digest(bundle_copy)
    other = tlx("deploy", another(bundle_copy), "--to", file)
    assert other.code == StorageError.exit_code and "left alone" in other.err


def test_a_tampered_store_yields_no_bundle(bundle_copy: Path, tmp_path: Path, tlx: Tlx) -> None:
    place, out = tmp_path / "store", tmp_path / "pulled"
    tlx("deploy", bundle_copy, "--to", f"bundle:{place}")
    graph = place / "graphs" / "fp32.onnx"
    content = bytearray(graph.read_bytes())
    content[100] ^= 1
    graph.write_bytes(content)
    pulled = tlx("pull", place, "--out", out)
    assert pulled.code == BundleError.exit_code and "altered" in pulled.err
    assert not out.exists() and not list(tmp_path.glob(".pulled*"))
    graph.write_bytes(bytes(content) + b"more")
    assert (
        tlx("pull", place, "--out", out).code == StorageError.exit_code
    )  # larger than its manifest says: not fetched
    assert not out.exists()


@pytest.mark.parametrize(
    "to", ["nowhere:x", "oci://", "oci://registry/Upper:1", "triton:", "ftp:x", "", "s3://", "bundle:s3:///"]
)
def test_a_place_that_is_none(built: Built, tlx: Tlx, to: str) -> None:
    ended = tlx("deploy", built.bundle, "--to", to)
    assert ended.code == RecipeError.exit_code and ended.out == ""


@pytest.mark.parametrize("scheme", ["oci", "s3"])
def test_a_password_in_a_place_is_refused_and_not_repeated(built: Built, tlx: Tlx, scheme: str) -> None:
    ended = tlx("deploy", built.bundle, "--to", f"{scheme}://user:hunter2@example.org/team/model:1")
    assert ended.code == RecipeError.exit_code and "hunter2" not in ended.err


@pytest.mark.parametrize("name", ["../up", ".hidden", "a/b", "", "ü", "-x", "a" * 201])
def test_a_name_stays_inside(bundle_copy: Path, tmp_path: Path, name: str) -> None:
    rewritten(bundle_copy, name=name)
    with pytest.raises(RecipeError, match="no name"):
        deploy.run(for_onnxruntime(bundle_copy), str(tmp_path / "models"), Silent())


def test_an_empty_name_is_not_taken_for_none(bundle_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no name"):
        deploy.run(bundle_copy, str(tmp_path / "models"), Silent(), options=deploy.Options(name=""))


def test_what_a_place_cannot_take_is_refused_and_not_dropped(built: Built, tmp_path: Path, tlx: Tlx) -> None:
    of_a_server = {
        "--target": "cpu", "--name": "x", "--flavour": "python", "--storage-uri": "s3://x", "--measured": "x.json",
        "--instances": 2, "--keep": 1,
    }  # fmt: skip
    for flag, given in of_a_server.items():
        for place in (tmp_path / "digits.tar", f"bundle:{tmp_path / 'store'}", "oci://localhost:9/x:1"):
            ended = tlx("deploy", built.bundle, "--to", place, flag, given)
            assert ended.code == RecipeError.exit_code and flag in ended.err
    ended = tlx("deploy", built.bundle, "--to", tmp_path / "models", "--storage-uri", "s3://x")
    assert ended.code == RecipeError.exit_code and "--storage-uri" in ended.err
    assert not list(tmp_path.iterdir())


def test_a_home_directory_is_found_wherever_a_place_is_named(
    bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for place in ("~/digits.tar", "bundle:~/store"):
        deploy.run(bundle_copy, place, Silent())
        out = tmp_path / f"pulled-{len(place)}"
        pull.run(place, out, Silent())
        assert digest(out) == digest(bundle_copy)
    assert (tmp_path / "digits.tar").is_file() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("source", "stop", "says"),
    [
        ("gone.tar", BundleError, "not there"),
        ("gone", BundleError, "not a bundle"),
        ("triton:models", RecipeError, "pull from"),
        ("triton-python:models", RecipeError, "pull from"),
    ],
)
def test_what_holds_no_bundle_is_told_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, stop: type[Exception], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(stop, match=says):
        pull.run(source, tmp_path / "out", Silent())
    assert not list(tmp_path.iterdir())


def test_a_layouts_folder_may_end_like_an_archive(bundle_copy: Path, tmp_path: Path) -> None:
    deploy.run(for_onnxruntime(bundle_copy), f"ort:{tmp_path / 'models.tar'}", Silent())
    assert (tmp_path / "models.tar").is_dir()


@pytest.mark.parametrize("place", ["triton", "triton-python", "ort", "ray", "ovms"])
def test_a_backend_that_nobody_knows(bundle_copy: Path, tmp_path: Path, place: str) -> None:
    targets = json.loads((bundle_copy / manifest.NAME).read_text())["targets"]
    targets["cpu"]["variant"]["backend"] = "other"
    rewritten(bundle_copy, targets=targets)
    with pytest.raises(RecipeError):
        deploy.run(bundle_copy, f"{place}:{tmp_path / 'models'}", Silent())


@pytest.mark.parametrize("place", ["triton", "triton-python", "ort", "ray", "ovms"])
def test_what_a_server_cannot_run_names_an_override_that_exists(
    bundle_copy: Path, tmp_path: Path, place: str
) -> None:
    targets = json.loads((bundle_copy / manifest.NAME).read_text())["targets"]
    targets["cpu"]["variant"]["backend"] = "inductor"
    rewritten(bundle_copy, targets=targets)
    with pytest.raises(RecipeError) as stop:
        deploy.run(
            bundle_copy, f"{place}:{tmp_path / 'models'}", Silent(), trust=preflight.Trust(unsigned=True)
        )
    advised = re.search(r"compile\.backends=\[\w+\]", str(stop.value))
    assert advised
    assert recipe.load("digits-quickstart", [advised[0]]).compile.backends == ("onnxruntime",)


@pytest.mark.parametrize("to", ["triton:{0}/served", "{0}/x.tar", "bundle:{0}", "ort:{0}/../{1}/served"])
def test_a_place_inside_the_bundle_is_refused(bundle_copy: Path, tlx: Tlx, to: str) -> None:
    refused = tlx("deploy", for_onnxruntime(bundle_copy), "--to", to.format(bundle_copy, bundle_copy.name))
    assert refused.code == 2 and "lies in the bundle" in refused.err, refused.err
    preflight.check(bundle_copy)


@pytest.mark.parametrize("content", [b"no array", b"", "few", "wide"])
def test_golden_samples_that_are_none_go_nowhere(
    bundle_copy: Path, tmp_path: Path, content: bytes | str
) -> None:
    golden = bundle_copy / "golden" / "inputs.npy"
    if isinstance(content, bytes):
        golden.write_bytes(content)
    else:
        held = np.load(golden)
        np.save(golden, held[:0] if content == "few" else held.astype(np.float64))
    rewritten(for_onnxruntime(bundle_copy))
    with pytest.raises(BundleError):
        deploy.run(bundle_copy, f"triton:{tmp_path / 'models'}", Silent())
    assert not (tmp_path / "models").exists()
