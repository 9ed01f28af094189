"""Key pairs for the tests, made anew each time: none is kept in the repository."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

PASSWORD = "correct horse"


def pair(
    folder: Path, *, curve: ec.EllipticCurve | None = None, password: str = "", name: str = "key"
) -> tuple[Path, Path]:
    """The private and the public key's file, in PEM."""
    return written(folder, ec.generate_private_key(curve or ec.SECP256R1()), password, name)


def rsa_pair(folder: Path) -> tuple[Path, Path]:
    return written(folder, rsa.generate_private_key(public_exponent=65537, key_size=2048), "", "rsa")


def written(folder: Path, key, password: str, name: str) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    encryption = (
        serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    )
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public
