"""Sets by name: a real download from a local server, and what is said where there is no network."""

from __future__ import annotations

import hashlib
import http.server
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlexport import recipe
from tlexport.errors import DataError
from tlexport.modalities import image_catalogs
from tlexport.modalities.image_catalogs import download, read_medmnist, read_torchvision
from tlexport.modalities.image_sources import read
from tlexport.modalities.medmnist_sets import SETS

NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Content-Length" and "cut" in self.path:
            value = str(int(value) + 1000)
        super().send_header(keyword, value)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder
        httpd.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TLEXPORT_DATA", str(tmp_path / "home"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def tiny(path: Path) -> str:
    random = np.random.default_rng(0)
    content = {}
    for split in ("train", "val", "test"):
        content[f"{split}_images"] = random.integers(0, 256, (6, 28, 28), np.uint8)
        content[f"{split}_labels"] = np.arange(6)[:, None] % 2
    np.savez(path, **content)
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_download_says_how_far_and_keeps_the_file(
    server: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, folder = server
    md5 = tiny(folder / "a.npz")
    target = tmp_path / "deep" / "a.npz"
    download(f"{url}/a.npz", target, md5)
    assert target.read_bytes() == (folder / "a.npz").read_bytes()
    said = capsys.readouterr()
    assert "a.npz: 0.0 of 0.0 MB" in said.err and said.out == ""
    (folder / "a.npz").unlink()
    download(f"{url}/a.npz", target, md5)  # there already: nothing is asked for


@pytest.mark.parametrize(
    ("name", "md5", "limit", "message"),
    [
        ("a.npz", "0" * 32, 10**9, "damaged or altered"),
        ("a.npz", None, 100, "a.npz is larger than"),
        ("cut.npz", None, 10**9, "cannot download .*put it at"),
        ("missing.npz", None, 10**9, "cannot download .*not found.*put it at"),
    ],
)
def test_a_bad_download_leaves_nothing(
    server: tuple[str, Path], tmp_path: Path, name: str, md5: str | None, limit: int, message: str
) -> None:
    url, folder = server
    right = tiny(folder / "a.npz")
    tiny(folder / "cut.npz")
    with pytest.raises(DataError, match=message):
        download(f"{url}/{name}", tmp_path / "got" / name, md5 or right, limit)
    assert list((tmp_path / "got").iterdir()) == []


def test_medmnist_through_a_server(
    server: tuple[str, Path], own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = server
    md5 = tiny(folder / "breastmnist_64.npz")
    monkeypatch.setattr(image_catalogs, "MEDMNIST_URL", url + "/{name}.npz")
    monkeypatch.setitem(SETS, "breastmnist", SETS["breastmnist"]._replace(md5=("", md5, "", "")))
    samples = read(recipe.Data(path="medmnist/breastmnist_64"))
    assert len(samples.labels) == 18 and samples.class_names == ("malignant", "normal, benign")
    assert (own_home / "medmnist" / "breastmnist_64.npz").is_file()


def test_medmnist_without_a_network_says_which_file_goes_where(
    own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_catalogs, "MEDMNIST_URL", NOWHERE + "/{name}.npz")
    place = own_home / "medmnist" / "pathmnist.npz"
    with pytest.raises(DataError, match=r"cannot download .*/pathmnist\.npz") as caught:
        read_medmnist("pathmnist")
    assert f"put it at {place}" in str(caught.value)


def test_the_published_table_is_whole() -> None:
    assert len(SETS) == 12
    every = [md5 for known in SETS.values() for md5 in known.md5]
    assert len(set(every)) == 48 and all(len(md5) == 32 and int(md5, 16) for md5 in every)
    assert len(SETS["chestmnist"].classes) == 14 and len(SETS["organamnist"].classes) == 11


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pathmist", "did you mean medmnist/pathmnist"),
        ("pathmnist_32", "did you mean medmnist/pathmnist_"),
        ("x", "sets: "),
    ],
)
def test_unknown_medmnist_names(name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_medmnist(name)


def idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_torchvision_mnist_from_files_put_there(own_home: Path) -> None:
    random = np.random.default_rng(0)
    raw = own_home / "torchvision" / "MNIST" / "raw"
    images = {
        "train": random.integers(0, 256, (30, 28, 28), np.uint8),
        "t10k": random.integers(0, 256, (9, 28, 28), np.uint8),
    }
    for part, pixels in images.items():
        idx(raw / f"{part}-images-idx3-ubyte", pixels)
        idx(raw / f"{part}-labels-idx1-ubyte", np.arange(len(pixels), dtype=np.uint8) % 10)
    samples = read(recipe.Data(path="torchvision/MNIST"))
    assert samples.splits is not None and samples.splits.tolist() == ["train"] * 30 + ["test"] * 9
    assert np.array_equal(samples.images.take(np.arange(30, 39))[..., 0], images["t10k"])
    assert samples.labels[:3].tolist() == [0, 1, 2] and samples.class_names is not None
    assert samples.class_names[3] == "3 - three"


def test_torchvision_folders_by_split_and_as_one_pool(own_home: Path) -> None:
    for where in ("torchvision/eurosat/2750", "torchvision/country211/train", "torchvision/country211/valid"):
        for label in ("Forest", "River"):
            for n in range(3):
                path = own_home / where / label / f"{n}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((16, 16, 3), 40 * n, np.uint8)).save(path)
    pool = read_torchvision("EuroSAT")
    assert pool.splits is None and pool.labels.tolist() == [0] * 3 + [1] * 3
    assert pool.images.read(2).shape == (16, 16, 3) and abs(int(pool.images.read(2)[0, 0, 0]) - 80) < 3
    (own_home / "torchvision/country211/test/Forest").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(own_home / "torchvision/country211/test/Forest/1.jpg")
    split = read_torchvision("Country211")
    assert split.splits is not None and split.splits.tolist() == ["train"] * 6 + ["val"] * 6 + ["test"]
    assert split.images.read(12).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "name", ["CIFAR10", "MNIST", "Flowers102", "PCAM", "Food101", "STL10", "SVHN", "DTD"]
)
def test_torchvision_without_a_network_says_which_file_goes_where(
    name: str, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*arguments: object, **options: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    if name in ("PCAM",):
        pytest.importorskip("h5py")
    if name in ("Flowers102", "SVHN"):
        pytest.importorskip("scipy")
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(DataError, match=f"torchvision/{name} cannot be had") as caught:
        read_torchvision(name)
    assert f"put it at {own_home / 'torchvision'}" in str(caught.value)


def test_unknown_torchvision_names_and_sets_of_other_kinds() -> None:
    with pytest.raises(DataError, match="did you mean torchvision/CIFAR10"):
        read_torchvision("CIFAR11")
    with pytest.raises(DataError, match="needs arguments that a recipe cannot give"):
        read_torchvision("Kinetics")
    with pytest.raises(DataError, match="no training split"):
        read_torchvision("EMNIST")


def test_pcam_without_h5py_says_what_to_install() -> None:
    try:
        import h5py  # noqa: F401
    except ImportError:
        with pytest.raises(DataError, match=r"torchvision/PCAM cannot be had: .*h5py"):
            read_torchvision("PCAM")
    else:
        pytest.skip("h5py is installed")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_arrays_are_taken_in_the_layout_that_shows_the_first_image(order: tuple[int, ...]) -> None:
    """STL10 and SVHN keep their channels first, CIFAR keeps them last."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)

    class Held(list[tuple[Image.Image, int]]):
        data = pixels.transpose(order)

    held = Held((Image.fromarray(image), 0) for image in pixels)
    assert np.array_equal(image_catalogs._held(held), pixels)
    held.data = held.data[:, ::-1]
    assert image_catalogs._held(held) is None
