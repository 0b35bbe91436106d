"""Heads: what they compute, against the same by hand; and what is refused."""

import pytest
import torch

from models.runtime.heads import make_head


def test_linear_head_is_one_layer() -> None:
    head = make_head("linear", 5, 3, 99)
    assert {k: tuple(v.shape) for k, v in head.state_dict().items()} == {"weight": (3, 5), "bias": (3,)}


def test_wide_head_is_linear_batch_norm_relu_linear() -> None:
    torch.manual_seed(0)
    head = make_head("wide", 5, 3, 7)
    features_BD = torch.randn(6, 5)
    parts = dict(head.named_parameters())
    inner_BH = features_BD @ parts["0.weight"].T + parts["0.bias"]
    normal_BH = (inner_BH - inner_BH.mean(0)) / (inner_BH.var(0, unbiased=False) + 1e-5).sqrt()
    hidden_BH = (normal_BH * parts["1.weight"] + parts["1.bias"]).clamp(min=0)
    expected = hidden_BH @ parts["3.weight"].T + parts["3.bias"]
    torch.testing.assert_close(head.train()(features_BD), expected, atol=1e-5, rtol=0)
    alone = torch.cat([head.eval()(row[None]) for row in features_BD])
    torch.testing.assert_close(head(features_BD), alone, msg="in evaluation an image's vector is its own business")


@pytest.mark.parametrize(("kind", "hidden"), [("wide", 0), ("deep", 8)])
def test_unknown_heads_are_refused(kind: str, hidden: int) -> None:
    with pytest.raises(ValueError, match=rf"head '{kind}' with {hidden} hidden units does not exist"):
        make_head(kind, 5, 3, hidden)
