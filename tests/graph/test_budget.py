"""The hunt for the fastest graph within a budget, on EfficientNet-Lite0's 50 layers with faults that only FP32 mends."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tlexport.errors import ExportError, GateError
from tlexport.graph import budget, cost
from tlexport.graph.calibration import calibrate
from tlexport.graph.quantize import quantize, tensors_to_calibrate
from tlexport.graph.sensitivity import Answers
from tlexport.progress import Silent

Run = Callable[..., np.ndarray]
FAULTY = ("network.blocks.2.0.conv_pwl", "network.blocks.4.1.conv_pw")


@pytest.fixture(scope="module")
def make(graph: onnx.ModelProto, photographs: np.ndarray) -> Callable[..., onnx.ModelProto]:
    """INT8 graphs in which the faulty layers' integers are shuffled, unless they are left in FP32."""
    ranges = calibrate(
        graph, [{"images": photographs[:16]}], tensors_to_calibrate(graph, "trt"), method="percentile"
    )

    def made(kept: Collection[str], faulty: Collection[str] = FAULTY) -> onnx.ModelProto:
        model = quantize(graph, ranges, "trt", exclude=kept)
        for tensor in model.graph.initializer:
            layer = tensor.name.removesuffix(".weight_quantized")
            if layer in faulty and layer not in kept:
                weight = numpy_helper.to_array(tensor)
                shuffled = np.random.default_rng(0).permutation(weight.ravel()).reshape(weight.shape)
                tensor.CopyFrom(numpy_helper.from_array(shuffled, tensor.name))
        return model

    return made


@pytest.fixture
def hunt(graph: onnx.ModelProto, photographs: np.ndarray, run: Run) -> Callable[..., budget.Hunt]:
    """A hunt whose metric is the mean squared error of the probabilities, known without an interval."""
    expected = run(graph, photographs)

    def begin(limit: float, *, report: bool = False) -> budget.Hunt:
        def judge(model: onnx.ModelProto) -> budget.Verdict | None:
            found = run(model, photographs)
            if not np.isfinite(found).all():
                return None
            drop = float(np.square(found - expected).sum(axis=1).mean())
            return budget.Verdict(drop, drop, drop, limit)

        answers = Answers(graph, [{"images": photographs[:8]}])
        effort = budget.Effort(
            len(photographs) * 2, 12, 0.8, report
        )  # the samples that judge are twice as many here
        return budget.Hunt("int8-trt", judge, answers, cost.GPU, effort, Silent())

    return begin


def test_a_graph_within_the_budget_costs_one_evaluation(
    graph: onnx.ModelProto, make: Callable[..., onnx.ModelProto], hunt: Callable[..., budget.Hunt]
) -> None:
    search = hunt(0.2)
    found = search.fastest(budget.Cast(graph, lambda kept: make(kept, ())), ())
    assert found.kept == () and len(search.trials) == 1 and search.evaluations < 1.5
    assert search.trials[0].within and search.trials[0].low_macs == 1


def test_the_faulty_layers_and_little_else_stay_in_fp32(
    graph: onnx.ModelProto, make: Callable[..., onnx.ModelProto], hunt: Callable[..., budget.Hunt]
) -> None:
    search = hunt(0.1)
    found = search.fastest(budget.Cast(graph, make), ())
    assert set(FAULTY) <= set(found.kept) and len(found.kept) <= 4
    assert {name for layer in found.layers[:2] for name in layer.layers} == set(FAULTY)  # most harmful first
    assert search.evaluations <= 12 and len(found.layers) == 50
    assert not search.trials[0].within
    taken = [t for t in search.trials if t.kept == found.kept]
    assert taken and all(t.within for t in taken)
    assert min(t.cost_ms for t in search.trials) == search.trials[0].cost_ms  # fewer in INT8 cost more
    assert cost.share(found.graph) > 0.9


def test_an_improvement_is_kept_only_if_it_measurably_helps(
    graph: onnx.ModelProto, make: Callable[..., onnx.ModelProto], hunt: Callable[..., budget.Hunt]
) -> None:
    def useless(now: budget.Cast) -> budget.Cast:
        return budget.Cast(graph, lambda kept: make(kept, (*FAULTY, "network.conv_stem")))

    def mending(now: budget.Cast) -> budget.Cast:
        return budget.Cast(graph, lambda kept: make(kept, ()))

    def inapplicable(now: budget.Cast) -> budget.Cast:
        raise ExportError("there is no LayerNormalization")

    search = hunt(0.2)
    steps = [
        budget.Improvement("worse rounding", useless),
        budget.Improvement("smoothing", inapplicable),
        budget.Improvement("mended weights", mending),
    ]
    found = search.fastest(budget.Cast(graph, make), [steps])
    assert found.kept == () and [trial.step for trial in search.trials] == ["plain", "mended weights"]


def test_too_few_samples_to_show_it_take_the_quick_improvements_all_the_same(
    graph: onnx.ModelProto, make: Callable[..., onnx.ModelProto]
) -> None:
    """Thirty samples without a loss: one in ten may still be lost, which is more than the budget."""
    none_lost = lambda model: budget.Verdict(0.0, 0.0, 0.0, 0.05)  # noqa: E731
    mending = budget.Improvement("mended", lambda now: budget.Cast(graph, lambda kept: make(kept, ())))
    costly = budget.Improvement("learnt", lambda now: pytest.fail("the second round is for missed budgets"))
    images = np.zeros((4, 3, 96, 96), np.uint8)
    images[1:] = np.random.default_rng(0).integers(0, 255, images[1:].shape)
    steps = {}
    for samples in (30, 300):
        effort = budget.Effort(samples, 12, 0.8, False)
        search = budget.Hunt(
            "int8-trt", none_lost, Answers(graph, [{"images": images}]), cost.GPU, effort, Silent()
        )
        search.fastest(budget.Cast(graph, make), ([mending], [costly]))
        steps[samples] = [trial.step for trial in search.trials]
    assert steps == {30: ["plain", "mended"], 300: ["plain"]}


def test_a_budget_out_of_reach_names_the_closest_graph(
    graph: onnx.ModelProto, make: Callable[..., onnx.ModelProto], hunt: Callable[..., budget.Hunt]
) -> None:
    search = hunt(-1.0)
    with pytest.raises(
        GateError, match=r"closest of \d+ tried is \d+ layers left in FP32: drop .* \(over the budget\)"
    ):
        search.fastest(budget.Cast(graph, make), ())
    assert len(search.trials) <= 12


def test_outputs_that_are_not_finite_miss_every_budget(
    graph: onnx.ModelProto, make: Callable[..., onnx.ModelProto], hunt: Callable[..., budget.Hunt]
) -> None:
    def broken(kept: Collection[str]) -> onnx.ModelProto:
        model = make(kept, ())
        if "network.classifier" not in kept:
            name = next(n.input[2] for n in model.graph.node if n.name == "network.classifier")
            (tensor,) = (t for t in model.graph.initializer if t.name == name)
            tensor.CopyFrom(
                numpy_helper.from_array(np.full_like(numpy_helper.to_array(tensor), np.nan), name)
            )
        return model

    search = hunt(0.2)
    found = search.fastest(budget.Cast(graph, broken), ())
    assert search.trials[0].drop is None and found.kept == ("network.classifier",)
    assert found.layers[0].layers == ("network.classifier",) and found.layers[0].noise is None


def test_the_report_asks_every_layer_though_the_budget_is_met(
    graph: onnx.ModelProto, make: Callable[..., onnx.ModelProto], hunt: Callable[..., budget.Hunt]
) -> None:
    found = hunt(1.0, report=True).fastest(budget.Cast(graph, lambda kept: make(kept, ())), ())
    assert len(found.layers) == 50 and not any(layer.kept for layer in found.layers)
    assert sum(layer.macs for layer in found.layers) == pytest.approx(1)


def test_what_the_samples_do_not_decide_is_the_closest_graph_with_a_note(
    graph: onnx.ModelProto, make: Callable[..., onnx.ModelProto], photographs: np.ndarray, run: Run
) -> None:
    """The interval is wide whatever the graph: promoting every layer that may be promoted does not narrow it."""
    expected = run(graph, photographs)

    def judge(model: onnx.ModelProto) -> budget.Verdict:
        drop = float(np.square(run(model, photographs) - expected).sum(axis=1).mean())
        return budget.Verdict(drop, drop - 1, drop + 1, 0.2)

    effort = budget.Effort(100, 12, 0.8, False)
    answers = Answers(graph, [{"images": photographs[:8]}])
    search = budget.Hunt("int8-trt", judge, answers, cost.GPU, effort, Silent())
    found = search.fastest(budget.Cast(graph, make), ())
    assert found.note.startswith("undecided: the drop is") and "samples would tell, 100 do not" in found.note
    assert set(FAULTY) <= set(found.kept) and len(search.trials) == 2  # plain, and all that may be promoted
    assert cost.share(found.graph) >= 0.8


def test_no_more_operations_are_promoted_than_allowed(
    graph: onnx.ModelProto, make: Callable[..., onnx.ModelProto], hunt: Callable[..., budget.Hunt]
) -> None:
    search = hunt(-1.0)
    with pytest.raises(GateError, match=r"search\.least"):
        search.fastest(budget.Cast(graph, make), ())
    assert [trial.low_macs >= 0.8 for trial in search.trials] == [True, True]
    assert search.trials[1].low_macs < 0.9
