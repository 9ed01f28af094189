"""Backbones of both libraries: shapes, stages, sizes, names; normalisation and the serving model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tlexport.errors import RecipeError
from tlexport.models import backbones, image, network

# One of each family at a small member and size: name, size, channels.
SAMPLE = [
    ("torchvision/alexnet", 64, 3),
    ("torchvision/convnext_tiny", 32, 3),
    ("torchvision/densenet121", 32, 1),
    ("torchvision/efficientnet_b0", 32, 3),
    ("torchvision/efficientnet_v2_s", 32, 3),
    ("torchvision/googlenet", 64, 1),
    ("torchvision/inception_v3", 96, 3),
    ("torchvision/maxvit_t", 224, 3),
    ("torchvision/mnasnet0_5", 32, 3),
    ("torchvision/mobilenet_v2", 32, 1),
    ("torchvision/mobilenet_v3_small", 32, 3),
    ("torchvision/mobilenet_v3_large", 32, 3),
    ("torchvision/regnet_y_400mf", 32, 3),
    ("torchvision/resnet18", 28, 1),
    ("torchvision/resnext50_32x4d", 32, 3),
    ("torchvision/shufflenet_v2_x0_5", 32, 3),
    ("torchvision/squeezenet1_1", 32, 3),
    ("torchvision/swin_t", 32, 3),
    ("torchvision/swin_v2_t", 32, 1),
    ("torchvision/vgg11_bn", 32, 3),
    ("torchvision/vit_b_32", 64, 1),
    ("timm/caformer_s18", 64, 3),
    ("timm/coatnet_nano_rw_224", 64, 3),
    ("timm/convnext_atto", 64, 3),
    ("timm/deit_tiny_patch16_224", 64, 1),
    ("timm/densenet121", 32, 3),
    ("timm/efficientformerv2_s0", 64, 3),
    ("timm/fastvit_t8", 64, 3),
    ("timm/ghostnet_050", 32, 3),
    ("timm/lcnet_035", 32, 1),
    ("timm/levit_128s", 64, 3),
    ("timm/mobilevit_xxs", 64, 3),
    ("timm/pit_ti_224", 64, 3),
    ("timm/rdnet_tiny", 64, 3),
    ("timm/regnetx_002", 28, 3),
    ("timm/resnet10t", 28, 1),
    ("timm/swin_tiny_patch4_window7_224", 64, 3),
    ("timm/tf_efficientnet_lite0", 28, 1),
    ("timm/vit_tiny_patch16_224", 64, 1),
    ("timm/xcit_nano_12_p8_224", 64, 3),
]


def partition_faults(stages: list[list[str]], parameters: list[str]) -> set[str]:
    """Parameters that are in no stage, in two, or not the network's at all."""
    listed = [name for stage in stages for name in stage]
    return {name for name in {*listed, *parameters} if listed.count(name) != 1 or name not in parameters}


def first_calls(model: image.ImageModel, stages: list[list[str]], x: torch.Tensor) -> list[int]:
    """For each stage, when the first of its own modules is called in a forward pass."""
    order: dict[str, int] = {}

    def note(path: str) -> None:
        order.setdefault(path, len(order))

    hooks = [
        module.register_forward_pre_hook(lambda *_, path=path: note(path))
        for path, module in model.backbone.named_modules()
        if not list(module.children())
    ]
    model.features(x)
    for hook in hooks:
        hook.remove()
    owners = [[name.rpartition(".")[0] for name in stage] for stage in stages]
    return [min(order[owner] for owner in stage if owner in order) for stage in owners]


@pytest.mark.parametrize(("name", "size", "channels"), SAMPLE)
def test_every_family(name: str, size: int, channels: int) -> None:
    torch.manual_seed(0)
    spec = image.describe_backbone(name, classes=3, task="multiclass", channels=channels, image_size=size)
    model = image.create(spec)
    x = torch.randint(0, 256, (2, channels, size, size), dtype=torch.uint8)
    stages = [names for _, names in model.stages()]

    with torch.no_grad():
        calls = first_calls(model.eval(), stages, x)
    assert len(stages) >= 3
    assert not partition_faults(stages, [key for key, _ in model.backbone.named_parameters()])
    assert calls == sorted(calls)
    assert all(any(model.backbone.get_parameter(key).ndim > 1 for key in names) for names in stages)

    model.train()
    logits = model(x)
    assert logits.shape == (2, 3)
    assert model.dimension > 3
    logits.square().sum().backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None]
    assert len(reached) == len(list(model.parameters()))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_checks_of_stages_can_fail(lite0: image.ImageModel, images: torch.Tensor) -> None:
    stages = [names for _, names in lite0.stages()]
    parameters = [key for key, _ in lite0.backbone.named_parameters()]
    assert partition_faults(stages[:-1], parameters) == set(stages[-1])
    assert partition_faults([*stages, stages[0][:1]], parameters) == {stages[0][0]}
    calls = first_calls(lite0, stages[::-1], images)
    assert calls != sorted(calls)


def test_stage_of_norms_joins_the_one_before() -> None:
    parameters = {"a.weight": nn.Parameter(torch.ones(2, 2)), "norm.weight": nn.Parameter(torch.ones(2))}
    assert backbones._with_weights([["a.weight"], ["norm.weight"]], parameters) == [
        ["a.weight", "norm.weight"]
    ]
    assert backbones._with_weights([["norm.weight"], ["a.weight"]], parameters) == [
        ["norm.weight", "a.weight"]
    ]


def test_resnet_stages_are_its_layers() -> None:
    model = image.create(
        image.describe_backbone("torchvision/resnet18", classes=2, task="binary", image_size=32)
    )
    stages = dict(model.stages())
    assert list(stages) == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert all(name.startswith("layer4.") for name in stages["stage4"])
    assert stages["stem"] == ["conv1.weight", "bn1.weight", "bn1.bias"]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision/vit_b_16", 50),
        ("torchvision/inception_v3", 32),
        ("torchvision/maxvit_t", 64),
        ("timm/crossvit_9_240", 64),
    ],
)
def test_refused_size_names_the_networks_own(name: str, size: int) -> None:
    own = backbones.published(name).image_size
    with pytest.raises(RecipeError, match=rf"{name} does not take images of 3 x {size} x {size}.*{own}"):
        image.create(image.describe_backbone(name, classes=2, task="binary", image_size=size))


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [
        ("resnet50", "torchvision/resnet50"),
        ("torchvision/resnet5O", "timm/resnet50"),
        ("timm/tf_eficientnet_lite0", "timm/tf_efficientnet_lite0"),
        ("torchvision/fcn_resnet50", "resnet50"),
        ("torchvision/maskrcnn_resnet50_fpn", "classification network"),
        ("timm/hf_hub:someone/model", "classification network"),
        ("", "for instance"),
    ],
)
def test_unknown_backbone(typed: str, suggested: str) -> None:
    with pytest.raises(RecipeError, match="no classification network") as caught:
        image.describe_backbone(typed, classes=2, task="binary")
    assert suggested in str(caught.value)


def test_weights_tag() -> None:
    assert (
        image.describe_backbone("timm/resnet50.a1_in1k", classes=2, task="binary").backbone
        == "timm/resnet50.a1_in1k"
    )
    with pytest.raises(RecipeError, match=r"no weights tag 'a99'.*a1_in1k"):
        image.describe_backbone("timm/resnet50.a99", classes=2, task="binary")


def test_list_backbones_has_every_classifier_and_nothing_else() -> None:
    names = image.list_backbones()
    assert len(names) > 1000
    assert {"torchvision/vit_h_14", "timm/vit_tiny_patch16_224"} <= set(names)
    assert image.list_backbones("*/resnet18") == ["timm/resnet18", "torchvision/resnet18"]
    assert not image.list_backbones("torchvision/*rcnn*") + image.list_backbones("torchvision/*quantized*")


def test_no_family_of_torchvision_is_left_out() -> None:
    import torchvision.models as vision

    ours = {name.partition("/")[2] for name in image.list_backbones("torchvision/*")}
    assert ours == set(vision.list_models(module=vision))


def test_describe_takes_the_librarys_normalisation() -> None:
    spec = image.describe_backbone("timm/tf_efficientnet_lite0", classes=2, task="binary")
    assert (spec.mean, spec.std, spec.image_size) == ((0.5,) * 3, (0.5,) * 3, 224)
    grey = image.describe_backbone("torchvision/resnet50", classes=2, task="binary", channels=1)
    assert grey.mean == pytest.approx(((0.485 + 0.456 + 0.406) / 3,))
    assert grey.std == pytest.approx(((0.229 + 0.224 + 0.225) / 3,))
    assert image.ModelSpec.model_validate_json(grey.model_dump_json()) == grey


def test_googlenet_needs_no_inner_shift_with_our_normalisation() -> None:
    """torchvision's weights expect ImageNet's normalisation and a shift inside; ours must amount to the same."""
    from torchvision.models import googlenet

    torch.manual_seed(0)
    spec = image.describe_backbone("torchvision/googlenet", classes=2, task="binary", image_size=64)
    ours = image.create(spec).eval()
    theirs = googlenet(weights=None, transform_input=True, aux_logits=False, init_weights=False).eval()
    x = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (backbones.IMAGENET_MEAN, backbones.IMAGENET_STD))
    expected = theirs._transform_input((x / 255 - mean) / std)
    assert torch.allclose(ours.normalise(x), expected, atol=1e-5)
    assert not torch.allclose(ours.normalise(x), (x / 255 - mean) / std, atol=1e-2)


def test_uint8_and_float_images_are_the_same(lite0: image.ImageModel, images: torch.Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(lite0(images), lite0(images.float()))
        assert lite0(images).std(0).min() > 1e-3
    assert torch.allclose(lite0.normalise(images), (images / 255 - 0.5) / 0.5, atol=1e-6)


def test_own_dropout_before_the_classifier_is_replaced_by_ours() -> None:
    spec = image.describe_backbone(
        "torchvision/mobilenet_v2", classes=2, task="binary", image_size=32, dropout=0.4
    )
    model = image.create(spec)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.4]


@pytest.mark.parametrize(("task", "total"), [("binary", 1.0), ("multiclass", 1.0), ("multilabel", None)])
def test_serving_model(lite0: image.ImageModel, images: torch.Tensor, task: str, total: float | None) -> None:
    lite0.spec = lite0.spec.model_copy(update={"task": task})
    with torch.no_grad():
        logits, probabilities = lite0(images), network.ServingModel(lite0)(images)
    assert probabilities.dtype == torch.float32
    if total is None:
        assert torch.allclose(probabilities, 1 / (1 + torch.exp(-logits)))
    else:
        assert torch.allclose(probabilities.sum(1), torch.full((8,), total))
        assert torch.equal(probabilities.argmax(1), logits.argmax(1))


def exported_errors(model: image.ImageModel, images: torch.Tensor, folder) -> list[float]:
    """Largest error of the exported graph in ONNX Runtime against eager, at batches 1, 2 and 8."""
    import onnxruntime

    serving = network.ServingModel(model).eval()
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        serving, (images[:2],), dynamo=True, opset_version=20, dynamic_shapes=(({0: batch},),), verbose=False
    )
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    entry = session.get_inputs()[0]
    assert (entry.type, entry.shape[1:]) == ("tensor(uint8)", list(images.shape[1:]))
    with torch.no_grad():
        expected = serving(images)
    assert expected.std(0).min() > 1e-3, "outputs that do not depend on the input prove nothing"
    return [
        float(
            (torch.from_numpy(session.run(None, {entry.name: images[:n].numpy()})[0]) - expected[:n])
            .abs()
            .max()
        )
        for n in (1, 2, 8)
    ]


def test_serving_model_exports(lite0: image.ImageModel, images: torch.Tensor, tmp_path) -> None:
    assert max(exported_errors(lite0, images, tmp_path)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "torchvision/resnet18",
        "torchvision/mobilenet_v3_small",
        "timm/vit_tiny_patch16_224",
        "torchvision/swin_t",
        "torchvision/densenet121",
    ],
)
def test_other_architectures_export(name: str, images: torch.Tensor, tmp_path) -> None:
    torch.manual_seed(0)
    model = image.create(image.describe_backbone(name, classes=3, task="multiclass", image_size=64))
    rescale(model, images)
    assert max(exported_errors(model, images, tmp_path)) < 1e-5


def rescale(model: image.ImageModel, images: torch.Tensor) -> None:
    """Give random weights batch statistics and a head wide enough that outputs vary over inputs."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(images)
        spread = model.eval().features(images).std(0).mean()
        model.head[1].weight.mul_(1 / spread.clamp(min=1e-6))
