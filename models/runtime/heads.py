"""Heads: pooled features_BD → z_BE, not yet of unit length. B images, D feature width, E target width.

The bundle carries a copy of this file (models/export/export.py), so it imports nothing of ours.
"""

from torch import nn

HEADS = ("linear", "wide")


def make_head(kind: str, features: int, targets: int, hidden: int = 0) -> nn.Module:
    """linear: Linear; wide: Linear → BatchNorm → ReLU → Linear, the head of the first team.

    Args:
        kind: one of `HEADS`.
        features: D.
        targets: E.
        hidden: units of a wide head.

    Raises:
        ValueError: another kind, or a wide head of no unit.
    """
    if kind == "linear":
        return nn.Linear(features, targets)
    if kind == "wide" and hidden >= 1:
        return nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, targets))
    raise ValueError(f"no head {kind!r} of {hidden} hidden units; there are {', '.join(HEADS)}, wide with 1 or more")
