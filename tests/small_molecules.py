"""A table of small molecules, and a network small enough to be trained on it in a second."""

from __future__ import annotations

from pathlib import Path

import polars as pl

RINGS = ("c1ccccc1", "C1CCCCC1", "c1ccoc1", "c1ccsc1", "C1CCNC1", "C1CC1", "C1CCC1", "C1CCOC1")
TAILS = ("", "C", "CC", "O", "N", "CO", "C(=O)O", "C#N", "Cl", "CCN", "S", "CS")
TINY = (
    "backbone.options={tokens: 16, layers: 1, fingerprint: 16, members: 2, width: 16, depth: 1}",
    "data.molecule.max_length=32",
    "transfer.epochs=3",
    "verify.resamples=200",
)


def write(path: Path) -> Path:
    """A CSV of 96 molecules, with the length of their SMILES as `y`."""
    smiles = [ring + tail for ring in RINGS for tail in TAILS]
    pl.DataFrame({"smiles": smiles, "y": [float(len(one)) for one in smiles]}).write_csv(path)
    return path
