"""A signed bundle: whatever byte is changed, it is refused before anything of it is deserialised."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

pytest.importorskip("model_signing")
pytest.importorskip("OpenSSL")

from cryptography.hazmat.primitives.asymmetric import ec
from keys import PASSWORD, pair, rsa_pair
from pipeline import Built, Ended

from tlexport.bundle import describe, manifest, preflight, signing
from tlexport.bundle.preflight import Trust
from tlexport.errors import BundleError, PreflightError, RecipeError
from tlexport.progress import Silent
from tlexport.run import Run
from tlexport.stages import measure, package, predict, replay

Cli = Callable[..., Ended]
CHANGES = 1000
LEAST = 12  # of each file


@pytest.fixture(scope="module")
def signed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A signed bundle, the private key and the public key. To be copied, never changed."""
    folder = tmp_path_factory.mktemp("signed")
    private, public = pair(folder)
    run = Run(shutil.copytree(built.run, folder / "run"))
    package.run(run, run.recipe, Silent(), out=folder / "bundle", sign=signing.with_key(private))
    return folder / "bundle", private, public


@pytest.fixture
def copy(signed: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(signed[0], tmp_path / "bundle"))


def reached(*args: Any, **options: Any) -> NoReturn:
    raise AssertionError("something of the bundle was deserialised")


def close_every_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever turns a file of a bundle into more than bytes and text ends the test."""
    import onnx
    import onnxruntime
    import torch

    from tlexport.backends import isolation, registry

    for place, name in (
        (np, "load"),
        (onnx, "load"),
        (onnx, "load_model"),
        (onnx, "load_model_from_string"),
        (onnxruntime, "InferenceSession"),
        (torch, "load"),
        (torch._inductor, "aoti_load_package"),
        (isolation, "call"),  # what runs in a child process
        (registry, "loader"),
        (registry, "predict"),
    ):
        monkeypatch.setattr(place, name, reached)


def test_one_of_a_thousand_changed_bytes_is_refused_before_deserialising(
    signed: tuple[Path, Path, Path], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trust = Trust(public_key=signed[2])
    assert preflight.check(copy, trust=trust, target="cpu").name
    close_every_door(monkeypatch)
    readers: list[Callable[[], object]] = [
        lambda: preflight.check(copy, trust=trust),
        lambda: predict.run(copy, "nothing", Silent(), out=Path("nothing"), trust=trust),
        lambda: replay.run(copy, Silent(), trust=trust),
        lambda: measure.subject(copy, None, trust),
    ]
    with pytest.raises(AssertionError, match="was deserialised"):
        replay.run(copy, Silent(), trust=trust)  # the doors are where an unchanged bundle would go through
    with pytest.raises(AssertionError, match="was deserialised"):
        measure.subject(copy, None, trust)
    random = np.random.default_rng(0)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    assert {copy / manifest.NAME, copy / manifest.SIGNATURE} < set(files)
    drawn = random.choice(len(files), CHANGES - LEAST * len(files))
    refusals = 0
    for number, index in enumerate([*np.repeat(np.arange(len(files)), LEAST), *drawn]):
        path = files[index]
        whole = path.read_bytes()
        position, change = int(random.integers(len(whole))), int(random.integers(1, 256))
        altered = bytearray(whole)
        altered[position] ^= change
        path.write_bytes(altered)
        with pytest.raises(PreflightError) as refused:
            readers[number % len(readers)]()
        assert refused.value.untrusted, (path, position, change)
        refusals += 1
        path.write_bytes(whole)
    assert refusals == CHANGES
    assert preflight.check(copy, trust=trust, target="cpu").name


def rewritten(bundle: Path, change: Callable[[dict[str, Any]], Any], **form: Any) -> None:
    path = bundle / manifest.SIGNATURE
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, **{"separators": (",", ":"), **form}))


def spare_bits(text: str) -> str:
    """The same bytes in base64, with a bit set that stands for none of them."""
    assert text.endswith("=")
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    body = text.rstrip("=")
    other = body[:-1] + alphabet[alphabet.index(body[-1]) ^ 1] + "=" * (len(text) - len(body))
    assert base64.b64decode(other) == base64.b64decode(text) and other != text
    return other


def signature_of(bundle: Path) -> str:
    document = json.loads((bundle / manifest.SIGNATURE).read_text())
    return str(document["dsseEnvelope"]["signatures"][0]["sig"])


def pad_payload(document: dict[str, Any]) -> None:
    envelope = document["dsseEnvelope"]
    envelope["signatures"][0]["sig"] = spare_bits(envelope["signatures"][0]["sig"])


@pytest.mark.parametrize(
    ("change", "form"),
    [
        (lambda d: None, {"separators": (", ", ": ")}),
        (lambda d: None, {"indent": 1}),
        (lambda d: d.update(note="x"), {}),
        (lambda d: d["dsseEnvelope"]["signatures"][0].update(keyid="x"), {}),
        (lambda d: d["verificationMaterial"].update(timestampVerificationData={}), {}),
        (lambda d: d["verificationMaterial"]["publicKey"].pop("hint"), {}),
        (lambda d: d["dsseEnvelope"]["signatures"].append({"sig": "", "keyid": ""}), {}),
        (pad_payload, {}),
    ],
)
def test_what_no_signature_covers_may_not_differ_either(
    signed: tuple[Path, Path, Path], copy: Path, change: Callable[[Any], Any], form: dict[str, Any]
) -> None:
    while change is pad_payload and not signature_of(copy).endswith("="):
        (copy / manifest.SIGNATURE).unlink()  # a third of the signatures has a length without spare bits
        signing.with_key(signed[1])(copy)
    original = (copy / manifest.SIGNATURE).read_bytes()
    rewritten(copy, change, **form)
    assert (copy / manifest.SIGNATURE).read_bytes() != original
    with pytest.raises(PreflightError, match=r"model\.sig was altered|is not a signature made"):
        preflight.check(copy, trust=Trust(public_key=signed[2]))


def test_no_other_key_no_other_bundles_signature_and_none_at_all(
    signed: tuple[Path, Path, Path], copy: Path, tmp_path: Path
) -> None:
    _, other = pair(tmp_path, name="other")
    with pytest.raises(PreflightError, match="does not hold for this bundle"):
        preflight.check(copy, trust=Trust(public_key=other))
    trust = Trust(public_key=signed[2])
    receipt = copy / "models/cpu/receipt.json"
    receipt.write_bytes(receipt.read_bytes() + b"\n")
    document = json.loads((copy / manifest.NAME).read_text())
    from tlexport.run import digest

    document["files"]["models/cpu/receipt.json"] = {
        "sha256": digest(receipt),
        "bytes": receipt.stat().st_size,
    }
    (copy / manifest.NAME).write_text(json.dumps(document))
    assert preflight.check(copy)  # every hash holds
    with pytest.raises(PreflightError, match="does not hold for this bundle"):
        preflight.check(copy, trust=trust)
    with pytest.raises(RecipeError, match="not a public key in PEM"):
        preflight.check(copy, trust=Trust(public_key=signed[1]))
    (copy / manifest.SIGNATURE).unlink()
    with pytest.raises(PreflightError, match="has no signature"):
        preflight.check(copy, trust=trust)
    (copy / manifest.SIGNATURE).write_bytes(b"x" * (preflight.LARGEST_SIGNATURE + 1))
    with pytest.raises(PreflightError, match="larger than any signature"):
        preflight.check(copy, trust=trust)


@pytest.mark.parametrize("name", [".gitignore", ".git/config", ".gitattributes"])
def test_files_that_the_library_would_leave_out_are_signed_too(
    signed: tuple[Path, Path, Path], copy: Path, name: str
) -> None:
    """model_signing by default ignores what git uses: planted there, a file is seen twice over."""
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("x")
    with pytest.raises(PreflightError) as refused:
        preflight.check(copy, trust=Trust(public_key=signed[2]))
    assert {refusal.kind for refusal in refused.value.refusals} == {"unlisted", "signature"}


def test_the_library_itself_verifies_it_whatever_the_directory_is_called(
    signed: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    from model_signing import verifying

    moved = Path(shutil.copytree(signed[0], tmp_path / "renamed"))
    config = verifying.Config().use_elliptic_key_verifier(public_key=signed[2])
    config.verify(moved, moved / manifest.SIGNATURE)
    (moved / "golden/inputs.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="golden/inputs"):
        config.verify(moved, moved / manifest.SIGNATURE)


def test_a_link_to_the_bundle_that_runs_is_followed(signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(signed[0])
    preflight.check(tmp_path / "current", trust=Trust(public_key=signed[2]))


def test_signed_on_the_command_line_and_verified(
    built: Built, run_copy: Run, tmp_path: Path, tlx: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = pair(tmp_path, curve=ec.SECP384R1(), password=PASSWORD)
    monkeypatch.setenv(signing.PASSWORD, PASSWORD)
    out = tmp_path / "bundle"
    made = tlx("package", run_copy.path, "--sign-key", private, "--out", out, "--json")
    assert made.code == 0 and made.json["signed"], made
    assert PASSWORD not in made.out + made.err
    secret = b"".join(private.read_bytes().splitlines()[1:-1])
    for path in out.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes().replace(b"\n", b"")
    seen = tlx("verify-bundle", out, "--public-key", public, "--json")
    assert seen.code == 0 and seen.json["signature"] == "verified" and seen.json["refusals"] == []
    assert seen.json["targets"]["cpu"]["refusals"] == []
    assert tlx("verify-bundle", out, "--json").json["signature"] == "not checked"
    assert tlx("verify-bundle", built.bundle, "--json").json["signature"] == "absent"
    refused = tlx("verify-bundle", built.bundle, "--public-key", public, "--json")
    assert refused.code == 11 and "has no signature" in refused.err
    monkeypatch.setenv("TLEXPORT_PUBLIC_KEY", str(public))
    assert tlx("verify", out, "--json").code == 0
    refused = tlx("verify", built.bundle, "--json")
    assert refused.code == 11 and refused.json["kind"] == "PreflightError"


def test_a_key_that_cannot_sign_is_told_before_any_work(
    run_copy: Run, tmp_path: Path, tlx: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked, _ = pair(tmp_path, password=PASSWORD, name="locked")
    plain, public = pair(tmp_path, name="plain")
    koblitz, _ = pair(tmp_path, curve=ec.SECP256K1(), name="koblitz")
    rsa, _ = rsa_pair(tmp_path)
    (tmp_path / "text").write_text("key")
    out = tmp_path / "out"

    def told(path: Path) -> str:
        done = tlx("package", run_copy.path, "--sign-key", path, "--out", out)
        assert done.code == 2 and not out.exists(), done
        return done.err

    monkeypatch.delenv(signing.PASSWORD, raising=False)
    assert "it is encrypted: set TLEXPORT_KEY_PASSWORD" in told(locked)
    monkeypatch.setenv(signing.PASSWORD, "wrong")
    assert "wrong password in TLEXPORT_KEY_PASSWORD" in told(locked)
    assert "it is not encrypted: unset TLEXPORT_KEY_PASSWORD" in told(plain)
    monkeypatch.delenv(signing.PASSWORD)
    assert "its curve is secp256k1" in told(koblitz)
    assert "not a key for ECDSA" in told(rsa)
    assert "not a private key in PEM; make one with: openssl ecparam" in told(tmp_path / "text")
    assert "not a private key in PEM" in told(public)
    assert "No such file" in told(tmp_path / "absent")
    os.mkfifo(tmp_path / "pipe")
    for endless in (Path("/dev/zero"), tmp_path / "pipe", tmp_path):
        assert "it is no plain file" in told(endless)


def test_keyless_without_a_network_fails_cleanly(
    run_copy: Run, signed: tuple[Path, Path, Path], tmp_path: Path, tlx: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*args: Any, **options: Any) -> NoReturn:
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    done = tlx("package", run_copy.path, "--sign-keyless", "--out", tmp_path / "out")
    assert done.code == 11 and "keyless signing failed" in done.err and "--sign-key" in done.err
    assert not (tmp_path / "out").exists()
    who = ("--identity", "someone@example.org", "--identity-provider", "https://issuer.example.org")
    refused = tlx("verify-bundle", signed[0], *who, "--json")
    assert refused.code == 11 and refused.json["signature"] == "refused"


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        ("package", ("--sign-key", "k", "--sign-keyless"), "choose one"),
        ("verify-bundle", ("--identity", "a"), "belong together"),
        ("verify-bundle", ("--identity", "a", "--identity-provider", "b", "--public-key", "k"), "give one"),
    ],
)
def test_flags_that_exclude_each_other(
    built: Built, tlx: Cli, command: str, flags: tuple[str, ...], said: str
) -> None:
    done = tlx(command, built.run if command == "package" else built.bundle, *flags)
    assert done.code == 2 and said in done.err


def test_what_fails_while_it_is_signed_leaves_no_bundle(run_copy: Run, tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        assert (folder / manifest.NAME).is_file()
        raise BundleError("keyless signing failed")

    with pytest.raises(BundleError, match="keyless"):
        package.run(run_copy, run_copy.recipe, Silent(), out=tmp_path / "out", sign=fails)
    assert not list(tmp_path.glob("*out*"))


def test_inspect_reads_a_signed_bundle(signed: tuple[Path, Path, Path]) -> None:
    assert describe.describe(signed[0]).kind == "bundle"
