"""What preflight refuses, each reason with its kind, and which machine a bundle fits; nothing of it is ever loaded."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import junit_file
import pytest
from changed_bundles import rewritten
from pipeline import Built, Ended

from tlexport.bundle import fit, manifest, names, preflight
from tlexport.bundle.manifest import Entry, Manifest, Needs, Platform
from tlexport.bundle.preflight import Trust
from tlexport.errors import PreflightError
from tlexport.results import Variant
from tlexport.stages import verify_bundle

Tlx = Callable[..., Ended]

HERE = fit.Here(
    system="Linux",
    machine="x86_64",
    isa=("avx2", "fma"),
    gpu="sm89",
    cuda=(13, 0),
    installed={
        "onnxruntime-gpu": "1.31.1",
        "openvino": "2026.1.0",
        "tensorrt": "11.1.0.106",
        "tensorrt-rtx": "1.7.1.116",
        "torch": "2.14.1",
    },
    cuda_wheels={"tensorrt-rtx": 13},
)


def edited(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / manifest.NAME
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def kinds(bundle: Path, **asked: Any) -> list[str]:
    with pytest.raises(PreflightError) as refused:
        preflight.check(bundle, **asked)
    return [refusal.kind for refusal in refused.value.refusals]


def test_a_bundle_as_packaged_passes_with_and_without_its_target(built: Built) -> None:
    assert preflight.check(built.bundle) == preflight.check(built.bundle, target="cpu")
    document = manifest.read(built.bundle)
    assert document.bundle_version == 2
    assert document.platform and document.platform.machine == platform.machine()
    needs = document.targets["cpu"].needs
    assert needs and needs.opset == 20 and needs.ir and needs.version


def test_every_reason_is_told_at_once(bundle_copy: Path) -> None:
    golden = bundle_copy / "golden/inputs.npy"
    golden.write_bytes(golden.read_bytes()[:-1] + b"\xff")
    (bundle_copy / "golden/outputs.npy").unlink()
    (bundle_copy / "extra").write_text("x")
    (bundle_copy / "away").symlink_to("/etc")
    os.mkfifo(bundle_copy / "pipe")
    receipt = bundle_copy / "models/cpu/receipt.json"
    receipt.write_bytes(receipt.read_bytes() + b" ")
    edited(
        bundle_copy,
        lambda d: d["files"].update(
            {
                "../x": {"sha256": "0" * 64, "bytes": 1},
                "vast": {"sha256": "0" * 64, "bytes": preflight.LARGEST_BUNDLE + 1},
            }
        ),
    )
    assert {"altered", "missing", "unlisted", "link", "special", "size", "name"} <= set(
        kinds(bundle_copy, target="sm75")
    )
    assert kinds(bundle_copy, target="sm75")[-1] == "target"  # trust goes before this machine


@pytest.mark.parametrize("name", manifest.ALWAYS)
def test_what_every_bundle_holds_must_be_listed(bundle_copy: Path, name: str) -> None:
    (bundle_copy / name).unlink()
    edited(bundle_copy, lambda document: document["files"].pop(name))
    assert kinds(bundle_copy) == ["unlisted"]


def test_what_is_no_bundle_is_told_by_what_it_is(built: Built, bundle_copy: Path, tmp_path: Path) -> None:
    edited(bundle_copy, lambda document: document.update(targets={}))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / manifest.NAME).write_text("[]")
    for path, says in {
        built.run: "is a run, not a bundle",
        built.bundle / manifest.NAME: "it is a file",
        tmp_path / "gone": "it is not there",
        tmp_path / "list": "no JSON object",
        bundle_copy: "targets",
    }.items():
        with pytest.raises(PreflightError, match=says) as refused:
            preflight.check(path)
        assert [refusal.kind for refusal in refused.value.refusals] == ["manifest"]


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []},
        {"outputs": []},
        {"batch": {"min": 1, "opt": 1, "max": 10**12}},
        {"batch": {"min": 1, "opt": 1, "max": 10**30}},
        {"bundle_version": True},
        {"bundle_version": 2.0},
    ],
)
def test_a_manifest_of_no_model_is_no_manifest(bundle_copy: Path, change: dict[str, Any]) -> None:
    edited(bundle_copy, lambda document: document.update(change))
    assert kinds(bundle_copy) == ["manifest"]


def test_a_later_version_is_refused_as_one(bundle_copy: Path) -> None:
    edited(bundle_copy, lambda d: d.update(bundle_version=3, new_field=1))
    with pytest.raises(
        PreflightError, match=r"has version 3, and versions 1 to 2 are known; update tlexport"
    ):
        preflight.check(bundle_copy)
    assert kinds(bundle_copy) == ["version"]


def back_to_version_1(document: dict[str, Any]) -> None:
    document["bundle_version"] = 1
    del document["platform"]
    for entry in document["targets"].values():
        del entry["needs"]


def test_a_bundle_of_version_1_is_still_read(bundle_copy: Path) -> None:
    edited(bundle_copy, back_to_version_1)
    document = preflight.check(bundle_copy, target="cpu")
    assert document.bundle_version == 1 and document.platform is None
    entry = document.targets["cpu"]
    compiled = document.provenance["stages"]["compile"]
    assert fit.needs(entry, document).version in {
        compiled[name] for name in compiled if name in fit.PACKAGES[entry.variant.backend]
    }


def test_the_published_schemas_are_current_and_manifests_keep_them(built: Built, bundle_copy: Path) -> None:
    schemas = Path(__file__).parents[2] / "docs/schemas"
    published = {n: json.loads((schemas / f"bundle-v{n}.json").read_text()) for n in (1, 2)}
    assert published[2] == manifest.schema()
    assert [published[n]["$id"] for n in (1, 2)] == ["urn:tlexport:schema:bundle:1", manifest.SCHEMA_ID]
    document = json.loads((built.bundle / manifest.NAME).read_text())
    jsonschema.Draft202012Validator.check_schema(published[2])
    jsonschema.validate(document, published[2])
    edited(bundle_copy, back_to_version_1)
    jsonschema.validate(json.loads((bundle_copy / manifest.NAME).read_text()), published[1])
    for broken in ({"bundle_version": 3}, {"files": {"a": {"sha256": "x", "bytes": 1}}}, {"other": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document | broken, published[2])


def test_a_directory_of_endless_files_is_not_read_to_its_end(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "MOST_FILES", 10)
    for number in range(30):
        (bundle_copy / str(number)).touch()
    assert "size" in kinds(bundle_copy)


@pytest.mark.parametrize(
    "name",
    [
        "../secret", "/etc/passwd", "a/../../b", "..", "a/..", "C:/x", "c:x", "\\\\host\\share", "a\\..\\b", "\\x",
        "", ".", "./a", "a/./b", "a//b", "a/", "a\0b", "a\nb", "con", "NUL.txt", "a/aux", "com1", "LPT9.x", "a/prn.json",
        "trailing.", "trailing ", "a /b", "a:stream", "x*", "q?", "é", "a" * 300, "/".join("a" * 20),
    ],
)  # fmt: skip
def test_names_that_no_bundle_may_have(name: str) -> None:
    assert names.problem(name)


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "models/cpu/model.onnx", "a.b/c-d_e", "console", "com", ".hidden", "a..b", "null"],
)
def test_names_that_a_bundle_may_have(name: str) -> None:
    assert names.problem(name) == ""


def test_names_that_some_file_systems_take_for_one(bundle_copy: Path) -> None:
    assert names.collisions(["a", "b/c", "b/d"]) == []
    assert names.collisions(["a/B", "a/b"]) == ["a/B", "a/b"]
    assert names.collisions(["A/x", "a/y"]) == ["a/y"]
    assert names.collisions(["a", "A/x"]) == ["A/x"]
    edited(
        bundle_copy,
        lambda d: d["files"].update({"GOLDEN/inputs.npy": d["files"]["golden/inputs.npy"]}),
    )
    assert "name" in kinds(bundle_copy)


@pytest.mark.parametrize("name", ["MANIFEST.json", "Model.sig", "model.sig"])
def test_the_names_of_the_manifest_and_the_signature_are_taken(bundle_copy: Path, name: str) -> None:
    edited(bundle_copy, lambda d: d["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    assert "name" in kinds(bundle_copy)


def bundle_of(backend: str, target: str, *, version: str = "", options: Any = None, **needs: Any) -> Manifest:
    variant = Variant(name="v", backend=backend, target=target, precision="fp32", options=options or {})
    package = fit.PACKAGES.get(backend, (backend,))[0]
    built = version or HERE.installed.get(package, "1.0")
    entry = Entry(
        variant=variant,
        file="models/m",
        receipt="models/r",
        reason="",
        needs=Needs(package=package, version=built, **needs),
    )
    made = Manifest.model_construct(
        targets={target: entry}, platform=Platform(system="Linux", machine="x86_64", isa=("avx2",))
    )
    return made


@pytest.mark.parametrize(
    ("backend", "target", "asked", "here", "kind", "said"),
    [
        ("tensorrt", "sm90", {}, {}, "target", "its GPU is sm89"),
        ("tensorrt", "sm89", {"version": "11.0.0.1"}, {}, "library", "no other version loads it"),
        ("tensorrt", "sm89", {"version": "12.0.0"}, {}, "library", "built by 12.0.0"),
        (
            "tensorrt", "sm89", {"version": "11.2.0", "options": {"version_compatible": True}}, {},
            "library", "an older one does not load it",
        ),
        ("tensorrt_rtx", "sm89", {"version": "1.6.0"}, {}, "library", "no other version loads it"),
        ("tensorrt_rtx", "sm89", {}, {"cuda": (12, 8)}, "driver", "runs CUDA 12.8 at most"),
        ("tensorrt_rtx", "sm89", {}, {"cuda": None, "gpu": ""}, "driver", "no NVIDIA driver"),
        ("tensorrt_rtx", "sm89", {}, {"gpu": ""}, "driver", "finds no usable GPU"),
        ("tensorrt", "sm89", {}, {"system": "Windows"}, "system", "built on Linux"),
        ("inductor", "cpu", {}, {"machine": "aarch64"}, "system", "compiled for Linux on x86_64"),
        ("inductor", "cpu", {}, {"isa": ("avx",)}, "code", "a CPU with avx2, which this one has not"),
        ("inductor", "cpu", {"version": "2.15.0"}, {}, "library", "an older torch does not load it"),
        ("openvino", "cpu", {}, {"installed": {}}, "library", "pip install 'tlexport[openvino]'"),
        ("onnxruntime", "cpu", {"version": "1.40.0", "opset": 27, "ir": 10}, {}, "library", "opset 27"),
        ("onnxruntime", "cpu", {"version": "1.40.0", "opset": 20, "ir": 13}, {}, "library", "IR version 13"),
        ("tpu", "cpu", {}, {}, "library", "is not one of this tlexport"),
    ],
)  # fmt: skip
def test_what_cannot_run_here_is_told_from_the_manifest(
    backend: str, target: str, asked: dict[str, Any], here: dict[str, Any], kind: str, said: str
) -> None:
    found = fit.refusals(bundle_of(backend, target, **asked), target, replace(HERE, **here))
    assert [(refusal.kind, refusal.untrusted) for refusal in found] == [(kind, False)]
    assert said in found[0].reason


@pytest.mark.parametrize(
    ("backend", "target", "asked"),
    [
        ("onnxruntime", "cpu", {"opset": 23, "ir": 11}),
        ("onnxruntime", "cpu", {"version": "1.40.0", "opset": 20, "ir": 10}),  # a newer builder, an old graph
        ("onnxruntime", "sm89", {"opset": 20, "ir": 10}),
        ("openvino", "cpu", {"version": "2027.1"}),
        ("tensorrt", "sm89", {}),
        ("tensorrt", "sm89", {"version": "10.13.0", "options": {"version_compatible": True}}),
        ("tensorrt_rtx", "sm89", {}),
        ("inductor", "cpu", {"version": "2.13.0+cpu"}),
    ],
)
def test_what_can_run_here_is_let_through(backend: str, target: str, asked: dict[str, Any]) -> None:
    assert fit.refusals(bundle_of(backend, target, **asked), target, HERE) == ()


def test_this_machine_is_described_as_it_is() -> None:
    import onnxruntime

    here = fit.here()
    assert here.machine == platform.machine() and here.installed["torch"]
    assert onnxruntime.__version__ in here.installed.values()


@pytest.mark.parametrize("backend", fit.CODE)
def test_code_needs_a_signature_or_a_word_of_trust(bundle_copy: Path, backend: str) -> None:
    edited(bundle_copy, lambda d: d["targets"]["cpu"]["variant"].update(backend=backend))
    assert "unsigned" in kinds(bundle_copy, target="cpu")
    trusted = preflight.report(bundle_copy, Trust(unsigned=True), "cpu").targets["cpu"]
    assert trusted.is_code and "unsigned" not in [refusal.kind for refusal in trusted.refusals]


def read_junit(path: Path, kind: str) -> list[tuple[str, str]]:
    return [of for of in junit_file.read(path.read_text()).values() if of[0] == kind]


@pytest.mark.parametrize("fault", ["altered", "signature"])
def test_nothing_is_said_of_the_targets_of_a_refused_bundle(
    bundle_copy: Path, tmp_path: Path, tlx: Callable[..., Ended], fault: str
) -> None:
    sound = tlx("verify-bundle", bundle_copy, "--target", "cpu", "--junit", tmp_path / "sound.xml")
    assert sound.code == 0 and "can be loaded here" in sound.out
    assert len(read_junit(tmp_path / "sound.xml", "pass")) == 2, "the bundle and its target"
    if fault == "altered":
        golden = bundle_copy / "golden/inputs.npy"
        golden.write_bytes(golden.read_bytes()[:-1] + b"\xff")
        flags: list[object] = []
    else:
        flags = ["--public-key", tmp_path / "key.pub"]
    junit = tmp_path / "bundle.xml"
    said = tlx("verify-bundle", bundle_copy, *flags, "--junit", junit)
    assert said.code == 11
    assert fault in " ".join(text for kind, text in read_junit(junit, "fail"))
    assert [text for _, text in read_junit(junit, "skipped")] == [
        "not looked at: the bundle is refused"
    ] * len(manifest.read(bundle_copy).targets)
    text = " ".join(said.out.split())
    assert "not looked at: the bundle is refused" in text and "can be loaded" not in text
    result = tlx("verify-bundle", bundle_copy, *flags, "--json").json
    assert fault in [refusal["kind"] for refusal in result["refusals"]]
    assert {of["loadable"] for of in result["targets"].values()} == {None}


def test_a_target_is_loadable_or_says_why_not(bundle_copy: Path) -> None:
    assert preflight.report(bundle_copy).targets["cpu"].loadable is True
    edited(bundle_copy, lambda d: d["targets"]["cpu"]["variant"].update(backend="inductor"))
    found = preflight.report(bundle_copy).targets["cpu"]
    assert found.loadable is False and "unsigned" in [refusal.kind for refusal in found.refusals]


def test_a_target_that_cannot_be_loaded_is_a_failure_only_where_none_can(bundle_copy: Path) -> None:
    def verdicts() -> list[str]:
        return [case.verdict for case in verify_bundle.cases(verify_bundle.run(bundle_copy))]

    edited(bundle_copy, lambda d: d.update(targets={"cpu": d["targets"]["cpu"]}))
    other = json.loads((bundle_copy / manifest.NAME).read_text())["targets"]["cpu"]
    other["variant"].update(backend="tensorrt", target="sm75")
    edited(bundle_copy, lambda d: d["targets"].update(sm75=other))
    assert verdicts() == ["pass", "pass", "skipped"]
    edited(bundle_copy, lambda d: d["targets"].pop("cpu"))
    assert verdicts() == ["pass", "fail"]
    assert verify_bundle.failure(verify_bundle.run(bundle_copy)) is not None


def test_nothing_that_a_bundle_says_is_obeyed_by_the_terminal(bundle_copy: Path, tlx: Tlx) -> None:
    rewritten(bundle_copy, name="a\x1b[2J\r\u202eb", backbone="\ud800\\[/red]", reference=None)
    odd = os.fsencode(bundle_copy) + b"/\xff\x1b[31m"
    os.close(os.open(odd, os.O_CREAT))
    refused = tlx("verify-bundle", str(bundle_copy))
    assert refused.code == 11
    Path(os.fsdecode(odd)).unlink()
    shown = tlx("inspect", str(bundle_copy))
    assert shown.code == 0, shown.err
    for text in (refused.out, refused.err, shown.out, shown.err):
        assert not any(c in text for c in "\x1b\r\u202e")
    assert r"a\x1b[2J\r\u202eb" in shown.out and r"\ud800\[/red]" in shown.out
    assert "not known" in shown.out


@pytest.mark.parametrize("size", [1 << 63, 10**400, int("9" * 4299)])
def test_a_size_beyond_any_file_is_a_reason_and_no_crash(bundle_copy: Path, tlx: Tlx, size: int) -> None:
    def changed(document: dict) -> None:
        for file in document["files"].values():
            file["bytes"] = size

    edited(bundle_copy, changed)
    found = tlx("verify-bundle", str(bundle_copy))
    assert found.code == 11 and "bytes" in found.err, found.err


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"name":', '"name": "other", "name":', "'name' is there twice"),
        ('"sha256":', '"sha256": "", "sha256":', "'sha256' is there twice"),
        ('"bytes":', '"bytes": NaN, "more":', "NaN is no number"),
        ('"max":', '"max": -Infinity, "more":', "-Infinity is no number"),
    ],
)
def test_json_that_readers_understand_differently_is_no_manifest(
    bundle_copy: Path, old: str, new: str, said: str
) -> None:
    path = bundle_copy / manifest.NAME
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(PreflightError) as stop:
        preflight.check(bundle_copy)
    assert said in str(stop.value)
