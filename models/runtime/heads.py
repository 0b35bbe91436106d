"""Heads: pooled features_BD → z_BE, not normalised. B images, D feature width, E target width.

The bundle carries a copy of this file (models/export/program.py), so it imports nothing else of this project.
"""

from torch import nn

HEADS = ("linear", "wide")


def make_head(kind: str, features: int, targets: int, hidden: int = 0) -> nn.Module:
    """Create a head: linear is Linear; wide is Linear → BatchNorm → ReLU → Linear, as in the winning solution.

    Args:
        kind: one of `HEADS`.
        features: feature width D.
        targets: target width E.
        hidden: hidden units of a wide head.

    Raises:
        ValueError: the kind is unknown, or a wide head has no hidden unit.
    """
    if kind == "linear":
        return nn.Linear(features, targets)
    if kind == "wide" and hidden >= 1:
        return nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, targets))
    raise ValueError(
        f"head {kind!r} with {hidden} hidden units does not exist; use {' or '.join(HEADS)}, wide with 1 or more units"
    )
