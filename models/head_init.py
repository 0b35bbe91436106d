"""A head fitted in closed form: ridge regression from frozen features to target vectors.

Exact normal equations in float64, streamed over batches: memory is D² and D·E, whatever the number of pictures.
n pictures, D feature width, E target width.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from models.regressor import Regressor

LAMBDAS = tuple(10.0**p for p in np.arange(-4, 4.01, 0.5))
"""Tried penalties, as shares of the features' mean variance."""
_HELD_OUT = 10  # every tenth row judges the penalty
_MOST_HELD_OUT = 5000  # rows kept for that


class Ridge:
    """Sums for the normal equations; `add` batches in any order, then `solve`."""

    def __init__(self, features: int, targets: int) -> None:
        self.n = 0
        self._x = np.zeros(features)
        self._y = np.zeros(targets)
        self._xx = np.zeros((features, features))
        self._xy = np.zeros((features, targets))

    def add(self, x_nD: NDArray[np.float32], y_nE: NDArray[np.float32]) -> None:
        x, y = x_nD.astype(np.float64), y_nE.astype(np.float64)
        self.n += len(x)
        self._x += x.sum(0)
        self._y += y.sum(0)
        self._xx += x.T @ x
        self._xy += x.T @ y

    def solve(self, share: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Weight [E, D] and bias [E] of the least squares with penalty λ‖W‖², the bias free.

        Args:
            share: λ ÷ (n × mean variance of the features), so that one value serves any backbone and size.
        """
        mean_x, mean_y = self._x / self.n, self._y / self.n
        xx = self._xx - self.n * np.outer(mean_x, mean_x)
        xy = self._xy - self.n * np.outer(mean_x, mean_y)
        penalty = share * np.trace(xx) / len(xx)
        weight_DE = np.linalg.solve(xx + max(penalty, 1e-12) * np.eye(len(xx)), xy)
        bias_E = mean_y - mean_x @ weight_DE
        return weight_DE.T.astype(np.float32), bias_E.astype(np.float32)


class RidgeHead:
    """Ridge whose penalty is chosen on held-out rows by the score itself, the mean cosine."""

    def __init__(self, features: int, targets: int) -> None:
        self._fit = Ridge(features, targets)
        self._held: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
        self._seen = 0

    def add(self, x_nD: NDArray[np.float32], y_nE: NDArray[np.float32]) -> None:
        """Features and unit targets of one batch, in a fixed order: every tenth row is held out."""
        rows = self._seen + np.arange(len(x_nD))
        held = (rows % _HELD_OUT == 0) & (rows < _HELD_OUT * _MOST_HELD_OUT)
        self._seen += len(x_nD)
        self._held[0].append(x_nD[held])
        self._held[1].append(y_nE[held])
        self._fit.add(x_nD[~held], y_nE[~held])

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
        self._held = ([], [])
        return *self._fit.solve(best), best

    def set_head(self, model: Regressor, stiffer: float = 1) -> float:
        """Makes what `solve` gives the head of `model`; returns the penalty's share."""
        weight, bias, share = self.solve(stiffer)
        with torch.no_grad():
            model.head.weight.copy_(torch.from_numpy(weight))
            model.head.bias.copy_(torch.from_numpy(bias))
        return share


def set_ridge_head(model: Regressor, features_nD: torch.Tensor, target_nE: torch.Tensor) -> float:
    """Fits the head of `model` on features and unit targets of n pictures; returns the penalty's share."""
    ridge = RidgeHead(features_nD.shape[1], target_nE.shape[1])
    for x, y in zip(features_nD.split(4096), target_nE.split(4096), strict=True):
        ridge.add(x.float().numpy(), y.float().numpy())
    return ridge.set_head(model)
