"""The losses, against scikit-learn's, torch's and open_clip's, and their sums over the parts of a step."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_squared_error
from sklearn.metrics.pairwise import cosine_similarity

from models.losses import contrastive_loss, cosine_loss, hardest, loss, mse_loss

B, E = 12, 7


@dataclass(frozen=True)
class Settings:
    mse: float = 0
    contrastive: float = 0
    temperature: float = 0.07
    hardest: float = 1


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predictions of any length, unit targets, weights."""
    generator = torch.Generator().manual_seed(seed)
    z_BE, target_BE = torch.randn(2, B, E, generator=generator)
    return 3 * z_BE, torch.nn.functional.normalize(target_BE, dim=-1), torch.rand(B, generator=generator) + 0.5


def test_cosine_is_scikit_learns() -> None:
    z_BE, target_BE, _ = drawn()
    expected = 1 - cosine_similarity(z_BE.numpy(), 5 * target_BE.numpy()).diagonal()
    np.testing.assert_allclose(cosine_loss(z_BE, 5 * target_BE), expected, atol=1e-6)


def test_the_cosines_gradient_is_the_tangents() -> None:
    """At angle a the loss is 1 − cos a; its slope along the circle is sin a, and along the radius nothing."""
    angle = 0.3
    z_BE = torch.tensor([[2 * math.cos(angle), 2 * math.sin(angle)]], requires_grad=True)
    cosine_loss(z_BE, torch.tensor([[5.0, 0.0]])).sum().backward()
    assert z_BE.grad is not None
    tangent = torch.tensor([[-math.sin(angle), math.cos(angle)]])
    torch.testing.assert_close(z_BE.grad, tangent * math.sin(angle) / 2)


def test_mse_is_scikit_learns_on_the_output_as_it_is() -> None:
    z_BE, target_BE, _ = drawn()
    expected = [mean_squared_error(t, z) for z, t in zip(z_BE.numpy(), target_BE.numpy(), strict=True)]
    np.testing.assert_allclose(mse_loss(z_BE, 5 * target_BE), expected, rtol=1e-5)


def test_contrastive_is_open_clips() -> None:
    open_clip = pytest.importorskip("open_clip")
    z_BE, target_BE, _ = drawn()
    unit_BE = torch.nn.functional.normalize(z_BE, dim=-1)
    theirs = open_clip.ClipLoss()(unit_BE, target_BE, logit_scale=1 / 0.07)
    torch.testing.assert_close(contrastive_loss(z_BE, target_BE, 0.07).mean(), theirs, atol=1e-6, rtol=1e-6)


def test_images_of_one_prompt_are_not_told_apart() -> None:
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


def test_the_hardest_are_those_of_the_largest_loss() -> None:
    loss_B = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.7])
    assert hardest(loss_B, 0.4).tolist() == [1, 4]
    assert hardest(loss_B, 0.01).tolist() == [1]
    assert hardest(loss_B, 1).tolist() == [0, 1, 2, 3, 4]


def test_the_sum_of_all_parts_by_hand() -> None:
    z_BE, target_BE, weight_B = drawn()
    cfg = Settings(mse=0.3, contrastive=0.2)
    each_B = (
        cosine_loss(z_BE, target_BE) + 0.3 * mse_loss(z_BE, target_BE) + 0.2 * contrastive_loss(z_BE, target_BE, 0.07)
    )
    expected = sum(float(w) * float(e) for w, e in zip(weight_B, each_B, strict=True)) / B
    assert loss(z_BE, target_BE, weight_B, cfg, B).item() == pytest.approx(expected, rel=1e-6)


def test_hard_example_mining_is_the_mean_over_the_hardest_by_cosine() -> None:
    z_BE, target_BE, weight_B = drawn()
    cfg = Settings(mse=0.3, hardest=0.25)
    rows = np.argsort(cosine_similarity(z_BE.numpy(), target_BE.numpy()).diagonal())[:3]
    each_B = cosine_loss(z_BE, target_BE) + 0.3 * mse_loss(z_BE, target_BE)
    expected = float((weight_B * each_B)[rows.tolist()].mean())
    assert loss(z_BE, target_BE, weight_B, cfg, B).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("cuts", [(3, 6, 9), (1,), (2, 7)])
def test_parts_of_a_step_add_up_to_the_whole(cuts: tuple[int, ...]) -> None:
    """Of any sizes, as when images cannot be read: values and gradients."""
    z_BE, target_BE, weight_B = drawn()
    cfg = Settings(mse=0.3)
    z_BE.requires_grad_()
    whole = loss(z_BE, target_BE, weight_B, cfg, 16)
    (expected,) = torch.autograd.grad(whole, z_BE)
    edges = (0, *cuts, B)
    parts = [loss(z_BE[a:b], target_BE[a:b], weight_B[a:b], cfg, 16) for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), z_BE)[0], expected, atol=1e-7, rtol=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("chosen", [Settings(), Settings(mse=1, contrastive=1, hardest=0.5)])
def test_no_image_gives_no_loss(cfg: Settings) -> None:
    z_BE = torch.zeros(0, E, requires_grad=True)
    found = loss(z_BE, torch.zeros(0, E), torch.zeros(0), cfg, 8)
    found.backward()
    assert found.item() == 0


def test_half_precision_is_summed_in_full_under_autocast_too() -> None:
    z_BE = torch.nn.functional.normalize(torch.randn(256, 384, generator=torch.Generator().manual_seed(1)), dim=-1)
    ones_B = torch.ones(256)
    cfg = Settings(contrastive=1, temperature=0.01)
    exact = loss(z_BE.half().float(), z_BE, ones_B, cfg, 256)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(z_BE.half(), z_BE, ones_B, cfg, 256)
    assert found.dtype == torch.float32
    assert found.equal(exact)
