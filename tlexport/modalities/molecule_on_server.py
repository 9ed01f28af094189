"""A SMILES to the graph's inputs, on a server: what stands here needs numpy and RDKit (and tokenizers, for a Hugging Face one)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tlexport.errors import DataError
from tlexport.modalities import molecule_chemistry as chemistry
from tlexport.modalities import molecule_tokenizer
from tlexport.modalities.molecule_encoding import UNKNOWN, Encoding


def prepare(
    preprocessing: Mapping[str, Any], names: Sequence[str]
) -> Callable[[bytes], dict[str, np.ndarray]]:
    """A function from a SMILES in UTF-8, any that RDKit reads, to one sample's inputs by name.

    It raises ValueError or DataError for what is no molecule, or too long. Raises DataError if RDKit is not the one that
    prepared the training data: the canonical form and the descriptors depend on it.
    """
    if preprocessing["rdkit"] != chemistry.version():
        raise DataError(
            f"RDKit {chemistry.version()} is installed here, {preprocessing['rdkit']} prepared the training data"
        )
    number: molecule_tokenizer.Numbers = (
        molecule_tokenizer.HuggingFace(preprocessing["tokenizer"])
        if preprocessing.get("tokenizer")
        else molecule_tokenizer.Regex(tuple(preprocessing["vocabulary"]), UNKNOWN)
    )
    encoding = Encoding(
        number=number,
        length=preprocessing["length"],
        padding=preprocessing["padding"],
        radius=preprocessing["radius"],
        bits=preprocessing["bits"],
        descriptors=tuple(preprocessing["descriptors"]),
    )

    def sample(content: bytes) -> dict[str, np.ndarray]:
        with chemistry.quiet():
            row = encoding.encode([chemistry.canonical(content.decode().strip())])[0]
        return {name: np.asarray(row[name]) for name in names}

    return sample
