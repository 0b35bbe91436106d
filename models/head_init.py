"""A head fitted in closed form: ridge regression from frozen features to target vectors.

Exact normal equations in float64, streamed over batches: memory is D² and D·E, whatever the number of images.
n images, D feature width, H units of a wide head, E target width.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Pairs: TypeAlias = Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Batches of (features [n, D], unit targets [n, E]), in a fixed order."""

LAMBDAS = tuple(10.0**p for p in np.arange(-4, 4.01, 0.5))
"""Tried penalties, as shares of the features' mean variance."""
_HELD_OUT = 10  # every tenth row judges the penalty
_MOST_HELD_OUT = 5000  # rows kept for that
FIT, JUDGE, NEITHER = 0, 1, 2
"""Parts that rows have in the choice of the penalty; the head itself is fitted on all."""


class Ridge:
    """Sums for the normal equations; `add` batches in any order, then `solve`.

    Args:
        features: D.
        targets: E.
        intercept: whether there is a bias, which is not penalised.
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

    def add_all_of(self, other: "Ridge") -> None:
        """Add the rows that `other` has."""
        self.n += other.n
        for name in ("_x", "_y", "_xx", "_xy"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def solve(self, share: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight [E, D] and bias [E] of the least squares with penalty λ‖W‖².

        Args:
            share: λ ÷ (n × mean variance of the features), so that one value serves any backbone and size; without an
                intercept ÷ (n × their mean square).
        """
        mean_x, mean_y = self._x / self.n, self._y / self.n
        xx = self._xx - self.n * np.outer(mean_x, mean_x)
        xy = self._xy - self.n * np.outer(mean_x, mean_y)
        penalty = share * np.trace(xx) / len(xx)
        weight_DE = np.linalg.solve(xx + max(penalty, 1e-12) * np.eye(len(xx)), xy)
        bias_E = mean_y - mean_x @ weight_DE
        return weight_DE.T.astype(np.float32), bias_E.astype(np.float32)


class RidgeHead:
    """Ridge whose penalty is chosen on held-out rows by the score itself, the mean cosine.

    Args:
        features, targets, intercept: as of `Ridge`.
        part_n: FIT, JUDGE or NEITHER of each row, in the order in which `add` has them: rows that judge must share no
            prompt with rows that fit, or too low a penalty wins. None lets every tenth row judge.
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
        """Features and unit targets of one batch, in a fixed order."""
        rows = self._seen + np.arange(len(x_nD))
        if self._part_n is None:
            part_n = np.where((rows % _HELD_OUT == 0) & (rows < _HELD_OUT * _MOST_HELD_OUT), JUDGE, FIT)
        else:
            part_n = self._part_n[rows]
        self._seen += len(x_nD)
        self._held[0].append(x_nD[part_n == JUDGE])
        self._held[1].append(y_nE[part_n == JUDGE])
        self._fit.add(x_nD[part_n == FIT], y_nE[part_n == FIT])
        self._rest.add(x_nD[part_n == NEITHER], y_nE[part_n == NEITHER])

    def solve(self, stiffer: float = 1) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
        """Weight [E, D] and bias [E] over all rows, and their penalty's share: the one that scored best × `stiffer`."""
        x, y = (np.concatenate(part) for part in self._held)
        scores = {}
        for share in LAMBDAS:
            weight, bias = self._fit.solve(share)
            z = x @ weight.T + bias
            scores[share] = float(((z * y).sum(1) / np.maximum(np.linalg.norm(z, axis=1), 1e-12)).mean())
        best = stiffer * max(scores, key=scores.__getitem__)
        self._fit.add(x, y)
        self._fit.add_all_of(self._rest)
        self._held = ([], [])
        return *self._fit.solve(best), best


def init_ridge(
    head: nn.Module,
    batches: Callable[[], Pairs],
    stiffer: float = 1,
    part_n: NDArray[np.integer] | None = None,
) -> float:
    """Sets a head of `models.runtime.heads` in closed form; returns the penalty's share.

    Linear: one pass. Wide: its first layer stays as it is, random features; one pass measures the mean and variance
    of their BatchNorm over all images (as in evaluation: exactly, no running average), a second one fits the last
    layer on what comes out of the ReLU.

    Args:
        batches: begins a pass over the same batches.
        stiffer: factor on the penalty that scored best on held-out rows.
        part_n: of all rows in the order of the batches, as of `RidgeHead`.
    """
    if isinstance(head, nn.Linear):
        return _fit(head, batches(), stiffer, part_n)
    assert isinstance(head, nn.Sequential)
    first, norm, relu, last = head
    assert isinstance(first, nn.Linear)
    assert isinstance(norm, nn.BatchNorm1d)
    assert isinstance(last, nn.Linear)
    _measure(first, norm, batches())
    hidden = nn.Sequential(first, norm, relu).eval()
    try:
        return _fit(last, _through(hidden, batches()), stiffer, part_n)
    finally:
        hidden.train(head.training)


def _fit(layer: nn.Linear, batches: Pairs, stiffer: float, part_n: NDArray[np.integer] | None) -> float:
    ridge = RidgeHead(layer.in_features, layer.out_features, part_n=part_n)
    for x_nD, y_nE in batches:
        ridge.add(x_nD, y_nE)
    weight_ED, bias_E, share = ridge.solve(stiffer)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight_ED))
        layer.bias.copy_(torch.from_numpy(bias_E))
    return share


@torch.no_grad()
def _measure(first: nn.Linear, norm: nn.BatchNorm1d, batches: Pairs) -> None:
    """Sets the statistics of `norm` to those of all rows that come out of `first`."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    n, mean_H, squares_H = 0, torch.zeros(norm.num_features).double(), torch.zeros(norm.num_features).double()
    for x_nD, _ in batches:
        if not len(x_nD):
            continue
        rows_nH = first(torch.tensor(x_nD, device=first.weight.device)).double().cpu()
        # Chan's way to join two means and sums of squares: no large sums are taken from one another
        n, shift_H = n + len(rows_nH), rows_nH.mean(0) - mean_H
        squares_H += (rows_nH - rows_nH.mean(0)).square().sum(0) + shift_H**2 * len(rows_nH) * (n - len(rows_nH)) / n
        mean_H += shift_H * len(rows_nH) / n
    norm.running_mean.copy_(mean_H)
    norm.running_var.copy_(squares_H / max(n - 1, 1))  # unbiased, as BatchNorm keeps it
    norm.num_batches_tracked.fill_(1)


@torch.no_grad()
def _through(hidden: nn.Module, batches: Pairs) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    device = next(hidden.parameters()).device
    for x_nD, y_nE in batches:
        yield hidden(torch.tensor(x_nD, device=device)).cpu().numpy(), y_nE
