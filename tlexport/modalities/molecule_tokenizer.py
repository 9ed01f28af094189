"""From a SMILES to token numbers: by our own pattern and a frozen vocabulary, or as a Hugging Face tokenizer does."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Protocol

from tlexport.errors import DataError, NotInstalledError
from tlexport.modalities import molecule_chemistry as chemistry


class Numbers(Protocol):
    """SMILES -> the numbers of its tokens."""

    def __call__(self, smiles: str) -> list[int]: ...


class Regex:
    def __init__(self, vocabulary: tuple[str, ...], unknown: str) -> None:
        self.places = {token: number for number, token in enumerate(vocabulary)}
        self.unknown = self.places[unknown]

    def __call__(self, smiles: str) -> list[int]:
        return [self.places.get(token, self.unknown) for token in chemistry.tokens(smiles)]


class HuggingFace:
    """The tokenizer of a `tokenizer.json`, given as its text. Raises NotInstalledError, DataError."""

    def __init__(self, content: str) -> None:
        require()
        from tokenizers import Tokenizer

        self.tokenizer: Any = Tokenizer.from_str(content)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()

    def __call__(self, smiles: str) -> list[int]:
        return list(self.tokenizer.encode(smiles).ids)


def require() -> None:
    """Raises NotInstalledError without transformers."""
    if importlib.util.find_spec("transformers") is None:
        raise NotInstalledError("transformers, which reads Hugging Face networks,", "transformers")


def hugging_face(name: str) -> tuple[str, int]:
    """The tokenizer.json of a Hugging Face tokenizer by name or folder, and its padding token's number; no code is run.

    Raises NotInstalledError without transformers, DataError if there is none or it exists only as slow Python code.
    """
    require()
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(name, trust_remote_code=False, use_fast=True)
        content = str(found.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError) as error:
        where = "folder" if Path(name).exists() else "name"
        raise DataError(
            f"no fast Hugging Face tokenizer under the {where} {name} ({' '.join(str(error).split())[:200]}); give "
            "data.molecule.tokenizer the name or folder of one with a tokenizer.json"
        ) from error
    if found.pad_token_id is None:
        raise DataError(f"the tokenizer {name} has no padding token")
    return content, int(found.pad_token_id)
