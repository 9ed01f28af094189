"""How a SMILES becomes the graph's inputs, frozen in the run: what cannot live in a graph, exactly enough to repeat it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from tlexport.errors import DataError
from tlexport.modalities import molecule_chemistry as chemistry
from tlexport.modalities import molecule_tokenizer
from tlexport.modalities.molecule_encoding import UNKNOWN, Encoding

PAD, MASK = "[pad]", "[mask]"
SPECIAL = (PAD, UNKNOWN, MASK)
RADIUS, BITS = 2, 2048


class Preparation(BaseModel):
    """`vocabulary`: a token's place in it is its number. Without `bits` the inputs are tokens alone (pretraining).

    `tokenizer` is a Hugging Face tokenizer's own file where its network reads the SMILES; `vocabulary` then is empty.
    """

    model_config = ConfigDict(frozen=True)

    smiles: str
    target: tuple[str, ...]
    missing: tuple[str, ...]
    vocabulary: tuple[str, ...]
    pattern: str = chemistry.PATTERN
    length: int
    radius: int = RADIUS
    bits: int = BITS
    descriptors: tuple[str, ...] = chemistry.DESCRIPTORS
    rdkit: str
    tokenizer: str | None = None
    padding: int = 0

    def describe(self) -> dict[str, Any]:
        """As JSON; `Preparation.model_validate` takes the same back."""
        read = (
            "by `tokenizer` (the contents of a Hugging Face tokenizer.json) with its special tokens, truncation off"
            if self.tokenizer
            else f"cut by `pattern`; a token's number is its place in `vocabulary` from 0, any other token is {UNKNOWN}"
        )
        steps = {
            "canonical": "RDKit's canonical isomeric SMILES: Chem.MolToSmiles(Chem.MolFromSmiles(smiles))",
            "tokens": f"int32 [n, {self.length}]: the canonical SMILES {read}; filled up with {self.padding}; "
            "longer molecules are not taken",
        }
        if self.bits:
            steps |= {
                "fingerprint": f"uint8 [n, {self.bits}]: rdFingerprintGenerator.GetMorganGenerator(radius={self.radius}, "
                f"fpSize={self.bits}).GetCountFingerprint, counts above 255 as 255",
                "descriptors": f"float32 [n, {len(self.descriptors)}]: rdkit.Chem.Descriptors of the names in "
                "`descriptors`, in this order, NaN where not finite",
            }
        return {"inputs": steps, **self.model_dump(mode="json")}

    def dtype(self) -> np.dtype[Any]:
        return self.encoding().dtype()

    def encode(
        self, molecules: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> NDArray[Any]:
        """Canonical SMILES -> [n], structured with a field an input. Raises DataError for one that is too long."""
        return self.encoding().encode(molecules, progress)

    def encoding(self) -> Encoding:
        return Encoding(
            number=self.numbers(),
            length=self.length,
            padding=self.padding,
            radius=self.radius,
            bits=self.bits,
            descriptors=self.descriptors,
        )

    def numbers(self) -> molecule_tokenizer.Numbers:
        """What gives a canonical SMILES its token numbers."""
        if self.tokenizer:
            return molecule_tokenizer.HuggingFace(self.tokenizer)
        return molecule_tokenizer.Regex(self.vocabulary, UNKNOWN)


def vocabulary(molecules: Iterable[str]) -> tuple[str, ...]:
    """The special tokens, then those of the molecules by falling frequency (equals in order)."""
    counts = Counter(token for smiles in molecules for token in chemistry.tokens(smiles))
    return (*SPECIAL, *sorted(counts, key=lambda token: (-counts[token], token)))


def from_description(description: Mapping[str, Any]) -> Preparation:
    """Raises DataError for a description that is not of molecules."""
    fields = {key: value for key, value in description.items() if key in Preparation.model_fields}
    if lacking := [
        key for key, field in Preparation.model_fields.items() if field.is_required() and key not in fields
    ]:
        raise DataError(f"this preprocessing is not of molecules: it lacks {', '.join(lacking)}")
    return Preparation.model_validate(fields)
