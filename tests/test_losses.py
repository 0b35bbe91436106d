"""The loss, against its closed form."""

import math

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from models.losses import cosine_loss


def test_cosine_loss_is_one_minus_the_mean_cosine() -> None:
    z_BE, target_BE = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 1 - cosine_similarity(z_BE.numpy(), target_BE.numpy()).diagonal().mean()
    assert cosine_loss(z_BE, target_BE).item() == pytest.approx(expected, abs=1e-6)


def test_lengths_do_not_matter_and_the_gradient_is_the_tangents() -> None:
    """At angle a the loss is 1 − cos a; its slope along the circle is sin a, and along the radius nothing."""
    angle = 0.3
    z_BE = torch.tensor([[2 * math.cos(angle), 2 * math.sin(angle)]], requires_grad=True)
    loss = cosine_loss(z_BE, torch.tensor([[5.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(1 - math.cos(angle), abs=1e-6)
    tangent = torch.tensor([[-math.sin(angle), math.cos(angle)]])
    assert z_BE.grad is not None
    torch.testing.assert_close(z_BE.grad, tangent * math.sin(angle) / 2)


def test_half_precision_is_summed_in_full() -> None:
    z_BE = torch.nn.functional.normalize(torch.randn(512, 384, generator=torch.Generator().manual_seed(1)), dim=-1)
    assert cosine_loss(z_BE.half(), z_BE.half()).item() == pytest.approx(0, abs=1e-5)
    assert cosine_loss(z_BE.half(), z_BE.half()).dtype == torch.float32
