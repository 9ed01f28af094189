"""Canonical SMILES to the graph's inputs: numpy and RDKit alone, so that a server can carry this very file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tlexport.errors import DataError
from tlexport.modalities import molecule_chemistry as chemistry
from tlexport.modalities import molecule_tokenizer

UNKNOWN = "[unknown]"


@dataclass(frozen=True)
class Encoding:
    """`number`: SMILES -> token numbers. Without `bits` the inputs are tokens alone (pretraining)."""

    number: molecule_tokenizer.Numbers
    length: int
    padding: int
    radius: int
    bits: int
    descriptors: tuple[str, ...]

    def dtype(self) -> np.dtype[Any]:
        fields: list[Any] = [("tokens", np.int32, (self.length,))]
        if self.bits:
            fields.append(("fingerprint", np.uint8, (self.bits,)))
            fields.append(("descriptors", np.float32, (len(self.descriptors),)))
        return np.dtype(fields)

    def encode(
        self, molecules: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> NDArray[Any]:
        """Canonical SMILES -> [n], structured with a field an input. Raises DataError for one that is too long."""
        from rdkit import Chem

        encoded = np.zeros(len(molecules), self.dtype())
        encoded["tokens"] = self.padding
        fingerprint = chemistry.fingerprinter(self.radius, self.bits) if self.bits else None
        describe = chemistry.describer(self.descriptors) if self.bits else None
        for row, smiles in enumerate(molecules):
            numbers = self.number(smiles)
            if len(numbers) > self.length:
                raise DataError(
                    f"{smiles} has {len(numbers)} tokens; the graph takes at most {self.length} (data.molecule.max_length)"
                )
            encoded["tokens"][row, : len(numbers)] = numbers
            if fingerprint is not None and describe is not None:
                mol = Chem.MolFromSmiles(smiles)
                encoded["fingerprint"][row], encoded["descriptors"][row] = fingerprint(mol), describe(mol)
            if progress is not None:
                progress(row + 1, len(molecules))
        return encoded
