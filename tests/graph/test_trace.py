from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tlexport.errors import ExportError, StorageError
from tlexport.graph import inspect
from tlexport.graph import trace as tracing
from tlexport.graph.trace import load, save, trace
from tlexport.tensors import TensorSpec

Run = Callable[..., np.ndarray]


def image_trace(module: torch.nn.Module, example: torch.Tensor, **settings: Any) -> onnx.ModelProto:
    return trace(module, (example,), input_names=("images",), output_name="probabilities", **settings)


class Convolution(torch.nn.Module):
    """A convolution, a BatchNorm that is far from the identity, and a pooled softmax."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.convolution = torch.nn.Conv2d(3, 8, 3)
        self.normalisation = torch.nn.BatchNorm2d(8)
        torch.nn.init.uniform_(self.normalisation.running_mean, -1, 1)
        torch.nn.init.uniform_(self.normalisation.running_var, 0.5, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.normalisation(self.convolution(images.float() / 255))
        return torch.softmax(features.mean((2, 3)), dim=1)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_graph_agrees_with_the_module(
    lite0: torch.nn.Module, graph: onnx.ModelProto, run: Run, photographs: np.ndarray, batch: int
) -> None:
    with torch.no_grad():
        expected = lite0(torch.from_numpy(photographs[:batch])).numpy()
    assert expected.max() > 0.1  # a network that knows nothing would agree with anything
    np.testing.assert_allclose(run(graph, photographs[:batch], optimised=True), expected, atol=1e-5)


def test_input_output_and_batch(graph: onnx.ModelProto) -> None:
    inputs, outputs = inspect.io(graph)
    assert inputs == [TensorSpec(name="images", dtype="uint8", shape=("batch", 3, 96, 96))]
    assert outputs == [TensorSpec(name="probabilities", dtype="float32", shape=("batch", 1000))]


def test_node_names_are_unique_and_say_which_layer(graph: onnx.ModelProto) -> None:
    names = [node.name for node in graph.graph.node]
    assert len(set(names)) == len(names)
    assert {"network.conv_stem", "network.blocks.0.0.conv_dw", "network.classifier"} <= set(names)


def test_batch_normalisation_is_folded(graph: onnx.ModelProto) -> None:
    operators = inspect.summary(graph).nodes
    assert operators["Conv"] == 49
    assert "BatchNormalization" not in operators


def test_metadata(graph: onnx.ModelProto, metadata: dict[str, str]) -> None:
    stored = inspect.metadata(graph)
    assert metadata.items() <= stored.items()
    assert json.loads(stored["preprocessing"]) == {"size": 96}
    assert stored["opset"] == str(inspect.opset(graph)) == "20"
    assert "tlexport_version" in stored


def test_nothing_of_the_machine_is_left(graph: onnx.ModelProto) -> None:
    content = graph.SerializeToString()
    for trait in (
        b"site-packages",
        b".py",
        b"line ",
        b"stack_trace",
        str(Path.home()).encode() + b"/",
        b"timm.",
    ):
        assert trait not in content


def test_the_same_module_gives_the_same_bytes(example: torch.Tensor, metadata: dict[str, str]) -> None:
    first, second = (image_trace(Convolution(), example, opset=20, metadata=metadata) for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_a_module_in_training_mode_is_exported_for_inference(
    example: torch.Tensor, metadata: dict[str, str], run: Run, photographs: np.ndarray
) -> None:
    model = image_trace(Convolution().train(), example, opset=21, metadata=metadata)
    with torch.no_grad():
        expected = Convolution().eval()(torch.from_numpy(photographs[:3])).numpy()
    assert inspect.opset(model) == 21
    np.testing.assert_allclose(run(model, photographs[:3]), expected, atol=1e-6)


def test_attention_is_spelt_out_at_every_opset(
    example: torch.Tensor, metadata: dict[str, str], run: Run, photographs: np.ndarray
) -> None:
    attention = torch.nn.TransformerEncoderLayer(96, 4, batch_first=True, norm_first=True)

    class Rows(torch.nn.Module):
        """The rows of an image's first channel, taken for tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = attention

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layer(images[:, 0].float() / 255).mean(1).softmax(1)

    model = image_trace(Rows(), example, opset=23, metadata=metadata)
    assert inspect.opset(model) == 23
    assert "Attention" not in inspect.summary(model).nodes
    with torch.no_grad():
        expected = Rows().eval()(torch.from_numpy(photographs[:3])).numpy()
    np.testing.assert_allclose(run(model, photographs[:3]), expected, atol=1e-5)


class Branching(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float() if images.float().sum() > 3 else images.float() + 1


class FixedBatch(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().reshape(2, -1)


def test_a_module_that_cannot_be_exported(
    example: torch.Tensor, metadata: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=r"cannot be exported to ONNX: .*data-dependent") as failure:
        image_trace(Branching(), example, opset=20, metadata=metadata)
    assert len(str(failure.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


def test_a_fixed_batch_is_refused(example: torch.Tensor, metadata: dict[str, str]) -> None:
    with pytest.raises(ExportError, match=r"'probabilities' has shape \[2, .*fix its batch size"):
        image_trace(FixedBatch(), example, opset=20, metadata=metadata)


def test_a_model_beyond_one_file_is_refused_before_any_work(
    example: torch.Tensor, metadata: dict[str, str]
) -> None:
    with torch.device("meta"):
        huge = torch.nn.Linear(30_000, 20_000)
    with pytest.raises(ExportError, match=r"takes 2\.2 GiB"):
        image_trace(huge, example, opset=20, metadata=metadata)


def test_metadata_must_be_whole(example: torch.Tensor) -> None:
    with pytest.raises(ExportError, match=r"lacks class_names, preprocessing \(it has: task\)"):
        image_trace(Convolution(), example, opset=20, metadata={"task": "binary"})


def _clean_graph(
    nodes: list[onnx.NodeProto], outputs: tuple[str, ...] = ("probabilities",)
) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), "weight")
    ones = numpy_helper.from_array(np.ones(2, np.float32), "ones")
    shape = ["batch", 2, 4, 4]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
        [weight, ones],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_each_broken_promise_is_found() -> None:
    convolution = helper.make_node("Conv", ["images", "weight"], ["x"], "convolution")
    normalisation = helper.make_node("BatchNormalization", ["x", *["ones"] * 4], ["probabilities"], "n")
    relu = helper.make_node("Relu", ["x"], ["probabilities"], "relu")
    tracing._ensure_clean(_clean_graph([convolution, relu]), ("images",), "probabilities")
    with pytest.raises(ExportError, match="BatchNorm was not folded into convolution"):
        tracing._ensure_clean(_clean_graph([convolution, normalisation]), ("images",), "probabilities")
    with pytest.raises(ExportError, match="it has the inputs images and the outputs probabilities, x"):
        tracing._ensure_clean(
            _clean_graph([convolution, relu], ("probabilities", "x")), ("images",), "probabilities"
        )
    relu.name = "convolution"
    with pytest.raises(ExportError, match="not unique: convolution"):
        tracing._ensure_clean(_clean_graph([convolution, relu]), ("images",), "probabilities")
    relu.op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match="invalid graph"):
        tracing._ensure_clean(_clean_graph([convolution, relu]), ("images",), "probabilities")


def test_save_and_load(graph: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "graphs" / "fp32.onnx"
    save(graph, path)
    assert load(path) == graph
    assert [file.name for file in path.parent.iterdir()] == ["fp32.onnx"]


def test_saving_into_a_file_as_a_folder(graph: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "graphs").write_text("in the way")
    with pytest.raises(StorageError):
        save(graph, tmp_path / "graphs" / "fp32.onnx")


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_a_truncated_file(graph: onnx.ModelProto, tmp_path: Path, keep: float) -> None:
    content = graph.SerializeToString()
    path = tmp_path / "fp32.onnx"
    path.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(ExportError, match=r"fp32\.onnx is not a readable ONNX graph"):
        load(path)


def test_files_that_are_no_graph(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no graph, but text")
    for name in ("missing.onnx", "text.onnx"):
        with pytest.raises(ExportError, match=f"{name} is not a readable"):
            load(tmp_path / name)


def test_external_weights_are_refused(graph: onnx.ModelProto, tmp_path: Path) -> None:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    onnx.save(copy, tmp_path / "external.onnx", save_as_external_data=True, location="weights.bin")
    with pytest.raises(ExportError, match="weights"):
        load(tmp_path / "external.onnx")
