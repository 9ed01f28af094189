"""Unbiased answers in the label's own unit from a network that was fitted to its logarithm.

exp(E[log y]) lies below E[y]. The smearing estimator (Duan 1983, J. Am. Stat. Assoc. 78, eq. 4) multiplies by the mean of
y / exp(fitted log y) over the training samples, which is also the factor that minimises their QLIKE. It is folded into the
head's bias, so that nothing is added to the graph.
"""

from __future__ import annotations

import numpy as np
import torch

from tlexport.models.network import MemberLinear, Network, Spec
from tlexport.recipe import Transfer


def needed(spec: Spec, transfer: Transfer) -> bool:
    """Whether the network was fitted to logarithms by a loss that leaves their exponential biased."""
    return spec.task == "regression" and spec.link == "log" and transfer.loss != "qlike"


def factor(labels: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """float64 [K] from float [n, K] twice."""
    found: np.ndarray = np.mean(np.asarray(labels, np.float64) / answers, axis=0)
    return found


def fold(model: Network, by: np.ndarray) -> None:
    """Multiply what the model serves by `by` [K], in place."""
    linear = model.head[-1]
    assert isinstance(linear, (torch.nn.Linear, MemberLinear))
    shift = torch.from_numpy(np.log(by)) / torch.tensor(model.spec.scale, dtype=torch.float64)
    with torch.no_grad():
        linear.bias.add_(shift.to(linear.bias))
