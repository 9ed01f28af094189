"""The preparation that a server carries along where clients send raw samples: the files themselves, so that no second one exists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class OnServer:
    """`modules`: of this package, in the order they import each other. `needs`: what the server's Python must have."""

    input: str
    call: str
    modules: tuple[str, ...]
    needs: tuple[str, ...]

    def files(self) -> dict[str, bytes]:
        """Path -> source of a package `tlexport` that holds these modules and nothing else."""
        empty = {f"tlexport/{folder}__init__.py": b"" for folder in ("", "modalities/")}
        return empty | {f"tlexport/{own}.py": (PACKAGE / f"{own}.py").read_bytes() for own in self.modules}


ON_SERVER: dict[str, OnServer] = {
    "image": OnServer(
        input="encoded",
        call="tlexport.modalities.image_on_server:prepare",
        modules=(
            "errors",
            "modalities/image_pixels",
            "modalities/image_decode",
            "modalities/image_sizing",
            "modalities/image_on_server",
        ),
        needs=("numpy", "pillow"),
    ),
    "molecule": OnServer(
        input="smiles",
        call="tlexport.modalities.molecule_on_server:prepare",
        modules=(
            "errors",
            "modalities/molecule_chemistry",
            "modalities/molecule_tokenizer",
            "modalities/molecule_encoding",
            "modalities/molecule_on_server",
        ),
        needs=("numpy", "rdkit"),
    ),
}
