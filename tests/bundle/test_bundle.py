"""A bundle is what was packaged, byte for byte, or it is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pipeline import Built, Ended

from tlexport.bundle import choice, describe, manifest, preflight
from tlexport.errors import BundleError, GateError, PreflightError, RunError
from tlexport.results import Variant
from tlexport.run import Run, digest

Cli = Callable[..., Ended]


def edit(bundle: Path, change: Callable[[dict], None]) -> None:
    path = bundle / manifest.NAME
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_what_is_in_it(built: Built) -> None:
    document = preflight.check(built.bundle)
    held = {p.relative_to(built.bundle).as_posix() for p in built.bundle.rglob("*") if p.is_file()}
    assert held == {*document.files, manifest.NAME}
    assert {
        "graphs/fp32.onnx",
        "golden/inputs.npy",
        "golden/outputs.npy",
        "evidence/verify.json",
        "evidence/bench.json",
        "evidence/report.html",
        "evidence/recipe.yaml",
    } < held
    for name, file in document.files.items():
        assert (file.sha256, file.bytes) == (
            digest(built.bundle / name),
            (built.bundle / name).stat().st_size,
        )
    assert set(document.targets) == set(built.targets)
    for entry in document.targets.values():
        assert digest(built.bundle / entry.file) == entry.variant.sha256
        assert json.loads((built.bundle / entry.receipt).read_text())
    assert document.classes == tuple("0123456789") and document.inputs[0].dtype == "uint8"
    assert {"finetune", "export", "quantize", "compile", "verify", "bench"} <= set(
        document.provenance["stages"]
    )


def test_golden_samples_reproduce_in_onnx_runtime(built: Built) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        built.bundle / "graphs/fp32.onnx", providers=["CPUExecutionProvider"]
    )
    inputs, expected = (
        np.load(built.bundle / f"golden/{n}.npy", allow_pickle=False) for n in ("inputs", "outputs")
    )
    (got,) = session.run(None, {"images": inputs})
    assert len(inputs) == 8 and np.ptp(expected) > 0.1  # not a constant
    np.testing.assert_allclose(got, expected, atol=1e-5)
    tests = np.load(built.run / "reference/inputs.npy")
    assert all((tests == sample).all(axis=(1, 2, 3)).any() for sample in inputs)


def test_a_flipped_byte_in_any_file_is_seen(bundle_copy: Path, tlx: Cli) -> None:
    names = sorted(p for p in bundle_copy.rglob("*") if p.is_file())
    assert len(names) >= 9
    for path in names:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        if (
            path.name == manifest.NAME
        ):  # its last byte is white space: a change that means nothing but breaks JSON
            path.write_bytes(b"[" + whole)
        with pytest.raises(BundleError, match=r"altered|not a manifest"):
            describe.describe(bundle_copy)
        path.write_bytes(whole)
    assert describe.describe(bundle_copy).kind == "bundle"
    names[0].write_bytes(names[0].read_bytes() + b"x")
    refused = tlx("inspect", bundle_copy, "--json")
    assert refused.code == 11 and refused.json["kind"] == "PreflightError"


def test_removed_added_and_linked_files_are_seen(bundle_copy: Path, tmp_path: Path) -> None:
    victim = bundle_copy / "golden/inputs.npy"
    outside = Path(shutil.move(victim, tmp_path / "outside.npy"))
    with pytest.raises(BundleError, match=r"golden/inputs\.npy is missing"):
        preflight.check(bundle_copy)
    victim.symlink_to(outside)  # the same bytes, elsewhere
    with pytest.raises(BundleError, match=r"golden/inputs\.npy is a link"):
        preflight.check(bundle_copy)
    victim.unlink()
    shutil.move(outside, victim)
    preflight.check(bundle_copy)
    for name in ("extra.txt", "models/.hidden", "recipe.yaml"):
        (bundle_copy / name).write_text("name: x")
        with pytest.raises(BundleError, match="is not in the manifest"):
            describe.describe(bundle_copy)
        (bundle_copy / name).unlink()
    shutil.move(bundle_copy / "golden", tmp_path / "golden")
    (bundle_copy / "golden").symlink_to(tmp_path / "golden")
    with pytest.raises(BundleError, match="golden is a link"):
        preflight.check(bundle_copy)


def test_a_fifo_in_place_of_a_file_does_not_hang(bundle_copy: Path) -> None:
    (bundle_copy / "golden/inputs.npy").unlink()
    os.mkfifo(bundle_copy / "golden/inputs.npy")
    with pytest.raises(BundleError, match="is missing"):
        preflight.check(bundle_copy)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../../b", "a/./b", ".", "", "manifest.json", "a\0b", "a//b"]
)
def test_names_that_lead_elsewhere_are_refused(bundle_copy: Path, name: str) -> None:
    edit(bundle_copy, lambda document: document["files"].update({name: {"sha256": "0" * 64, "bytes": 1}}))
    with pytest.raises(PreflightError, match=r"outside the bundle|names no file") as refused:
        preflight.check(bundle_copy)
    assert ("name", name) in [(refusal.kind, refusal.file) for refusal in refused.value.refusals]


def test_a_target_whose_file_has_no_hash_is_refused(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda document: document["targets"]["cpu"].update(file="../elsewhere/model.onnx"))
    with pytest.raises(PreflightError, match=r"no hash of what cpu runs: \.\./elsewhere"):
        preflight.check(bundle_copy)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"bundle_version": 0}',
        '{"bundle_version": 2}',
        '{"bundle_version": 3}',
        "[" * 100_000,
        '{"bundle_version": 1, "name": NaN}',
        "\xff",
    ],
)
def test_a_manifest_that_is_none_is_refused(bundle_copy: Path, text: str) -> None:
    (bundle_copy / manifest.NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match="is not a manifest"):
        describe.describe(bundle_copy)


def test_an_oversized_manifest_is_refused_unread(bundle_copy: Path) -> None:
    with (bundle_copy / manifest.NAME).open("r+b") as file:
        file.truncate(manifest.LARGEST_MANIFEST + 1)
    with pytest.raises(BundleError, match="larger than any manifest"):
        manifest.read(bundle_copy)


@pytest.mark.parametrize("held", ["file", "notes", "run"])
def test_what_is_no_bundle_is_not_overwritten(run_copy: Run, tmp_path: Path, tlx: Cli, held: str) -> None:
    out = tmp_path / "out"
    if held == "file":
        out.write_text("thesis")
    elif held == "notes":
        out.mkdir()
        (out / "notes.txt").write_text("thesis")
        (out / manifest.NAME).write_text("{}")
    else:
        out = run_copy.path
    before = digest(out)
    refused = tlx("package", run_copy.path, "--out", out, "--json")
    assert refused.code == (7 if held == "file" else 11), refused
    assert digest(out) == before


def test_a_bundle_is_replaced_whole(run_copy: Run, bundle_copy: Path, tlx: Cli) -> None:
    (bundle_copy / "golden/old.npy").write_text("left by an older version")
    assert tlx("package", run_copy.path, "--out", bundle_copy).code == 0
    assert not (bundle_copy / "golden/old.npy").exists()
    preflight.check(bundle_copy)
    assert [p.name for p in bundle_copy.parent.iterdir() if p.name.startswith(".")] == []


CHANGES = {
    "chosen": lambda run: run / next(v.file for v in variants(run) if v.name in chosen(run)),
    "graph": lambda run: run / "graphs/fp32.onnx",
    "golden": lambda run: run / "golden/outputs.npy",
    "evidence": lambda run: run / "bench.json",
    "weights": lambda run: run / "checkpoint/model.safetensors",
}


def variants(run: Run) -> tuple[Variant, ...]:
    from tlexport.stages import bench

    return bench.load(run).variants


def chosen(run: Run) -> set[str]:
    return {choice.choose("cpu", variants(run)).variant.name}


@pytest.mark.parametrize("what", CHANGES)
def test_files_changed_since_they_were_judged_are_not_packaged(
    run_copy: Run, tmp_path: Path, tlx: Cli, what: str
) -> None:
    path = CHANGES[what](run_copy)
    path.write_bytes(path.read_bytes() + b"\n")
    refused = tlx("package", run_copy.path, "--out", tmp_path / "out", "--json")
    named = path.relative_to(run_copy.path).parts[0]
    assert refused.code in (6, 10) and f"/{named}" in refused.json["error"]
    assert f"tlexport build {run_copy.path}" in refused.json["error"]
    assert not (tmp_path / "out").exists()


def test_a_forged_verdict_is_not_packaged(run_copy: Run, tmp_path: Path, tlx: Cli) -> None:
    """bench.json says whatever an editor says; the record of the run says what was measured."""
    assert tlx("bench", run_copy.path, "gates.max_p50_ms=1e-6").code == 13
    document = json.loads((run_copy / "bench.json").read_text())
    for variant in document["variants"]:
        variant["verdict"] = "pass" if variant["verdict"] == "fail" else variant["verdict"]
    (run_copy / "bench.json").write_text(json.dumps(document))
    assert tlx("package", run_copy.path, "--out", tmp_path / "out").code in (6, 10)
    assert not (tmp_path / "out").exists()


def variant(name: str, **values: object) -> Variant:
    base = {
        "backend": "onnxruntime",
        "target": "cpu",
        "precision": "fp32",
        "verdict": "pass",
        "file": f"variants/{name}/m.onnx",
        "speedup": 1.0,
        "size_bytes": 10,
    }
    return Variant.model_validate({"name": name, **base, **values})


def test_the_fastest_that_passes_is_chosen() -> None:
    found = choice.choose(
        "cpu",
        (
            variant("slow", p50_ms=3.0),
            variant("wrong", p50_ms=0.1, verdict="fail"),
            variant("quick", p50_ms=1.0, speedup=3.0),
            variant("elsewhere", p50_ms=0.2, target="sm89"),
            variant("absent", p50_ms=0.1, file=None),
        ),
    )
    assert (
        found.variant.name == "quick" and "3.00x torch eager" in found.reason and "next slow" in found.reason
    )


def test_the_smallest_is_chosen_where_nothing_could_run() -> None:
    untimed = {"verdict": "compiled, not run here", "p50_ms": None}
    found = choice.choose(
        "cpu", (variant("big", size_bytes=9, **untimed), variant("small", size_bytes=2, **untimed))
    )
    assert found.variant.name == "small" and "was not measured" in found.reason
    timed = choice.choose("cpu", (variant("small", size_bytes=2, **untimed), variant("run", p50_ms=9.0)))
    assert timed.variant.name == "run"  # a measurement outranks a guess


@pytest.mark.parametrize("verdict", ["fail", "refused", "unjudged", "crashed"])
def test_nothing_is_chosen_without_a_passing_verdict(verdict: str) -> None:
    with pytest.raises(GateError, match="no variant for cpu"):
        choice.choose("cpu", (variant("only", verdict=verdict, p50_ms=1.0),))


def test_a_run_is_described_too_and_a_broken_one_is_an_error(run_copy: Run) -> None:
    seen = describe.describe(run_copy.path)
    assert seen.kind == "run" and {"finetune", "bench", "test"} <= set(seen.summary)
    (run_copy / "manifest.json").write_text("{")
    with pytest.raises(RunError):
        describe.describe(run_copy.path)
