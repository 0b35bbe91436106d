"""Losses equal those of scikit-learn and open_clip; micro-batches add up to the whole step."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_squared_error
from sklearn.metrics.pairwise import cosine_similarity

from models.losses import contrastive_loss, cosine_loss, hardest_rows, mse_loss, total_loss

B, E = 12, 7


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predictions of any length, unit targets, weights."""
    generator = torch.Generator().manual_seed(seed)
    z_BE, target_BE = torch.randn(2, B, E, generator=generator)
    return 3 * z_BE, torch.nn.functional.normalize(target_BE, dim=-1), torch.rand(B, generator=generator) + 0.5


def test_cosine_loss_equals_scikit_learn() -> None:
    z_BE, target_BE, _ = drawn()
    expected = 1 - cosine_similarity(z_BE.numpy(), 5 * target_BE.numpy()).diagonal()
    np.testing.assert_allclose(cosine_loss(z_BE, 5 * target_BE), expected, atol=1e-6)


def test_cosine_loss_gradient_is_tangential() -> None:
    """At angle a the loss is 1 − cos a; its slope along the circle is sin a, and along the radius nothing."""
    angle = 0.3
    z_BE = torch.tensor([[2 * math.cos(angle), 2 * math.sin(angle)]], requires_grad=True)
    cosine_loss(z_BE, torch.tensor([[5.0, 0.0]])).sum().backward()
    assert z_BE.grad is not None
    tangent = torch.tensor([[-math.sin(angle), math.cos(angle)]])
    torch.testing.assert_close(z_BE.grad, tangent * math.sin(angle) / 2)


def test_mse_loss_equals_scikit_learn_on_unnormalised_output() -> None:
    z_BE, target_BE, _ = drawn()
    expected = [mean_squared_error(t, z) for z, t in zip(z_BE.numpy(), target_BE.numpy(), strict=True)]
    np.testing.assert_allclose(mse_loss(z_BE, 5 * target_BE), expected, rtol=1e-5)


def test_contrastive_loss_equals_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    z_BE, target_BE, _ = drawn()
    unit_BE = torch.nn.functional.normalize(z_BE, dim=-1)
    theirs = open_clip.ClipLoss()(unit_BE, target_BE, logit_scale=1 / 0.07)
    torch.testing.assert_close(contrastive_loss(z_BE, target_BE, 0.07).mean(), theirs, atol=1e-6, rtol=1e-6)


def test_images_of_one_prompt_are_not_negatives() -> None:
    """By hand in float64: an image's negatives are the images of other prompts, in both directions."""
    z_BE, target_BE, _ = drawn()
    target_BE[5] = target_BE[9] = target_BE[2]
    target_BE[7] = torch.nn.functional.normalize(target_BE[3] + 1e-3, dim=-1)  # alike, but another
    prompt = [0, 1, 2, 3, 4, 2, 6, 7, 8, 2, 10, 11]
    z, t = z_BE.double().numpy(), target_BE.double().numpy()
    logit = (z / np.linalg.norm(z, axis=1, keepdims=True)) @ t.T / 0.07
    expected = []
    for i in range(B):
        others = [j for j in range(B) if prompt[j] != prompt[i]]
        rows = np.log(np.exp(logit[i, i]) + np.exp(logit[i, others]).sum()) - logit[i, i]
        columns = np.log(np.exp(logit[i, i]) + np.exp(logit[others, i]).sum()) - logit[i, i]
        expected.append((rows + columns) / 2)
    z_BE.requires_grad_()
    found = contrastive_loss(z_BE, target_BE, 0.07)
    np.testing.assert_allclose(found.detach(), expected, atol=1e-4)
    found.sum().backward()
    assert z_BE.grad is not None
    assert z_BE.grad.isfinite().all()


def test_hardest_rows_have_the_largest_loss() -> None:
    loss_B = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.7])
    assert hardest_rows(loss_B, 0.4).tolist() == [1, 4]
    assert hardest_rows(loss_B, 0.01).tolist() == [1]
    assert hardest_rows(loss_B, 1).tolist() == [0, 1, 2, 3, 4]


def test_total_loss_is_the_weighted_sum_of_all_terms() -> None:
    z_BE, target_BE, weight_B = drawn()
    each_B = (
        cosine_loss(z_BE, target_BE) + 0.3 * mse_loss(z_BE, target_BE) + 0.2 * contrastive_loss(z_BE, target_BE, 0.07)
    )
    expected = sum(float(w) * float(e) for w, e in zip(weight_B, each_B, strict=True)) / B
    assert total_loss(z_BE, target_BE, weight_B, denominator=B, mse=0.3, contrastive=0.2).item() == pytest.approx(
        expected, rel=1e-6
    )


def test_hard_fraction_averages_over_the_largest_cosine_losses() -> None:
    z_BE, target_BE, weight_B = drawn()
    rows = np.argsort(cosine_similarity(z_BE.numpy(), target_BE.numpy()).diagonal())[:3]
    each_B = cosine_loss(z_BE, target_BE) + 0.3 * mse_loss(z_BE, target_BE)
    expected = float((weight_B * each_B)[rows.tolist()].mean())
    assert total_loss(z_BE, target_BE, weight_B, denominator=B, mse=0.3, hard_fraction=0.25).item() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("cuts", [(3, 6, 9), (1,), (2, 7)])
def test_micro_batches_add_up_to_the_whole_step(cuts: tuple[int, ...]) -> None:
    """Of any sizes, as when images cannot be read: values and gradients."""
    z_BE, target_BE, weight_B = drawn()
    z_BE.requires_grad_()
    whole = total_loss(z_BE, target_BE, weight_B, denominator=16, mse=0.3)
    (expected,) = torch.autograd.grad(whole, z_BE)
    edges = (0, *cuts, B)
    parts = [
        total_loss(z_BE[a:b], target_BE[a:b], weight_B[a:b], denominator=16, mse=0.3)
        for a, b in itertools.pairwise(edges)
    ]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), z_BE)[0], expected, atol=1e-7, rtol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("keywords", [{}, {"mse": 1, "contrastive": 1, "hard_fraction": 0.5}])
def test_empty_batch_has_zero_loss(keywords: dict[str, float]) -> None:
    z_BE = torch.zeros(0, E, requires_grad=True)
    found = total_loss(z_BE, torch.zeros(0, E), torch.zeros(0), denominator=8, **keywords)
    found.backward()
    assert found.item() == 0


def test_half_precision_is_summed_in_fp32_under_autocast() -> None:
    z_BE = torch.nn.functional.normalize(torch.randn(256, 384, generator=torch.Generator().manual_seed(1)), dim=-1)
    ones_B = torch.ones(256)
    exact = total_loss(z_BE.half().float(), z_BE, ones_B, denominator=256, contrastive=1, temperature=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        found = total_loss(z_BE.half(), z_BE, ones_B, denominator=256, contrastive=1, temperature=0.01)
    assert found.dtype == torch.float32
    assert found.equal(exact)
