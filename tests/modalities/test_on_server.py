"""What a server carries along prepares a sample exactly as training did, without the rest of the package."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlexport.modalities import molecule_preparation as preparation
from tlexport.modalities.image_decode import from_pillow
from tlexport.modalities.image_preprocessing import Preprocessing
from tlexport.modalities.on_server import ON_SERVER

PREPARE = """
import importlib, json, sys
import numpy as np
module, _, function = sys.argv[1].partition(":")
prepare = getattr(importlib.import_module(module), function)(json.loads(sys.argv[2]), json.loads(sys.argv[3]))
answers = []
for path in sys.argv[5:]:
    answers.append({name: np.asarray(own) for name, own in prepare(open(path, "rb").read()).items()})
np.savez(sys.argv[4], **{f"{place}/{name}": own for place, one in enumerate(answers) for name, own in one.items()})
step = sys.path[1] if sys.path[0] == "" else sys.path[0]
foreign = {n: m.__file__ for n, m in sys.modules.items() if n.startswith("tlexport") and not m.__file__.startswith(step)}
assert not foreign, foreign
heavy = {"torch", "polars", "onnx", "timm"} & set(sys.modules)
assert not heavy, heavy
"""


def carried(
    tmp_path: Path, modality: str, described: dict, names: list[str], files: list[Path]
) -> list[dict]:
    """The samples as a process prepares them that has nothing of tlexport but the files a server gets."""
    own = ON_SERVER[modality]
    for path, content in own.files().items():
        (tmp_path / "step" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "step" / path).write_bytes(content)
    out = tmp_path / "out.npz"
    command = [
        sys.executable,
        "-c",
        PREPARE,
        own.call,
        json.dumps(described),
        json.dumps(names),
        str(out),
        *map(str, files),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "step")}
    )
    assert done.returncode == 0, done.stderr
    with np.load(out) as held:
        return [{name: held[f"{place}/{name}"] for name in names} for place in range(len(files))]


def images(folder: Path) -> list[Path]:
    """Every kind of file that is decoded in a way of its own: grey, palette, transparent, 16 bit, rotated by EXIF, odd sizes."""
    rng = np.random.default_rng(7)
    smooth = np.cumsum(rng.integers(0, 3, (61, 97, 3)), axis=1).astype(np.uint8)
    colour = Image.fromarray(smooth)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(rng.integers(0, 4000, (40, 30)).astype(np.uint16))
    made = {
        "a.jpg": (colour, {"quality": 90}), "rotated.jpg": (colour, {"exif": exif.tobytes()}), "grey.png": (colour.convert("L"), {}),
        "palette.gif": (colour.convert("P"), {}), "clear.png": (colour.convert("RGBA"), {}), "deep.png": (deep, {}),
        "bits.png": (colour.convert("1"), {}), "cmyk.jpg": (colour.convert("CMYK"), {}), "thin.webp": (colour.resize((200, 9)), {}),
    }  # fmt: skip
    for name, (image, options) in made.items():
        content = io.BytesIO()
        image.save(
            content,
            {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "webp": "WEBP"}[name.rpartition(".")[2]],
            **options,
        )
        (folder / name).write_bytes(content.getvalue())
    return [folder / name for name in made]


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_prepared_as_in_training(tmp_path: Path, resize: str, channels: int) -> None:
    preprocessing = Preprocessing(image_size=24, channels=channels, resize=resize)
    files = images(tmp_path)
    found = carried(tmp_path, "image", preprocessing.describe(), ["images"], files)
    for file, own in zip(files, found, strict=True):
        with Image.open(file) as image:
            expected = preprocessing.apply(from_pillow(image))
        assert own["images"].dtype == np.uint8
        np.testing.assert_array_equal(own["images"], expected, err_msg=file.name)


def test_molecules_are_prepared_as_in_training(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    from tlexport.modalities import molecule_chemistry as chemistry

    smiles = ["OCC", "c1ccccc1C(=O)O", "C[C@H](N)C(=O)O", "CC(=O)Oc1ccccc1C(=O)O", "[Na+].[Cl-]"]
    canonical = [chemistry.canonical(one) for one in smiles]
    prepared = preparation.Preparation(
        smiles="smiles", target=("y",), missing=(), vocabulary=preparation.vocabulary(canonical[:3]), length=40,
        rdkit=chemistry.version(),
    )  # fmt: skip
    files = []
    for place, one in enumerate(smiles):
        files.append(tmp_path / f"{place}.smi")
        files[-1].write_text(one)
    names = list(prepared.dtype().names or ())
    found = carried(tmp_path, "molecule", prepared.describe(), names, files)
    expected = prepared.encode(canonical)
    for place, own in enumerate(found):
        for name in names:
            np.testing.assert_array_equal(own[name], expected[name][place])


def test_another_rdkit_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("rdkit")
    from tlexport.errors import DataError
    from tlexport.modalities import molecule_on_server

    with pytest.raises(DataError, match="prepared the training data"):
        molecule_on_server.prepare({"rdkit": "1900.01.1"}, ["tokens"])
