"""The closed-form head, against scikit-learn's ridge regression."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge as TheirRidge

from models.head_init import EXCLUDED, FIT, HELD_OUT, PENALTIES, Ridge, RidgeHead, init_ridge
from models.runtime.heads import make_head

N, D, E = 300, 20, 7


def problem(noise: float, seed: int = 0, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Features with a large mean and unlike scales, and unit targets that follow from them up to noise."""
    rng = np.random.default_rng(seed)
    x_nD = rng.normal(5, 1, (n, D)) * np.geomspace(0.1, 10, D)
    y_nE = ((x_nD - x_nD.mean(0)) / x_nD.std(0)) @ np.random.default_rng(99).normal(size=(D, E))
    y_nE += noise * rng.normal(size=y_nE.shape) + 1
    return x_nD.astype(np.float32), (y_nE / np.linalg.norm(y_nE, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("share", [1e-4, 1e-1, 1e2])
def test_ridge_equals_scikit_learn(share: float) -> None:
    x_nD, y_nE = (part.astype(np.float64) for part in problem(noise=0.5))
    penalty = share * N * x_nD.var(0).mean()
    theirs = TheirRidge(alpha=penalty, solver="cholesky").fit(x_nD, y_nE)
    ridge = Ridge(D, E)
    ridge.add(x_nD, y_nE)  # type: ignore[arg-type] – float64, to compare closely
    weight_ED, bias_E = ridge.solve(share)
    np.testing.assert_allclose(weight_ED, theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(bias_E, theirs.intercept_, atol=1e-6)


def test_batch_order_does_not_matter() -> None:
    x_nD, y_nE = problem(noise=0.5)
    whole, parts = Ridge(D, E), Ridge(D, E)
    whole.add(x_nD, y_nE)
    for start in (200, 0, 37):
        stop = {0: 37, 37: 200, 200: N}[start]
        parts.add(x_nD[start:stop], y_nE[start:stop])
    for ours, theirs in zip(whole.solve(0.01), parts.solve(0.01), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def score(weight_ED: np.ndarray, bias_E: np.ndarray, x_nD: np.ndarray, y_nE: np.ndarray) -> float:
    z_nE = x_nD @ weight_ED.T + bias_E
    return float(((z_nE * y_nE).sum(1) / np.linalg.norm(z_nE, axis=1)).mean())


def test_selected_penalty_beats_extremes() -> None:
    """150 features and 400 noisy images: too little penalty fits the noise, too much gives the mean vector."""
    features = 150
    rng = np.random.default_rng(0)
    x_nD = rng.normal(size=(2400, features)).astype(np.float32)
    y_nE = x_nD @ rng.normal(size=(features, E)) + 15 * rng.normal(size=(2400, E)) + 5
    y_nE = (y_nE / np.linalg.norm(y_nE, axis=1, keepdims=True)).astype(np.float32)
    cfg, plain = RidgeHead(features, E), Ridge(features, E)
    for rows in np.array_split(np.arange(400), 7):
        cfg.add(x_nD[rows], y_nE[rows])
        plain.add(x_nD[rows], y_nE[rows])
    weight_ED, bias_E, share = cfg.solve()
    assert PENALTIES[0] < share < PENALTIES[-1]
    new = x_nD[400:], y_nE[400:]
    extremes = [score(*plain.solve(extreme), *new) for extreme in (PENALTIES[0], PENALTIES[-1])]
    assert score(weight_ED, bias_E, *new) > max(extremes) + 0.01
    # the held-out rows judged the penalty and then were fitted, too
    np.testing.assert_allclose(weight_ED, plain.solve(share)[0], atol=1e-5)


def test_held_out_rows_share_no_prompt_with_fitted_rows() -> None:
    """Ten images a prompt: a judge that has the prompts of the fit prefers what memorises them."""
    features = 150
    rng = np.random.default_rng(0)
    prompt_n = np.arange(400) // 10
    x_nD = (rng.normal(size=(40, features))[prompt_n] + 0.3 * rng.normal(size=(400, features))).astype(np.float32)
    y_nE = rng.normal(size=(40, E))[prompt_n] + 1
    y_nE = (y_nE / np.linalg.norm(y_nE, axis=1, keepdims=True)).astype(np.float32)
    part_n = np.where(prompt_n % 8 == 0, HELD_OUT, np.where(prompt_n == 1, EXCLUDED, FIT))
    fitted, whole = Ridge(features, E), Ridge(features, E)
    fitted.add(x_nD[part_n == FIT], y_nE[part_n == FIT])
    whole.add(x_nD, y_nE)
    judge = part_n == HELD_OUT
    scores = {share: score(*fitted.solve(share), x_nD[judge], y_nE[judge]) for share in PENALTIES}
    apart, together = RidgeHead(features, E, part_n=part_n), RidgeHead(features, E)
    for rows in np.array_split(np.arange(400), 7):
        apart.add(x_nD[rows], y_nE[rows])
        together.add(x_nD[rows], y_nE[rows])
    weight_ED, bias_E, share = apart.solve()
    assert share == max(scores, key=scores.__getitem__)
    assert share > 10 * together.solve()[2], "the same prompts on both sides let a low penalty win"
    for ours, theirs in zip((weight_ED, bias_E), whole.solve(share), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_constant_feature_is_harmless() -> None:
    x_nD, y_nE = problem(noise=0.5)
    x_nD[:, 3] = 7
    ridge = Ridge(D, E)
    ridge.add(x_nD, y_nE)
    weight_ED, _ = ridge.solve(1e-4)
    assert np.isfinite(weight_ED).all()
    assert np.abs(weight_ED[:, 3]).max() < 1e-4


def test_linear_head_is_set_to_ridge() -> None:
    head = make_head("linear", 64, E)
    generator = torch.Generator().manual_seed(0)
    features_nD = torch.randn(200, 64, generator=generator)
    target_nE = torch.nn.functional.normalize(features_nD[:, :E] + 0.1, dim=-1)
    batches = list(zip(features_nD.numpy().reshape(8, 25, 64), target_nE.numpy().reshape(8, 25, E), strict=True))
    share = init_ridge(head, lambda: batches)
    ridge = Ridge(64, E)
    ridge.add(features_nD.numpy(), target_nE.numpy())
    weight_ED, bias_E = ridge.solve(share)
    np.testing.assert_allclose(head.get_parameter("weight").detach().numpy(), weight_ED, atol=1e-5)
    np.testing.assert_allclose(head.get_parameter("bias").detach().numpy(), bias_E, atol=1e-5)


@pytest.mark.parametrize("share", [1e-4, 1e-1])
def test_ridge_without_intercept_equals_scikit_learn(share: float) -> None:
    x_nD, y_nE = (part.astype(np.float64) for part in problem(noise=0.5))
    penalty = share * N * (x_nD**2).mean()
    theirs = TheirRidge(alpha=penalty, solver="cholesky", fit_intercept=False).fit(x_nD, y_nE)
    ridge = Ridge(D, E, intercept=False)
    ridge.add(x_nD, y_nE)  # type: ignore[arg-type] – float64, to compare closely
    weight_ED, bias_E = ridge.solve(share)
    np.testing.assert_allclose(weight_ED, theirs.coef_, atol=1e-6)
    assert not bias_E.any()


def test_wide_head_is_ridge_on_hidden_units() -> None:
    """By numpy and scikit-learn; batches of unlike sizes, one of them empty, streamed twice."""
    hidden = 40
    torch.manual_seed(0)
    head = make_head("wide", D, E, hidden)
    first = {k: v.clone().double().numpy() for k, v in head.state_dict().items() if k.startswith("0.")}
    x_nD, y_nE = problem(noise=0.5)
    passes = 0

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal passes
        passes += 1
        for start, stop in ((0, 7), (7, 7), (7, 200), (200, N)):
            yield x_nD[start:stop], y_nE[start:stop]

    share = init_ridge(head, batches, penalty_scale=3)
    assert passes == 2
    inner_nH = x_nD.astype(np.float64) @ first["0.weight"].T + first["0.bias"]
    norm = head.get_submodule("1")
    np.testing.assert_allclose(norm.get_buffer("running_mean"), inner_nH.mean(0), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(norm.get_buffer("running_var"), inner_nH.var(0, ddof=1), rtol=1e-4)
    assert head.get_parameter("0.weight").detach().double().numpy() == pytest.approx(first["0.weight"])
    h_nH = np.maximum((inner_nH - inner_nH.mean(0)) / np.sqrt(inner_nH.var(0, ddof=1) + 1e-5), 0)
    theirs = TheirRidge(alpha=share * N * h_nH.var(0).mean(), solver="cholesky").fit(h_nH, y_nE)
    with torch.inference_mode():
        found = head.eval()(torch.from_numpy(x_nD))
    np.testing.assert_allclose(found, theirs.predict(h_nH), atol=1e-4)
    assert np.log10(share / 3) * 2 == pytest.approx(round(np.log10(share / 3) * 2)), "thrice one of the tried penalties"


def test_wide_head_stays_in_training_mode() -> None:
    head = make_head("wide", D, E, 10).train()
    x_nD, y_nE = problem(noise=0.5)
    init_ridge(head, lambda: [(x_nD, y_nE)])
    assert all(module.training for module in head.modules())
