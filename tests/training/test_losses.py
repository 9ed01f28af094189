"""Losses against their closed forms; what is unknown counts nowhere; members of an ensemble each have their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from tlexport.errors import RecipeError, TrainingError
from tlexport.models.network import Spec
from tlexport.recipe import Transfer
from tlexport.training.losses import labels_of, loss_of, sampling_weights


def spec(task: Any, **changes: Any) -> Spec:
    return Spec(modality="tabular", backbone="x", classes=2, task=task, **changes)


def test_an_ensembles_loss_is_the_mean_of_its_members() -> None:
    raw, y = torch.randn(8, 3, 2, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    loss = loss_of(spec("binary"), Transfer(), y)
    own = torch.stack([functional.cross_entropy(raw[:, m], y) for m in range(3)])
    assert torch.allclose(loss(raw, y), own.mean())
    of_mean = functional.cross_entropy(raw.mean(dim=1), y)
    assert not torch.allclose(loss(raw, y), of_mean), "the loss of the mean would be another"


def test_an_unmeasured_label_changes_nothing() -> None:
    y = labels_of([[1, -1], [0, 1], [-1, 0], [1, 1]], "multilabel")
    raw = torch.tensor([[1.0, 9.0], [-1.0, 2.0], [9.0, -2.0], [0.5, 0.1]])
    loss = loss_of(spec("multilabel"), Transfer(balance="weights"), y)
    changed = torch.where(y < 0, -raw, raw)
    assert torch.equal(loss(raw, y), loss(changed, y))
    plain = loss_of(spec("multilabel"), Transfer(), y)(raw, y)
    known = y >= 0
    assert torch.allclose(plain, functional.binary_cross_entropy_with_logits(raw[known], y[known]))


def test_values_are_judged_in_the_networks_units() -> None:
    y = torch.tensor([[1000.0], [3000.0]])
    own = spec("regression", center=(2000.0,), scale=(1000.0,))
    perfect = torch.tensor([[-1.0], [1.0]])
    for kind in ("mse", "huber"):
        assert float(loss_of(own, Transfer(loss=kind), y)(perfect, y)) == 0.0  # type: ignore[arg-type]
    assert float(loss_of(own, Transfer(), y)(perfect + 0.5, y)) == pytest.approx(0.25)


def test_qlike_in_logarithms_is_pattons() -> None:
    y = torch.tensor([[2e-4], [5e-4]])
    own = spec("regression", link="log", center=(0.0,), scale=(1.0,))
    forecast = torch.tensor([[3e-4], [4e-4]])
    ratio = y / forecast
    expected = (ratio - ratio.log() - 1).mean()
    assert torch.allclose(loss_of(own, Transfer(loss="qlike"), y)(forecast.log(), y), expected)


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("binary", {"loss": "mse"}, "does not fit a binary task"),
        ("regression", {"loss": "cross_entropy"}, "does not fit a regression task"),
        ("regression", {"loss": "qlike"}, "answers in logarithms"),
        ("regression", {"balance": "weights"}, "a regression has none"),
    ],
)
def test_a_loss_of_another_task_is_refused(task: str, changes: dict[str, Any], message: str) -> None:
    own = spec(task, center=(0.0,), scale=(1.0,))
    with pytest.raises(RecipeError, match=message):
        loss_of(own, Transfer.model_validate(changes), torch.zeros(2, 1))


def test_a_label_without_a_logarithm_is_counted() -> None:
    own = spec("regression", link="log", center=(0.0,), scale=(1.0,))
    with pytest.raises(TrainingError, match="2 training labels are not positive"):
        loss_of(own, Transfer(), torch.tensor([[0.0], [1.0], [-1.0]]))


def test_the_sampler_draws_classes_equally_often() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    weights = sampling_weights(labels, "binary")
    assert float(weights[labels == 0].sum()) == pytest.approx(float(weights[labels == 1].sum()))
    with pytest.raises(RecipeError):
        sampling_weights(torch.zeros(3, 1), "regression")
