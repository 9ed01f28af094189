"""Graphs that take raw numbers: missing values, amounts of 1e10, category codes, tokens; in every precision."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from raw_numbers import Feed, Mixed, eager, feed_of, traced
from torch import nn

from tlexport.errors import ExportError
from tlexport.graph import inspect
from tlexport.graph.calibration import calibrate
from tlexport.graph.cast import to_half
from tlexport.graph.quantize import Flavour, quantize, tensors_to_calibrate


def _session(model: onnx.ModelProto, feed: Feed) -> np.ndarray:
    """Unoptimised, so that every cast in the graph is really made."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    answer: np.ndarray = session.run(None, feed)[0]
    return answer


@pytest.fixture(scope="module")
def mixed() -> onnx.ModelProto:
    return traced(Mixed().eval(), feed_of())


def test_three_inputs_with_one_batch(mixed: onnx.ModelProto) -> None:
    inputs, _ = inspect.io(mixed)
    assert {spec.name: (spec.dtype, spec.shape) for spec in inputs} == {
        "numbers": ("float32", ("batch", 4)),
        "tokens": ("int32", ("batch", 6)),
        "flags": ("uint8", ("batch", 3)),
    }


@pytest.mark.parametrize("count", [1, 2, 32])
def test_the_graph_agrees_with_the_module_on_missing_and_huge_values(
    mixed: onnx.ModelProto, count: int
) -> None:
    feed = {name: array[:count] for name, array in feed_of().items()}
    expected = eager(Mixed().eval(), feed)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(_session(mixed, feed), expected, rtol=1e-5, atol=1e-4)


def test_fp16_rounds_between_the_products_only(mixed: onnx.ModelProto) -> None:
    """Amounts of 1e10 are scaled in FP32 before the first product and added in FP32 after the last."""
    half, feed = to_half(mixed, "fp16"), feed_of()
    assert set(inspect.compute_dtypes(half).values()) == {"fp16"}
    expected = eager(Mixed().eval(), feed)
    error = np.abs(_session(half, feed) - expected).max()
    assert expected.max() > 20 and 1e-6 < error < 5e-3  # 16 bits would be wrong by 0.01 at 24 already
    types = inspect.element_types(half)
    for node in half.graph.node:
        if node.op_type in ("IsNaN", "Log", "Equal") or "numbers" in node.input:
            assert types[node.input[0]] != onnx.TensorProto.FLOAT16, node.name


@pytest.mark.parametrize("flavour", ["trt", "cpu"])
def test_int8_takes_products_with_weights_and_leaves_tables_alone(
    mixed: onnx.ModelProto, flavour: Flavour
) -> None:
    feed = feed_of()
    ranges = calibrate(mixed, [feed], tensors_to_calibrate(mixed, flavour), method="max")
    model = quantize(mixed, ranges, flavour)
    dtypes = list(inspect.compute_dtypes(model).values())
    attention = 0 if flavour == "trt" else 2  # two products of two activations
    assert dtypes.count("int8") == len(dtypes) - attention and dtypes.count("fp32") == attention
    tables = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    assert {
        t.name for t in model.graph.initializer if t.name in tables and t.data_type == onnx.TensorProto.FLOAT
    } == {"embedding.weight"}
    error = np.abs(_session(model, feed) - eager(Mixed().eval(), feed)).max()
    assert 1e-5 < error < 0.05


def test_nan_is_no_matter_where_nothing_is_quantised_and_named_where_it_is(mixed: onnx.ModelProto) -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.linear(numbers), dim=1)

    feed = {"numbers": feed_of()["numbers"]}
    assert np.isnan(feed["numbers"]).any()
    model = traced(Careless(), feed)
    with pytest.raises(
        ExportError, match=r"'numbers', a factor of 'linear', holds 6 NaN and 0 infinite values of 128"
    ):
        calibrate(model, [feed], tensors_to_calibrate(model, "cpu"))
    assert len(calibrate(mixed, [feed_of()], tensors_to_calibrate(mixed, "cpu"))) > 3


class SmallTerms(nn.Module):
    """The exporter's optimiser takes terms up to 1e-8 for zero; a constant column then divides zero by zero."""

    def __init__(self, term: float) -> None:
        super().__init__()
        self.term = term
        self.linear = nn.Linear(8, 2)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        centred = numbers - numbers.mean(1, keepdim=True)
        deviation = torch.sqrt((centred * centred).mean(1, keepdim=True) + self.term)
        return self.linear(centred / deviation)


@pytest.mark.parametrize("term", [1e-5, 1e-8, 1e-12])
def test_a_term_that_keeps_a_division_finite_is_kept(term: float) -> None:
    numbers = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    numbers[1] = 7
    numbers[2] *= 1e-5
    feed, module = {"numbers": numbers}, SmallTerms(term).eval()
    found = _session(traced(module, feed), feed)
    np.testing.assert_allclose(found, eager(module, feed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
def test_masks_that_stand_for_minus_infinity_survive_fp16(fill: float) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            logits = self.first(numbers)
            return self.last(torch.softmax(torch.where(logits > 0, logits, fill), dim=1))

    feed, module = (
        {"numbers": np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32)},
        Masked().eval(),
    )
    found = _session(to_half(traced(module, feed), "fp16"), feed)
    assert np.abs(found - eager(module, feed)).max() < 2e-3


EQUATIONS = [
    ("bd,dk->bk", (5, 4), (4, 3)),
    ("bd,mdk->bmk", (5, 4), (2, 4, 3)),
    ("bmd,mdk->bmk", (5, 2, 4), (2, 4, 3)),
    ("bmd,mkd->bmk", (5, 2, 4), (2, 3, 4)),
    ("btmd,mdk->btmk", (5, 6, 2, 4), (2, 4, 3)),
    ("bfd,fd->bf", (5, 2, 4), (2, 4)),
    ("md,bmd->bm", (2, 4), (5, 2, 4)),
    ("dk,btd->bkt", (4, 3), (5, 6, 4)),
    ("bd,d->b", (5, 4), (4,)),
]


@pytest.mark.parametrize("equation, left, right", EQUATIONS)
def test_einsum_becomes_a_matmul(equation: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    class Product(nn.Module):
        """The operand with the batch is the input, the other one a weight."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first = left[0] == 5
            self.weight = nn.Parameter(torch.randn(right if self.first else left))

        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            return torch.einsum(equation, *((numbers, self.weight) if self.first else (self.weight, numbers)))

    shape = left if left[0] == 5 else right
    feed = {"numbers": np.random.default_rng(3).normal(size=shape).astype(np.float32)}
    module = Product().eval()
    model = traced(module, feed)
    assert "Einsum" not in (operators := inspect.summary(model).nodes) and operators["MatMul"] == 1
    assert {node.op_type for node in model.graph.node if "weight" in node.input} <= {"MatMul"}
    np.testing.assert_allclose(_session(model, feed), eager(module, feed), rtol=1e-5, atol=1e-6)
    ranges = calibrate(model, [feed], tensors_to_calibrate(model, "trt"), method="max")
    quantised = _session(quantize(model, ranges, "trt"), feed)
    assert np.abs(quantised - eager(module, feed)).max() < 0.1


@pytest.mark.parametrize("equation", ["bd,bd->bd", "bii->b", "bij,bjk,kl->bil"])
def test_an_einsum_of_another_kind_is_refused_with_advice(equation: str) -> None:
    class Product(nn.Module):
        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            operands = [numbers] * (equation.count(",") + 1)
            if "kl" in equation:
                operands[2] = numbers[0]
            return torch.einsum(equation, *operands)

    shape = (4, 3) if equation.startswith("bd") else (4, 3, 3)
    feed = {"numbers": np.ones(shape, np.float32)}
    with pytest.raises(ExportError, match=r"not one matrix product; write it with torch\.matmul"):
        traced(Product(), feed)


def test_inputs_that_not_every_backend_reads_are_named() -> None:
    feed = {"numbers": np.ones((4, 3), np.float64), "tokens": np.ones((4, 3), np.int64)}
    with pytest.raises(
        ExportError, match="numbers is float64, tokens is int64; every backend takes inputs of uint8"
    ):
        traced(Mixed(), feed)
    with pytest.raises(ExportError, match=r"1 example tensors for 2 inputs \(a, b\)"):
        traced(Mixed(), {"a": np.ones((4, 3), np.float32)}, input_names=("a", "b"))
