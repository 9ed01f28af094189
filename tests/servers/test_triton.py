"""On a real tritonserver: bit for bit as a local session, reloaded, rolled back, and fed with encoded images."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_bundles import another, for_onnxruntime
from PIL import Image
from triton_server import Triton, triton

from tlexport.bundle import manifest
from tlexport.modalities.image_preprocessing import Preprocessing
from tlexport.progress import Silent
from tlexport.stages import deploy, rollback

pytestmark = pytest.mark.server
CLIENT = Path(__file__).parent / "triton_client.py"


def client(python: Path, *arguments: object) -> Any:
    done = subprocess.run([python, CLIENT, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def deployed(bundle: Path, place: Path) -> int | None:
    options = deploy.Options(name="digits", raw=True)
    return deploy.run(bundle, f"triton-python:{place}", Silent(), options=options).version


def compared(python: Path, server: Triton, place: Path, bundle: Path, version: int) -> None:
    graph = place / f"digits/{version}/model.onnx"
    found = client(python, server.http, server.grpc, "digits", graph, bundle / "golden" / "inputs.npy")
    assert found["http"] == found["grpc"] == [True] * 4, found
    assert set(found["versions"]) == {str(version)}
    assert found["merged"] <= 1e-5  # a merged batch may add in another order: float32 probabilities


def encoded(folder: Path) -> list[Path]:
    rng = np.random.default_rng(3)
    files = []
    for place, (height, width) in enumerate(((40, 70), (32, 32), (91, 33))):
        pixels = np.cumsum(rng.integers(0, 3, (height, width, 3)), axis=1).astype(np.uint8)
        files.append(folder / f"{place}.{'jpg' if place else 'png'}")
        Image.fromarray(pixels).save(files[-1])
    (folder / "broken.jpg").write_bytes(files[1].read_bytes()[:100])
    return [*files, folder / "broken.jpg"]


def test_golden_samples_reload_rollback_and_raw_images(
    triton_python: Path, bundle_copy: Path, tmp_path: Path
) -> None:
    bundle, place = for_onnxruntime(bundle_copy), tmp_path / "models"
    assert deployed(bundle, place) == 1
    with triton(triton_python, place, tmp_path / "scratch") as server:
        server.load("digits-raw")  # what an ensemble needs is loaded with it
        compared(triton_python, server, place, bundle, 1)
        statistics = server.ask("/v2/models/digits/stats")["model_stats"][0]
        assert statistics["inference_stats"]["success"]["count"] >= 72
        _raw(triton_python, server, bundle, place, tmp_path)

        assert deployed(another(bundle), place) == 2
        assert server.ask("/v2/models/digits/versions/1")["versions"] == [
            "1"
        ]  # until it is told to, it serves on
        server.load("digits-raw")
        compared(triton_python, server, place, bundle, 2)
        assert client(triton_python, "raw", server.http, "digits-raw", encoded(tmp_path)[0])["answers"][0]

        assert rollback.run(str(place), "digits", Silent()).version == 1
        for name in ("digits-raw", "digits", "digits-prepare"):
            server.load(name)
        compared(triton_python, server, place, bundle, 1)


def _raw(python: Path, server: Triton, bundle: Path, place: Path, folder: Path) -> None:
    """The ensemble on encoded images: what the local preparation and the model itself give, to the bit."""
    files = encoded(folder)
    answers = client(python, "raw", server.http, "digits-raw", *files)["answers"]
    assert "CorruptImageError" in answers.pop()
    document = manifest.read(bundle)
    preprocessing = Preprocessing.described(document.preprocessing)
    prepared = []
    for file in files[:-1]:
        with Image.open(file) as image:
            prepared.append(preprocessing.apply(np.asarray(image)))
    for place_, (own, answer) in enumerate(zip(prepared, answers, strict=True)):
        single = folder / f"single-{place_}.png"
        pixels = own.transpose(1, 2, 0)
        Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(single, "PNG")
        # An image that is prepared already is left as it is: the same pixels must give the same bits.
        assert client(python, "raw", server.http, "digits-raw", single)["answers"] == [answer]
    golden = np.load(bundle / "golden" / "inputs.npy")[0].transpose(1, 2, 0)
    out = io.BytesIO()
    Image.fromarray(golden.squeeze(2) if golden.shape[2] == 1 else golden).save(out, "PNG")
    (folder / "golden.png").write_bytes(out.getvalue())
    (answer,) = client(python, "raw", server.http, "digits-raw", folder / "golden.png")["answers"]
    expected = np.load(bundle / "golden" / "outputs.npy")[0]
    limit = 3 * (document.targets["cpu"].variant.max_abs_error or 0.0) + 1e-4
    assert np.abs(np.asarray(answer) - expected).max() <= limit


def test_an_altered_graph_is_not_loaded(triton_python: Path, bundle_copy: Path, tmp_path: Path) -> None:
    place = tmp_path / "models"
    deployed(for_onnxruntime(bundle_copy), place)
    graph = place / "digits/1/model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with triton(triton_python, place, tmp_path / "scratch") as server:
        with pytest.raises(OSError):
            server.load("digits")
        assert "not the file that was deployed" in server.log.read_text()


def test_a_backend_that_gives_wrong_values_under_this_numpy_is_found(
    triton_python: Path, bundle_copy: Path, tmp_path: Path
) -> None:
    """This Triton's is built for numpy 1; the numpy that is put before its own is the one of this environment."""
    assert np.__version__.startswith("2.")
    place, newer = tmp_path / "models", tmp_path / "newer"
    newer.mkdir()
    for folder in Path(np.__file__).parents[1].glob("numpy*"):
        (newer / folder.name).symlink_to(folder)
    deployed(for_onnxruntime(bundle_copy), place)
    with triton(triton_python, place, tmp_path / "scratch", first=newer) as server:
        with pytest.raises(OSError):
            server.load("digits")
        assert f"gives wrong values under numpy {np.__version__}: install numpy<2" in server.log.read_text()


def test_protobuf_reads_what_is_written(triton_python: Path, bundle_copy: Path, tmp_path: Path) -> None:
    bundle, place = for_onnxruntime(bundle_copy), tmp_path / "models"
    deploy.run(bundle, str(place), Silent(), options=deploy.Options(name="digits", raw=True))
    configs = [place / name / "config.pbtxt" for name in ("digits", "digits-prepare", "digits-raw")]
    found = client(triton_python, "parse", *configs)
    model, _, ensemble = (found[str(path)] for path in configs)
    document = manifest.read(bundle)
    assert model["input"] == [
        {"name": "images", "data_type": "TYPE_UINT8", "dims": [str(d) for d in document.inputs[0].shape[1:]]}
    ]
    assert model["version_policy"]["specific"]["versions"] == ["1"]
    assert model["model_warmup"][0]["inputs"]["images"]["input_data_file"]
    assert model["backend"] == "onnxruntime" and model["default_model_filename"] == "model.onnx"
    assert [step["model_name"] for step in ensemble["ensemble_scheduling"]["step"]] == [
        "digits-prepare",
        "digits",
    ]
