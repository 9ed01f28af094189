"""Signatures of a bundle by OpenSSF model signing: `model.sig`, over the manifest and every file it lists.

The format is a Sigstore bundle with a DSSE envelope over an in-toto statement, which `model_signing verify` reads as well.
A key pair is an elliptic curve's (P-256, P-384 or P-521); keyless signing asks Sigstore, over the network, for a
certificate of an OpenID Connect identity.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tlexport.bundle.manifest import SIGNATURE
from tlexport.errors import BundleError, NotInstalledError, RecipeError

if TYPE_CHECKING:
    from model_signing import hashing

PASSWORD = "TLEXPORT_KEY_PASSWORD"
CURVES = ("secp256r1", "secp384r1", "secp521r1")
LARGEST_KEY = 64 << 10
_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"

State = Literal["verified", "refused", "not checked", "absent"]
Sign = Callable[[Path], None]


def with_key(private_key: Path) -> Sign:
    """What signs a folder with an elliptic curve's private key in PEM; its password is read from TLEXPORT_KEY_PASSWORD.

    The key is tried now, before any work is done. Raises RecipeError if it cannot be used, NotInstalledError.
    """
    _require_installed()
    password = os.environ.get(PASSWORD)
    _require_usable(private_key, password)

    def sign(folder: Path) -> None:
        from model_signing import signing

        # The library hands the password on as it is, and the key's reader takes bytes.
        secret: Any = password.encode() if password else None
        config = signing.Config().use_elliptic_key_signer(private_key=private_key, password=secret)
        config.set_hashing_config(_hashing()).sign(folder, folder / SIGNATURE)

    return sign


def keyless() -> Sign:
    """What signs a folder with a certificate that Sigstore issues for the identity of who runs this: a CI job's, or a login.

    Raises NotInstalledError; the signing itself raises BundleError where Sigstore cannot be reached or gives no certificate.
    """
    _require_installed()

    def sign(folder: Path) -> None:
        from model_signing import signing

        try:
            config = signing.Config().use_sigstore_signer(use_ambient_credentials=True)
            config.set_hashing_config(_hashing()).sign(folder, folder / SIGNATURE)
        except Exception as error:
            raise BundleError(
                f"keyless signing failed: {_told(error)}; it needs a network and an OpenID Connect identity: "
                "sign with a key instead (--sign-key FILE)"
            ) from error

    return sign


def problem_with_key(bundle: Path, public_key: Path) -> str:
    """Why `model.sig` does not hold for `bundle` by this key; empty if it does. Only regular files may be in the bundle.

    Raises RecipeError if the key itself cannot be used.
    """
    _require_installed()
    _require_public(public_key)
    if why := _not_canonical(bundle / SIGNATURE):
        return why
    from model_signing import verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    return _verified(config, bundle)


def problem_with_identity(bundle: Path, identity: str, provider: str | None) -> str:
    """Why the keyless `model.sig` does not hold for `bundle`, this identity and the issuer that vouches for it."""
    _require_installed()
    if provider is None:
        raise RecipeError(
            "--identity needs --identity-provider: the issuer that vouches for it, for instance https://accounts.google.com"
        )
    from model_signing import verifying

    try:
        config = verifying.Config().use_sigstore_verifier(identity=identity, oidc_issuer=provider)
    except Exception as error:  # noqa: BLE001 (fetching Sigstore's root of trust fails in many ways)
        return f"{SIGNATURE} cannot be checked: Sigstore's root of trust cannot be had ({_told(error)})"
    return _verified(config, bundle)


def _verified(config: Any, bundle: Path) -> str:
    # `current`, a link to the version that runs, is not what the library means by a link in a model.
    bundle = bundle.resolve()
    try:
        config.set_hashing_config(_hashing()).verify(bundle, bundle / SIGNATURE)
    except Exception as error:  # noqa: BLE001 (a forged signature fails in the parser, the curve or the comparison)
        return f"{SIGNATURE} does not hold for this bundle: {_told(error)}"
    return ""


def _hashing() -> hashing.Config:
    """Every file but the signature itself; by default the library would leave out what git uses."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)


def _not_canonical(path: Path) -> str:
    """Why a key's signature is not written as this library writes it; empty if it is.

    White space, unused fields and the spare bits of base64 are covered by no signature: what differs there is refused as well.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        envelope = found["dsseEnvelope"]
        signed = [base64.b64decode(envelope["payload"], validate=True)]
        signed.append(base64.b64decode(envelope["signatures"][0]["sig"], validate=True))
        hint = found["verificationMaterial"]["publicKey"]["hint"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError, binascii.Error):
        return f"{SIGNATURE} is not a signature made with a key pair"
    payload, signature = (base64.b64encode(part).decode() for part in signed)
    expected = {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": payload,
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": signature, "keyid": ""}],
        },
    }
    same = json.dumps(expected, separators=(",", ":"), ensure_ascii=False) == text
    return "" if same else f"{SIGNATURE} was altered: it is not written as a signature is"


def _require_usable(private_key: Path, password: str | None) -> None:
    """Raises RecipeError unless the private key can sign."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    content = _read(private_key)
    try:
        key: Any = serialization.load_pem_private_key(content, password.encode() if password else None)
    except TypeError as error:
        hint = (
            f"it is encrypted: set {PASSWORD}" if not password else f"it is not encrypted: unset {PASSWORD}"
        )
        raise RecipeError(f"{private_key} cannot be used: {hint}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        hint = f"wrong password in {PASSWORD}, or " if password else ""
        raise RecipeError(
            f"{private_key} cannot be used: {hint}not a private key in PEM; make one with: {_MAKE}"
        ) from error
    _require_curve(private_key, key)


def _require_public(public_key: Path) -> None:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    try:
        key: Any = serialization.load_pem_public_key(_read(public_key))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise RecipeError(f"{public_key} cannot be used: not a public key in PEM") from error
    _require_curve(public_key, key)


_MAKE = "openssl ecparam -name prime256v1 -genkey -noout -out key.pem; openssl ec -in key.pem -pubout -out key.pub"


def _require_curve(path: Path, key: Any) -> None:
    name = getattr(getattr(key, "curve", None), "name", None)
    if name not in CURVES:
        raise RecipeError(
            f"{path} cannot be used: {f'its curve is {name}' if name else 'not a key for ECDSA'} "
            f"(curves: {', '.join(CURVES)}); make one with: {_MAKE}"
        )


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # it is read twice, and a device never ends
            raise RecipeError(f"{path} cannot be read: it is no plain file")
        if path.stat().st_size > LARGEST_KEY:
            raise RecipeError(f"{path} is larger than any key")
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from error


def _require_installed() -> None:
    if importlib.util.find_spec("model_signing") is None or importlib.util.find_spec("OpenSSL") is None:
        raise NotInstalledError("model signing", "sign")


def _told(error: Exception) -> str:
    """The first line of an error, at most 200 characters; the library's own messages hold hashes and names alone."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
