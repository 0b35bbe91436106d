"""Initialise a head by ridge regression from frozen features to target vectors.

Normal equations in float64, accumulated over batches: memory is D² and D·E for any number of images.
n images, D feature width, H units of a wide head, E target width.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Pairs: TypeAlias = Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Batches of (features [n, D], unit targets [n, E]), in a fixed order."""

PENALTIES = tuple(10.0**p for p in np.arange(-4, 4.01, 0.5))
"""Relative penalties that are tried: λ ÷ (n × mean variance of the features)."""
_HELD_OUT_EVERY = 10  # every tenth row is held out to choose the penalty
_MAX_HELD_OUT = 5000  # at most so many of them
FIT, HELD_OUT, EXCLUDED = 0, 1, 2
"""Roles of a row while the penalty is chosen; the head itself is fitted on all rows."""


class Ridge:
    """Ridge regression by normal equations: `add` batches in any order, then `solve`.

    Args:
        features: Feature width D.
        targets: Target width E.
        intercept: Fit a bias, which is not penalised.
    """

    def __init__(self, features: int, targets: int, *, intercept: bool = True) -> None:
        self.n = 0
        self._intercept = intercept
        self._x = np.zeros(features)
        self._y = np.zeros(targets)
        self._xx = np.zeros((features, features))
        self._xy = np.zeros((features, targets))

    def add(self, x_nD: NDArray[np.float32], y_nE: NDArray[np.float32]) -> None:
        x, y = x_nD.astype(np.float64), y_nE.astype(np.float64)
        self.n += len(x)
        self._xx += x.T @ x
        self._xy += x.T @ y
        if self._intercept:
            self._x += x.sum(0)
            self._y += y.sum(0)

    def merge(self, other: "Ridge") -> None:
        """Add the sums of another `Ridge`."""
        self.n += other.n
        for name in ("_x", "_y", "_xx", "_xy"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def solve(self, share: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Minimise squared error + λ‖W‖²; return weight [E, D] and bias [E].

        Args:
            share: Relative penalty: λ ÷ (n × mean variance of the features), or ÷ (n × their mean square) without an
                intercept. One value serves any backbone and dataset size.
        """
        mean_x, mean_y = self._x / self.n, self._y / self.n
        xx = self._xx - self.n * np.outer(mean_x, mean_x)
        xy = self._xy - self.n * np.outer(mean_x, mean_y)
        penalty = share * np.trace(xx) / len(xx)
        weight_DE = np.linalg.solve(xx + max(penalty, 1e-12) * np.eye(len(xx)), xy)
        bias_E = mean_y - mean_x @ weight_DE
        return weight_DE.T.astype(np.float32), bias_E.astype(np.float32)


class RidgeHead:
    """Ridge regression whose penalty maximises the mean cosine on held-out rows.

    Args:
        features, targets, intercept: As for `Ridge`.
        part_n: FIT, HELD_OUT or EXCLUDED for each row, in the order of `add`. Held-out rows must share no prompt with
            fitted rows; otherwise too low a penalty is chosen. None holds out every tenth row.
    """

    def __init__(
        self, features: int, targets: int, *, intercept: bool = True, part_n: NDArray[np.integer] | None = None
    ) -> None:
        self._fit = Ridge(features, targets, intercept=intercept)
        self._rest = Ridge(features, targets, intercept=intercept)
        self._held: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
        self._seen = 0
        self._part_n = part_n

    def add(self, x_nD: NDArray[np.float32], y_nE: NDArray[np.float32]) -> None:
        """Add features [n, D] and unit targets [n, E] of one batch, in a fixed order."""
        rows = self._seen + np.arange(len(x_nD))
        if self._part_n is None:
            part_n = np.where((rows % _HELD_OUT_EVERY == 0) & (rows < _HELD_OUT_EVERY * _MAX_HELD_OUT), HELD_OUT, FIT)
        else:
            part_n = self._part_n[rows]
        self._seen += len(x_nD)
        self._held[0].append(x_nD[part_n == HELD_OUT])
        self._held[1].append(y_nE[part_n == HELD_OUT])
        self._fit.add(x_nD[part_n == FIT], y_nE[part_n == FIT])
        self._rest.add(x_nD[part_n == EXCLUDED], y_nE[part_n == EXCLUDED])

    def solve(self, penalty_scale: float = 1) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
        """Return weight [E, D] and bias [E] fitted on all rows, and the relative penalty: best × `penalty_scale`."""
        x, y = (np.concatenate(part) for part in self._held)
        scores = {}
        for share in PENALTIES:
            weight, bias = self._fit.solve(share)
            z = x @ weight.T + bias
            scores[share] = float(((z * y).sum(1) / np.maximum(np.linalg.norm(z, axis=1), 1e-12)).mean())
        best = penalty_scale * max(scores, key=scores.__getitem__)
        self._fit.add(x, y)
        self._fit.merge(self._rest)
        self._held = ([], [])
        return *self._fit.solve(best), best


def init_ridge(
    head: nn.Module,
    batches: Callable[[], Pairs],
    penalty_scale: float = 1,
    part_n: NDArray[np.integer] | None = None,
) -> float:
    """Initialise a head of `models.runtime.heads` by ridge regression.

    A linear head takes one pass. A wide head keeps its random first layer: one pass sets the exact mean and variance
    of its BatchNorm over all images, a second pass fits the last layer on the output of the ReLU.

    Args:
        head: Linear or wide head; changed in place.
        batches: Starts a pass over the same batches.
        penalty_scale: Factor on the penalty that scored best on held-out rows.
        part_n: Role of each row in the order of the batches, as for `RidgeHead`.

    Returns:
        The relative penalty that was used.
    """
    if isinstance(head, nn.Linear):
        return _fit_layer(head, batches(), penalty_scale, part_n)
    layers: Any = head
    first, norm, relu, last = layers
    _set_batch_norm_statistics(first, norm, batches())
    hidden = nn.Sequential(first, norm, relu).eval()
    try:
        return _fit_layer(last, _hidden_features(hidden, batches()), penalty_scale, part_n)
    finally:
        hidden.train(head.training)


def _fit_layer(layer: nn.Linear, batches: Pairs, penalty_scale: float, part_n: NDArray[np.integer] | None) -> float:
    ridge = RidgeHead(layer.in_features, layer.out_features, part_n=part_n)
    for x_nD, y_nE in batches:
        ridge.add(x_nD, y_nE)
    weight_ED, bias_E, share = ridge.solve(penalty_scale)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight_ED))
        layer.bias.copy_(torch.from_numpy(bias_E))
    return share


@torch.no_grad()
def _set_batch_norm_statistics(first: nn.Linear, norm: Any, batches: Pairs) -> None:
    """Set the statistics of a `BatchNorm1d` to the exact mean and variance of the outputs of `first` over all rows."""
    n, mean_H, squares_H = 0, torch.zeros(norm.num_features).double(), torch.zeros(norm.num_features).double()
    for x_nD, _ in batches:
        if not len(x_nD):
            continue
        rows_nH = first(torch.tensor(x_nD, device=first.weight.device)).double().cpu()
        # Chan's update of mean and sum of squares: no cancellation between large sums
        n, shift_H = n + len(rows_nH), rows_nH.mean(0) - mean_H
        squares_H += (rows_nH - rows_nH.mean(0)).square().sum(0) + shift_H**2 * len(rows_nH) * (n - len(rows_nH)) / n
        mean_H += shift_H * len(rows_nH) / n
    norm.running_mean.copy_(mean_H)
    norm.running_var.copy_(squares_H / max(n - 1, 1))  # unbiased, as BatchNorm keeps it
    norm.num_batches_tracked.fill_(1)


@torch.no_grad()
def _hidden_features(hidden: nn.Module, batches: Pairs) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    device = next(hidden.parameters()).device
    for x_nD, y_nE in batches:
        yield hidden(torch.tensor(x_nD, device=device)).cpu().numpy(), y_nE
